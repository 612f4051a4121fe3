"""DeepSpeed's universal checkpoints, by its own converter; and a schedule."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

from tests.distributed.deepspeed import engine
from tests.support import harness

SCHEDULER = {
    "scheduler": {
        "type": "WarmupLR",
        "params": {
            "warmup_min_lr": 0.0, "warmup_max_lr": engine.OPTIONS["lr"], "warmup_num_steps": 5,
        },
    }
}  # fmt: skip


def converter(*arguments: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    with mock.patch.object(sys, "argv", ["ds_to_universal", *arguments]):
        ds_to_universal.main(ds_to_universal.parse_arguments())


def to_universal(folder: Path, tag: str) -> str:
    """Run DeepSpeed's own converter, in a rank that has imported it already; the new tag."""
    harness.run(
        1, converter, "--inject_missing_state", "--num_extract_workers", "1",
        "--num_merge_workers", "1", "--input_folder", str(folder / tag),
        "--output_folder", str(folder / f"{tag}_universal"),
    )  # fmt: skip
    return f"{tag}_universal"

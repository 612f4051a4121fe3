"""Releases of DeepSpeed that are known, and the names that each of them must have."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.deepspeed import engine
from tests.support import harness

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "integrations/deepspeed"
COMPAT = "spectral_dist.integrations.deepspeed._compat"
PROGRAM = """
import deepspeed
deepspeed.__version__ = "{}"
try:
    import spectral_dist.integrations.deepspeed
except ImportError as error:
    print(error)
"""

EVERY_ENGINE = (
    "_config.zero_config.offload_optimizer", "_config.zero_config.offload_param",
    "_config.zero_config.zero_quantized_weights",
    "_config.zero_config.zero_quantized_nontrainable_weights",
    "_config.zero_config.zero_hpz_partition_size", "_config.zero_config.elastic_checkpoint",
    "_config.zero_config.zenflow",
    "_set_client_model", "_config.gradient_clipping", "_take_model_step",
    "seq_data_parallel_group", "has_moe_layers", "pipeline_parallelism", "autotp_size",
    "torch_autocast_enabled", "torch_autocast_dtype", "basic_optimizer", "client_optimizer",
    "optimizer_name", "optimizer_params", "load_universal_checkpoint",
)  # fmt: skip
"""Of the engine, at every stage."""
ALSO = {
    0: ("optimizer.loss_scale_config.cur_scale", "optimizer.clip_grad"),
    1: ("optimizer.clip_grad",),
    2: ("optimizer.clip_grad",),
    3: (
        "optimizer.clip_grad", "optimizer.fp32_partitioned_groups_flat",
        "optimizer.sub_group_to_group_id",
    ),
}  # fmt: skip
"""Stage, in fp16 -> more of the engine."""
STAGE3_PARAMETER = (
    "ds_id", "ds_process_group", "partition_numel", "ds_numel", "ds_shape", "all_gather",
    "partition",
)  # fmt: skip
PRIVATE = {
    "_configure_optimizer", "_configure_distributed_model", "_is_supported_optimizer",
    "_set_client_model", "_take_model_step", "_config",
    "seq_data_parallel_group", "fp32_partitioned_groups_flat",
    "sub_group_to_group_id", "loss_scale_config", "clip_grad", "ds_id", "ds_process_group",
    "ds_numel", "ds_shape", "partition_numel", "__compatible_ops__", "is_fp16_supported",
    "zero_pp_rank_", "mp_rank_", "_model_states.pt", "frozen_param_fragments",
    "_mixed_precision_dtypes", "_allgather_params_coalesced", "split_half_float_double",
}  # fmt: skip
"""What no file but _compat.py may name."""


def bounds() -> tuple[str, str]:
    module = engine.quietly(COMPAT)
    return ".".join(map(str, module.LOWEST)), ".".join(map(str, module.NEWEST))


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "0.19.8"])
@pytest.mark.fast_cases("0.20.0")
def test_import_refuses_other_releases(version: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(version)],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    wanted = f"spectral_dist works with deepspeed 0.19.0 to 0.19.8, and {version} is installed"
    assert (wanted in done.stdout) is (version != "0.19.8"), done.stdout
    assert ('Install "deepspeed==0.19.8"' in done.stdout) is (version != "0.19.8")


@pytest.mark.parametrize(
    ("version", "fine"),
    [
        ("0.16.9", False), ("0.17.6", False), ("0.18.9", False), ("0.19.0", True),
        ("0.19.8+cpu", True), ("0.19.7", True), ("0.19.8", True), ("0.19.9", False),
        ("0.19.10", False),
        ("0.20.0", False), ("1.0.0", False), ("unknown", False),
    ],
)  # fmt: skip
def test_the_range(version: str, fine: bool) -> None:
    check = engine.quietly(COMPAT).check_version
    if fine:
        check(version)
        return
    with pytest.raises(ImportError, match=re.escape(version)):
        check(version)


def test_the_range_is_said_alike_in_setup_cfg() -> None:
    first, last = bounds()
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert parser["options.extras_require"]["deepspeed"] == f"deepspeed>={first},<={last}"


def lacking(stage: int) -> list[str]:
    """The names that are not there, under a real engine."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    built = engine.engine_for(engine.config(stage, 2, fp16={"enabled": True}), odd=False)
    missing = []

    def look(owner: Any, paths: tuple[str, ...]) -> None:
        for path in paths:
            value = owner
            for name in path.split("."):
                if not hasattr(value, name):
                    missing.append(f"{type(value).__name__}.{name} ({path})")
                    break
                value = getattr(value, name)

    look(built, EVERY_ENGINE + ALSO[stage])
    look(DeepSpeedEngine, ("save_checkpoint", "load_checkpoint"))
    if stage == 3:
        parameter = next(built.module.parameters())
        look(parameter, STAGE3_PARAMETER)
        if hasattr(built.optimizer, "fp32_partitioned_groups_flat"):
            look(built.optimizer.fp32_partitioned_groups_flat[0], ("ds_id",))
    built.destroy()
    return missing


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_name_has_moved(stage: int) -> None:
    """If this fails, its list says what a new release has renamed: mend _compat.py with it."""
    assert harness.run(2, lacking, stage) == [[], []]


def renamed() -> list[str]:
    """What reading stage 3's layout raises on an engine whose names are others."""
    from spectral_dist.integrations.deepspeed import _compat

    built = engine.engine_for(engine.config(3, 2), odd=False)
    flat = built.optimizer.fp32_partitioned_groups_flat[0]
    assert _compat.sub_groups(built)
    assert _compat.sub_group_ends(built, flat)
    texts = []
    for owner, name, call in (
        (built.optimizer, "fp32_partitioned_groups_flat", lambda: _compat.sub_groups(built)),
        (built.optimizer, "sub_group_to_group_id", lambda: _compat.sub_groups(built)),
        (flat, "ds_id", lambda: _compat.sub_group_ends(built, flat)),
    ):
        value = getattr(owner, name)
        delattr(owner, name)
        try:
            call()
            texts.append("no error")
        except RuntimeError as error:
            texts.append(str(error))
        setattr(owner, name, value)
    built.destroy()
    return texts


def test_a_renamed_layout_is_an_error_and_no_other_stage() -> None:
    for texts in harness.run(2, renamed):
        assert "has no DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat" in texts[0]
        assert "has no DeepSpeedZeroOptimizer_Stage3.sub_group_to_group_id" in texts[1]
        assert "has no Tensor.ds_id" in texts[2] or "has no Parameter.ds_id" in texts[2]


def unread(times: int) -> int:
    """How often a gathered parameter still has numbers that nothing has written there."""
    torch.use_deterministic_algorithms(True)  # which fills empty tensors with NaN
    built = engine.engine_for(engine.config(3, 3))
    engine.steps(built, 0, 1)
    reads = [engine.full_parameters(built) for _ in range(times)]
    built.destroy()
    torch.use_deterministic_algorithms(False)
    return sum(not p.isfinite().all() for read in reads for p in read.values())


@pytest.mark.slow
def test_gathered_parameters_are_there() -> None:
    """Up to 0.19.7, and without our repair, it is some of a hundred reads."""
    assert harness.run(3, unread, 100) == [0, 0, 0]


def test_gradients_are_sorted_by_dtype() -> None:
    compat = engine.quietly(COMPAT)
    halves, floats = torch.zeros(2, dtype=torch.bfloat16), [torch.zeros(1), torch.ones(3)]
    for split in (compat.stage_1_and_2.split_half_float_double, compat._by_dtype):
        buckets = split([floats[0], halves, floats[1]])
        assert sorted([id(t) for t in bucket] for bucket in buckets) == sorted(
            [[id(t) for t in floats], [id(halves)]]
        )


def named(path: Path) -> set[str]:
    """Attributes, and strings other than docstrings, of a file that are private to DeepSpeed."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            found.add(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {name for name in PRIVATE if node.value == name}
    return found


@pytest.mark.parametrize(
    "path",
    [*sorted(FOLDER.glob("*.py")), ROOT / "launch/engines/base.py", ROOT / "launch/doctor.py"],
    ids=lambda path: path.name,
)
def test_private_names_stand_in_few_files(path: Path) -> None:
    if path.name == "_compat.py":
        assert len(named(path)) > 10  # the check itself sees them
    elif path.parent == FOLDER and not path.name.startswith("_compat_"):
        assert named(path) == set()
    else:  # which see parameters of engines with and without DeepSpeed
        assert named(path) <= {"ds_numel"}

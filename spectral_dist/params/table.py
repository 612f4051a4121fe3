"""The table of which parameters are matrices, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectral_dist._log import logger
from spectral_dist.params.spec import ParamSpec
from spectral_dist.sharding import collectives


def table(specs: Sequence[ParamSpec]) -> str:
    """Return a text table of what parameters go to, why, and how many numbers that is."""
    rows: dict[tuple[str, str], list[ParamSpec]] = {}
    for spec in specs:
        rows.setdefault((spec.kind, spec.reason), []).append(spec)
    lines = [f"{'goes to':<16}{'params':>7}{'matrices':>9}{'numbers':>15}  why (example)"]
    word = {"matrix": "orthogonalized", "scalar": "AdamW", "frozen": "not trained", "skew": "Adam"}
    for (kind, reason), group in sorted(rows.items(), key=lambda row: row[0][0]):
        numel = sum(torch.Size(spec.shape).numel() for spec in group)
        matrices = sum(len(spec.matrices) for spec in group)
        example = f"{reason} ({group[0].name} {list(group[0].shape)})"
        lines.append(f"{word[kind]:<16}{len(group):>7}{matrices:>9}{numel:>15,}  {example}")
    return "\n".join(lines)


def show(specs: Sequence[ParamSpec]) -> None:
    """Log the table on the job's first rank."""
    if collectives.is_first():
        logger.info("which parameters are matrices\n%s", table(specs))

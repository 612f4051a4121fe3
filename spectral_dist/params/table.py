"""The table of which parameters are matrices, and why the others are not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from spectral_dist.params.spec import ParamSpec
from spectral_dist.sharding import collectives


def table(routes: Sequence[ParamSpec]) -> str:
    """Which parameters are matrices, and why the others are not, as text."""
    rows: dict[tuple[str, str], list[ParamSpec]] = {}
    for route in routes:
        rows.setdefault((route.kind, route.reason), []).append(route)
    lines = [f"{'goes to':<16}{'params':>7}{'matrices':>9}{'numbers':>15}  why (example)"]
    word = {"matrix": "orthogonalized", "scalar": "AdamW", "frozen": "not trained", "skew": "Adam"}
    for (kind, reason), found in sorted(rows.items(), key=lambda row: row[0][0]):
        numbers = sum(torch.Size(route.shape).numel() for route in found)
        count = sum(len(route.matrices) for route in found)
        example = f"{reason} ({found[0].name} {list(found[0].shape)})"
        lines.append(f"{word[kind]:<16}{len(found):>7}{count:>9}{numbers:>15,}  {example}")
    return "\n".join(lines)


def show(routes: Sequence[ParamSpec]) -> None:
    """Write the table to stderr on the job's first rank."""
    if collectives.is_first():
        sys.stderr.write(f"spectral_dist: which parameters are matrices\n{table(routes)}\n")

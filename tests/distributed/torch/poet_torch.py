"""The small model, converted, laid out and trained; called through the harness, or here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import spectral_dist
from spectral_dist import poet
from tests.distributed.torch import layouts
from tests.support.quiet import quiet

STEPS = 8
EVERY = 3
"""Steps between merges: two of them, and two steps beyond."""
SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {},
    "memory": {"variant": "memory"},
    "segments, exact": {"segments": 4, "order": "exact", "block": 2},
    "fully, fast": {"form": "fully_stochastic", "block": 0.5, "blocks": {}},
    "fully, memory": {"form": "fully_stochastic", "block": 9, "blocks": {"unused": (9, 2)},
                      "variant": "memory"},
}  # fmt: skip
# 3 numbers of skew are fewer than 4 ranks; one block of 61; unused never gets a gradient
BLOCKS = {r"layers\.1\.up": (12, 61), r"layers\.1\.down": (61, 8), "unused": (8, 3)}
OPTIONS: dict[str, Any] = {
    "lr": 0.01, "merge_every": EVERY, "weight_decay": 0.1, "scalar_lr": 0.005, "clip_ramp": 2,
}  # fmt: skip


def model(setting: str = "fast", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """Converted, the same on every rank; ``odd``: with the parts of that name."""
    odd = more.pop("odd", True)
    plain = layouts.conditioned(odd=odd).to(dtype)
    blocks = {name: size for name, size in BLOCKS.items() if odd or name != "unused"}
    given = {"block": 8, "blocks": blocks, **SETTINGS[setting], **more}
    if given.get("segments", 1) > 1:  # 61 is prime
        given["blocks"] = {}
        return poet.convert(plain, scalars=[r"layers\.1\.(up|down)", "unused"], **given)
    return poet.convert(plain, **given)


def start(layout: str, *args: Any, options: dict[str, Any] | None = None, **more: Any) -> Any:
    """The model laid out, and its optimizer."""
    placed = layouts.LAYOUTS[layout][0](model(*args, **more))
    with quiet():
        return placed, optimizer_of(placed, options)


def optimizer_of(placed: layouts.Laid, options: dict[str, Any] | None = None) -> Any:
    return spectral_dist.POET(
        spectral_dist.param_groups(placed.model), **{**OPTIONS, **(options or {})}
    )


def steps(
    placed: layouts.Laid, optimizer: Any, first: int, last: int, accumulation: int = 1
) -> list[float]:
    """The mean over this rank's micro-batches of each step's loss."""
    losses = []
    with quiet():
        for step in range(first, last):
            found = placed.backward(step, accumulation)
            placed.clip(0.5 * optimizer.clip_factor())
            optimizer.step()
            losses.append(sum(found) / len(found))
    return losses


def merges(optimizer: Any) -> int:
    (found,) = {layer.merges for layer in optimizer.layers}
    return int(found)


def train(
    layout: str, setting: str, accumulation: int = 1, count: int = STEPS, **more: Any
) -> dict[str, Any]:
    placed, optimizer = start(layout, setting, **more)
    losses = steps(placed, optimizer, 0, count, accumulation)
    return {
        "losses": losses, "parameters": placed.full(), "merges": merges(optimizer),
        "exported": poet.export(placed.model),
    }  # fmt: skip


def largest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Difference."""
    assert found.keys() == wanted.keys()
    return max(float((found[n].double() - wanted[n].double()).abs().max()) for n in wanted)

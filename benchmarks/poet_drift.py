"""How far merges move the singular values of W: by order of the map and dtype of W.

    .venv/bin/python -m benchmarks.poet_drift

400 merges of random rotations into a normalized Gaussian 256 x 128, b = 32, ||Q|| of about 0.08.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spectral_dist import poet
from spectral_dist.poet import cayley, report

SCALE = 0.0072
"""Of the skew parameters' numbers."""


def drift(order: int | str, dtype: torch.dtype, merges: int = 400) -> tuple[float, float]:
    """(max |s / s0 - 1| after all merges, the largest ||Q|| of the first)."""
    model = nn.Sequential(nn.Linear(128, 256, bias=False))
    layer: Any = poet.convert(model, block=32, order=order, init="normalized", matrices=["0"])[0]  # type: ignore[index]
    layer.weight.data = layer.weight.data.to(dtype)
    start = layer.weight.detach().clone()
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for _ in range(merges):
        for rotation in layer.rotations:
            skew = getattr(layer, rotation.skew).data
            skew.copy_(SCALE * torch.randn(skew.shape, generator=generator))
            largest = largest or float(cayley.norms(skew.view(rotation.shape), 32).max())
        layer.merge(layer.weight.data, layer.skews)
    return float(report.drift(start, layer.weight.detach())), largest


def main() -> None:
    """Print a table."""
    print("| order | W in | ||Q|| | max abs(s / s0 - 1) |\n|---|---|--:|--:|")
    for dtype in (torch.float32, torch.bfloat16):
        for order in (3, 4, cayley.EXACT):
            found, norm = drift(order, dtype)
            print(f"| {order} | {str(dtype)[6:]} | {norm:.3f} | {found:.1e} |")


if __name__ == "__main__":
    main()

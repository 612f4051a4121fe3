"""Gradients, optimizer state and traffic of a model of any size, counted on the meta device.

    .venv/bin/python -m benchmarks.poet_numbers configs/models/llama_1b.json --blocks 128,256

For AdamW, Muon and POET, all over all ranks of one replica: numbers that are trained (each has a
gradient), bytes of optimizer state in float32, and what a data-parallel step reduces, in float32
and over AdamW's. Counted after ``poet.convert``; what tests/memory measures of small models is the
same count.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import spectral_dist
from spectral_dist import poet
from spectral_dist.launch import llama

FLOAT = 4


def trained(model: nn.Module) -> dict[str, int]:
    """Numbers by kind: matrix, skew, scalar."""
    with contextlib.redirect_stderr(io.StringIO()):
        groups = spectral_dist.param_groups(model)
    found = dict.fromkeys(("matrix", "skew", "scalar"), 0)
    for group in groups:
        found[group["kind"]] += sum(p.numel() for p in group["params"])
    return found


def rows(path: Path, blocks: list[int]) -> list[tuple[str, int, int]]:
    """(optimizer, numbers trained, numbers of state)."""

    def build() -> nn.Module:
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            return LlamaForCausalLM(llama.load_config(path))  # type: ignore[no-any-return]

    plain = trained(build())
    everything = sum(plain.values())
    found = [("AdamW", everything, 2 * everything)]
    found.append(("Muon", everything, plain["matrix"] + 2 * plain["scalar"]))
    for block in blocks:
        numbers = sum(trained(poet.convert(build(), block=block)).values())
        found.append((f"POET, b {block}", numbers, 2 * numbers))
    return found


def main(
    model: Annotated[Path, typer.Argument(help="LlamaConfig as JSON (configs/models)")],
    blocks: Annotated[str, typer.Option(help="POET's block sizes")] = "64,128,256",
) -> None:
    """Count, and print the table."""
    found = rows(model, [int(block) for block in blocks.split(",")])
    print("| optimizer | trained, M | gradients, GB | state, GB | reduced per step, over AdamW's |")
    print("|---|--:|--:|--:|--:|")
    for name, numbers, state in found:
        cells = f"{numbers / 1e6:.2f} | {numbers * FLOAT / 1e9:.3f} | {state * FLOAT / 1e9:.3f}"
        print(f"| {name} | {cells} | {numbers / found[0][1]:.3f} |")


if __name__ == "__main__":
    typer.run(main)

"""Everything that a step costs on one GPU, measured in one command of about six minutes.

    python -m benchmarks.gpu --json gpu.json --png gpu.png
    python -m benchmarks.gpu --device cpu --tiny

Parts: a the card's ceilings and X X^T; b Newton-Schulz and other polar factors; c host time,
launches and waits of a step on 400 small matrices; d a whole step on Llama 1B's shapes; e a rank's
share of a step over 64 and 512 ranks, whose collectives cost nothing; f POET's layer against
nn.Linear; g a training of Llama 130M. Each has its own time; an error ends a row or a part, and is
told in its place. The JSON file is written after each row.

Times are medians by CUDA events after a warm-up, on random data, inputs taken in turns so that no
cache holds them. ``b`` counts needed multiply-adds only: those of symmetric products half.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import (
    ceilings,
    host_cost,
    llama_step,
    newton_schulz,
    picture,
    poet_layers,
    share_of_a_job,
    training,
)
from benchmarks.gpu.bench import Bench, Part, table

PARTS = (
    Part("a", "the card's ceilings, and X X^T in bf16", 30, ceilings.run),
    Part("b", "Newton-Schulz, 5 steps, and other polar factors", 65, newton_schulz.run),
    Part("c", "a step on 400 matrices of 8 x 8", 45, host_cost.run),
    Part("d", "a step on Llama 1B's shapes", 65, llama_step.run),
    Part("e", "one rank's share of a step on Llama's shapes, FSDP2", 40, share_of_a_job.run),
    Part("f", "POET's layer against nn.Linear", 35, poet_layers.run),
    Part("g", "training Llama 130M in bf16", 110, training.run),
)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    letters = "".join(part.letter for part in PARTS)
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on a CPU")
    parser.add_argument("--parts", default=",".join(letters), help="some of a,b,...")
    parser.add_argument("--json", type=Path, help="what was measured, after each row")
    parser.add_argument("--png", type=Path, help="a picture of it")
    parser.add_argument("--minutes", type=float, default=6, help="for these parts together")
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.parts = sorted(options.parts.split(","))
    unknown = sorted(set(options.parts) - set(letters))
    if unknown:
        parser.error(f"--parts: no part {', '.join(unknown)}; there are {', '.join(letters)}")
    if options.minutes <= 0:
        parser.error(f"--minutes: {options.minutes:g} is no time; it must be above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device here; write --device cpu --tiny")
    return options


def main(given: Sequence[str] | None = None) -> Bench:
    """Measure what is asked for, and print a table of each part."""
    options = arguments(given)
    bench = Bench(torch.device(options.device), options.tiny, options.json)
    if options.go_on:
        bench.go_on()
    begin = time.monotonic()
    usual = sum(part.seconds for part in PARTS if part.letter in options.parts)
    print(", ".join(f"{name} {value}" for name, value in bench.header().items()), flush=True)
    for part in PARTS:
        if part.letter in options.parts:
            bench.run(part, 60 * options.minutes / usual, end=begin + 66 * options.minutes)
            print("\n".join(_lines(bench, part)), flush=True)
            rest = options.parts[options.parts.index(part.letter) + 1 :]
            if rest and not bench.works():
                start_again(options, rest)
    print(f"\n{time.monotonic() - begin:.0f} s in all")
    if options.png:
        picture.draw(bench, options.png)
    return bench


def start_again(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Measure the other parts in a process of its own: this one's device does nothing more."""
    print("the device has failed; going on in a new process", flush=True)
    command = ["-m", "benchmarks.gpu", "--go-on", "--device", options.device]
    command += ["--parts", ",".join(rest), "--minutes", f"{options.minutes:g}"]
    command += ["--tiny"] * options.tiny
    for name in ("json", "png"):
        path = getattr(options, name)
        command += [f"--{name}", str(path)] if path else []
    os.execv(sys.executable, [sys.executable, *command])


def _lines(bench: Bench, part: Part) -> list[str]:
    result = bench.results[part.letter]
    lines = [f"\n## {part.letter}: {part.title} ({result.seconds:.0f} s)\n"]
    if result.rows:
        lines.append(table(result.rows))
    lines += [f"- {note}" for note in result.notes]
    lines += [f"- {line}" for row in result.rows for line in row.get("lines", ())]
    return lines + [f"ERROR {result.error}"] * bool(result.error)


if __name__ == "__main__":
    main()

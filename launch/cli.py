"""Define the command `spectral-dist`: table, estimate, plan, doctor, calibrate and convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from spectral_dist.launch import cost_commands
from spectral_dist.launch.command_errors import print_error

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Run one of the tools of Muon, PolarGrad, ROOT, SUMO and POET for PyTorch."""


@app.command()
def doctor(
    config: Annotated[Path, typer.Option(help="Your DeepSpeed JSON.")],
    model: Annotated[Path, typer.Option(help="A LlamaConfig JSON, as in configs/models.")],
    full: Annotated[bool, typer.Option("--full", help="Do not shrink the model.")] = False,
) -> None:
    """Take a few steps on your own config, on 2 ranks here, and check each silent failure."""
    from spectral_dist.launch import deepspeed_config, llama
    from spectral_dist.launch import doctor as checks

    console = Console()
    try:
        fields = deepspeed_config.load(config)
        small, note = llama.shrink(llama.load_config(model), full)
        results = checks.examine(fields, small)
    except ValueError as error:
        print_error("doctor", error)
        raise typer.Exit(2) from None
    table = Table("check", "", "seen", title=f"{config}: {note}")
    for result in results:
        mark = "[green]ok[/]" if result.passed else "[red]FAILED[/]"
        table.add_row(result.check, mark, result.seen)
    console.print(table)
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


@app.command()
def table(
    model: Annotated[Path, typer.Option(help="A causal language model's config.json.")],
    matrices: Annotated[
        list[str] | None, typer.Option(help="A name or pattern to orthogonalize as well.")
    ] = None,
    scalars: Annotated[
        list[str] | None, typer.Option(help="A name or pattern to leave to AdamW.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="A fused weight and its parts, as qkv_proj=3.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="auto: a matrix for each head of q, k and v.")
    ] = None,
) -> None:
    """Print which parameters of a model are matrices, and why the others are not.

    The model is any that transformers can build; no memory is taken for its weights.
    """
    from spectral_dist.launch import llama
    from spectral_dist.params.classify import classify
    from spectral_dist.params.table import table as routing_table

    try:
        specs = classify(
            llama.build_empty(model),
            matrices=matrices or [],
            scalars=scalars or [],
            split=dict(_split_of(text) for text in split or []),
            heads=heads,
        )
    except ValueError as error:
        print_error("table", error)
        raise typer.Exit(2) from None
    typer.echo(routing_table(specs))


def _split_of(text: str) -> tuple[str, int]:
    """Return a pattern and its number of parts.

    Raises:
        ValueError: the text is not of the form NAME=PARTS.
    """
    name, separator, parts = text.partition("=")
    if not (name and separator and parts.isdecimal()):
        raise ValueError(f"--split {text!r}: write a name and a number, as qkv_proj=3")
    return name, int(parts)


app.command()(cost_commands.estimate)
app.command()(cost_commands.plan)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The JSON to write, for ROOT's coefficients.")],
    model: Annotated[
        Path | None, typer.Option(help="A LlamaConfig JSON: the shapes of its matrices.")
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Another shape, as 512x2048.")] = None,
    spectra: Annotated[
        list[Path] | None, typer.Option(help="What calibrate.Recorder saved in a training run.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Newton-Schulz steps to fit.")] = 5,
) -> None:
    """Fit ROOT's Newton-Schulz coefficients to the shapes of a model's matrices."""
    from spectral_dist import calibrate as calibration

    try:
        counts = {calibration.parse_shape(text): 0 for text in shape or []}
        counts |= _matrix_shapes(model) if model else {}
        if not counts:
            raise ValueError("no shape to calibrate; give --model, or --shape 512x2048")
        captured = calibration.read_spectra(spectra or [])
        if captured and not set(captured) & set(counts):
            shapes = ", ".join(calibration.key(s) for s in captured)
            raise ValueError(f"the spectra are of {shapes}: none of the shapes asked for")
        headings = ("shape", "no.", "a, b, c", "error", "jordan", "published", "spectra")
        table = Table(*headings, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits into 80 columns
        fits = {}
        for size in sorted(counts):
            fitted = calibration.calibrate(size, captured.get(size), steps)
            fits[size] = fitted
            table.add_row(
                calibration.key(size),
                str(counts[size] or "-"),
                "{:.4f} {:.4f} {:.4f}".format(*fitted.row),
                f"{fitted.error:.4f}",
                f"{fitted.jordan:.4f}",
                calibration.published_error(size, captured.get(size), steps),
                str(fitted.spectra or "none"),
            )
        calibration.write(out, fits, steps)
    except ValueError as error:
        print_error("calibrate", error)
        raise typer.Exit(2) from None
    table.title = f"{out}: relative error to the exact polar factor after {steps} steps"
    notes = []
    if not captured:
        notes.append("random matrices alone: real momentum may fare worse than with jordan;\n"
                     "--spectra takes what calibrate.Recorder has seen of it")  # fmt: skip
    if any("*" in str(cell) for cell in table.columns[5].cells):
        notes.append("* unstable: not to be used")
    table.caption = "\n".join(notes)
    Console().print(table)


def _matrix_shapes(model: Path) -> dict[tuple[int, int], int]:
    """Return how many matrices of each shape, (short side, long side), a model has.

    Args:
        model: a LlamaConfig JSON.

    Raises:
        ValueError: the file cannot be read, or is wrong.
    """
    import torch

    from spectral_dist.launch import llama
    from spectral_dist.params.classify import classify

    config = llama.load_config(model)
    with torch.device("meta"):
        specs = classify(llama.build(config, seed=0))
    counts: dict[tuple[int, int], int] = {}
    for matrix in (matrix for spec in specs for matrix in spec.matrices):
        size = (min(matrix.shape), max(matrix.shape))
        counts[size] = counts.get(size, 0) + 1
    return counts


@app.command()
def convert(
    from_format: Annotated[str, typer.Argument(help="dcp, universal, torch or dion.")],
    source: Annotated[Path, typer.Argument(help="The checkpoint: a folder or file.")],
    to_format: Annotated[str, typer.Argument(help="dcp, universal, torch or dion.")],
    target: Annotated[Path, typer.Argument(help="What to write; it must not exist.")],
) -> None:
    """Turn a checkpoint into another framework's; see spectral_dist.checkpoint.convert.

    All are read as plain data: code in a file is not run, and a file that needs it is refused.
    """
    from spectral_dist.checkpoint import convert as conversion

    try:
        run = conversion.convert(from_format, source, to_format, target)
    except ValueError as error:
        print_error("convert", error)
        raise typer.Exit(1) from None
    counts = [len(run.names(kind)) for kind in ("matrix", "scalar")]
    note = f"{target}: {counts[0]} parameters of matrices and {counts[1]} of AdamW"
    Console().print(note, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()

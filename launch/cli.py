"""Define the command `spectral-dist`: table, estimate, plan, doctor, calibrate and convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from spectral_dist._error_help import with_page

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Run one of the tools of Muon, PolarGrad, ROOT, SUMO and POET for PyTorch."""


def _print_error(command: str, error: ValueError) -> None:
    """Print what is wrong in one line, and where the docs say more."""
    text = " ".join(f"spectral-dist {command}: {with_page(str(error))}".split())
    Console(stderr=True).print(text, style="red", markup=False, soft_wrap=True)


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
        _print_error("doctor", error)
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
        _print_error("table", error)
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


@app.command()
def estimate(
    model: Annotated[Path, typer.Option(help="A causal language model's config.json.")],
    engine: Annotated[str, typer.Option(help="ddp, fsdp, hsdp, zero0 to zero3, or megatron.")],
    optimizer: Annotated[str, typer.Option(help="Its name, as muon.")] = "muon",
    option: Annotated[
        list[str] | None, typer.Option(help="One of the optimizer's, as momentum=0.9.")
    ] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks.")] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks (fsdp, hsdp, megatron).")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages (megatron).")] = 1,
    ep: Annotated[int, typer.Option(help="Expert-parallel ranks (megatron).")] = 1,
    etp: Annotated[
        int | None, typer.Option(help="Tensor-parallel ranks of experts (megatron); else tp.")
    ] = None,
    distributed_optimizer: Annotated[
        bool, typer.Option("--distributed-optimizer", help="Megatron's.")
    ] = False,
    ddp_bucket_size: Annotated[
        int | None, typer.Option(help="Megatron's, with overlap_grad_reduce; else leave it out.")
    ] = None,
    transformer_impl: Annotated[
        str, typer.Option(help="Megatron's layers: transformer_engine or local.")
    ] = "transformer_engine",
    moe_grouped_gemm: Annotated[
        bool, typer.Option("--moe-grouped-gemm", help="Megatron's, for experts.")
    ] = False,
    nodes: Annotated[int, typer.Option(help="Nodes; HSDP has a copy on each.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(help="In place of --dp.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of parameters: float32; DeepSpeed, Megatron: bfloat16.")
    ] = None,
    sub_group_size: Annotated[
        int, typer.Option(help="zero_optimization.sub_group_size, of ZeRO-3.")
    ] = 10**9,
    as_json: Annotated[bool, typer.Option("--json", help="Print exact numbers as JSON.")] = False,
) -> None:
    """Print what each rank of a job would keep, send and compute; nothing is run.

    The model is any that transformers can build; no memory is taken for its weights.
    """
    from spectral_dist.estimate import Job
    from spectral_dist.launch import estimates, llama

    try:
        job = Job.from_user(
            engine, dp=dp, tp=tp, pp=pp, ep=ep, nodes=nodes, gpus_per_node=gpus_per_node,
            dtype=dtype, sub_group=sub_group_size, distributed_optimizer=distributed_optimizer,
            ddp_bucket_size=ddp_bucket_size, transformer_impl=transformer_impl,
            moe_grouped_gemm=moe_grouped_gemm, etp=etp,
        )  # fmt: skip
        result = estimates.estimate_of(llama.build_empty(model), job, optimizer, option or [])
    except ValueError as error:
        _print_error("estimate", error)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1))
        return
    billions = sum(result.numbers.values()) / 1e9
    title = f"{model.stem}, {billions:.2f}e9 parameters; {optimizer}, {engine}, {job.ranks} ranks"
    Console().print(estimates.table_of(result, title))


@app.command()
def plan(
    model: Annotated[Path, typer.Option(help="A causal language model's config.json.")],
    engine: Annotated[str, typer.Option(help="ddp, fsdp, hsdp, or zero0 to zero3.")],
    machine: Annotated[
        str, typer.Option(help="One of configs/machines, or a JSON of your own.")
    ] = "h100-nvlink-ib",
    optimizer: Annotated[
        list[str] | None, typer.Option(help="One that is compared; muon without any.")
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="One that is compared: owner, gram, split, auto.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="One of the optimizers', as momentum=0.9.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Of a training step, of all ranks: adds the share of it.")
    ] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks.")] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks (fsdp and hsdp).")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes; HSDP has a copy on each.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(help="In place of --dp.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of parameters: float32; with DeepSpeed bfloat16.")
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="Print a line for each matrix.")] = False,
    picture: Annotated[Path | None, typer.Option(help="A PNG of load and bytes by rank.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exact numbers as JSON.")] = False,
) -> None:
    """Print where each matrix would be orthogonalized, why, and how long a step would take.

    Nothing is run. Optimizers and strategies are compared; matrices are those of the first.
    """
    from spectral_dist.estimate import Job
    from spectral_dist.launch import llama, machines, plans

    try:
        speeds = machines.load(machine)
        job = Job.from_user(
            engine, dp=dp, tp=tp, nodes=nodes, gpus_per_node=gpus_per_node, dtype=dtype
        )
        empty = llama.build_empty(model)
        training = plans.seconds_of_training(empty, job, speeds, tokens)
        chosen = strategy or ["owner", "auto", "split"]
        results = plans.compare(empty, job, speeds, optimizer or ["muon"], chosen, option or [])
        if picture is not None:
            plans.draw(results, picture)
    except ValueError as error:
        _print_error("plan", error)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(plans.to_json(results, training, each), indent=1))
        return
    console = Console()
    console.print(f"{model.stem}; {engine}, {job.ranks} ranks; {machine}", highlight=False)
    console.print(plans.comparison(results, training))
    for line in plans.refusals(results):
        console.print(line, highlight=False, soft_wrap=True)
    first = next(r for r in results if r.prediction is not None)
    assert first.prediction is not None
    console.print(f"Matrices by {first.optimizer}, {first.strategy}:", highlight=False)
    console.print(plans.matrices(first.prediction, each))


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
        _print_error("calibrate", error)
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
        _print_error("convert", error)
        raise typer.Exit(1) from None
    counts = [len(run.names(kind)) for kind in ("matrix", "scalar")]
    note = f"{target}: {counts[0]} parameters of matrices and {counts[1]} of AdamW"
    Console().print(note, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()

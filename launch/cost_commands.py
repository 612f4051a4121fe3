"""Define `spectral-dist estimate` and `spectral-dist plan`: what a job would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from spectral_dist.launch.command_errors import print_error

Model = Annotated[Path, typer.Option(help="A causal language model's config.json.")]
Engine = Annotated[str, typer.Option(help="ddp, fsdp, hsdp, zero0 to zero3, or megatron.")]
Data = Annotated[int | None, typer.Option(help="Data-parallel ranks.")]
Tensors = Annotated[int, typer.Option(help="Tensor-parallel ranks (fsdp, hsdp, megatron).")]
Pipeline = Annotated[int, typer.Option(help="Pipeline stages (megatron).")]
Experts = Annotated[int, typer.Option(help="Expert-parallel ranks (megatron).")]
ExpertTensors = Annotated[
    int | None, typer.Option(help="Tensor-parallel ranks of experts (megatron); else tp.")
]
Distributed = Annotated[bool, typer.Option("--distributed-optimizer", help="Megatron's.")]
BucketSize = Annotated[
    int | None, typer.Option(help="Megatron's, with overlap_grad_reduce; else leave it out.")
]
Layers = Annotated[str, typer.Option(help="Megatron's layers: transformer_engine or local.")]
Grouped = Annotated[bool, typer.Option("--moe-grouped-gemm", help="Megatron's, for experts.")]
Nodes = Annotated[int, typer.Option(help="Nodes; HSDP has a copy on each.")]
PerNode = Annotated[int | None, typer.Option(help="In place of --dp.")]
Dtype = Annotated[
    str | None, typer.Option(help="Of parameters: float32; DeepSpeed, Megatron: bfloat16.")
]
SubGroup = Annotated[int, typer.Option(help="zero_optimization.sub_group_size, of ZeRO-3.")]
Json = Annotated[bool, typer.Option("--json", help="Print exact numbers as JSON.")]


def estimate(
    model: Model,
    engine: Engine,
    optimizer: Annotated[str, typer.Option(help="Its name, as muon.")] = "muon",
    option: Annotated[
        list[str] | None, typer.Option(help="One of the optimizer's, as momentum=0.9.")
    ] = None,
    dp: Data = None,
    tp: Tensors = 1,
    pp: Pipeline = 1,
    ep: Experts = 1,
    etp: ExpertTensors = None,
    distributed_optimizer: Distributed = False,
    ddp_bucket_size: BucketSize = None,
    transformer_impl: Layers = "transformer_engine",
    moe_grouped_gemm: Grouped = False,
    nodes: Nodes = 1,
    gpus_per_node: PerNode = None,
    dtype: Dtype = None,
    sub_group_size: SubGroup = 10**9,
    as_json: Json = False,
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
        print_error("estimate", error)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1))
        return
    billions = sum(result.numbers.values()) / 1e9
    title = f"{model.stem}, {billions:.2f}e9 parameters; {optimizer}, {engine}, {job.ranks} ranks"
    Console().print(estimates.table_of(result, title))


def plan(
    model: Model,
    engine: Engine,
    machine: Annotated[
        str, typer.Option(help="One of configs/machines, or a JSON of your own.")
    ] = "h100-nvlink-ib",
    optimizer: Annotated[
        list[str] | None, typer.Option(help="One that is compared; muon without any.")
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="One that is compared: owner, auto, split, gram.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="One of the optimizers', as momentum=0.9.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of a training step, of all ranks: adds the share of it."),
    ] = None,
    dp: Data = None,
    tp: Tensors = 1,
    pp: Pipeline = 1,
    ep: Experts = 1,
    etp: ExpertTensors = None,
    distributed_optimizer: Distributed = False,
    ddp_bucket_size: BucketSize = None,
    transformer_impl: Layers = "transformer_engine",
    moe_grouped_gemm: Grouped = False,
    nodes: Nodes = 1,
    gpus_per_node: PerNode = None,
    dtype: Dtype = None,
    sub_group_size: SubGroup = 10**9,
    each: Annotated[bool, typer.Option("--each", help="Print a line for each matrix.")] = False,
    picture: Annotated[Path | None, typer.Option(help="A PNG of load and bytes by rank.")] = None,
    as_json: Json = False,
) -> None:
    """Print where each matrix would be orthogonalized, why, and how long a step would take.

    Nothing is run. Optimizers and strategies are compared; matrices are those of the first.
    """
    from spectral_dist.estimate import Job
    from spectral_dist.estimate.prediction import training_seconds
    from spectral_dist.launch import llama, machines, plans

    try:
        speeds = machines.load(machine)
        job = Job.from_user(
            engine, dp=dp, tp=tp, pp=pp, ep=ep, nodes=nodes, gpus_per_node=gpus_per_node,
            dtype=dtype, sub_group=sub_group_size, distributed_optimizer=distributed_optimizer,
            ddp_bucket_size=ddp_bucket_size, transformer_impl=transformer_impl,
            moe_grouped_gemm=moe_grouped_gemm, etp=etp,
        )  # fmt: skip
        empty = llama.build_empty(model)
        training = None if tokens is None else training_seconds(empty, job, speeds, tokens)
        chosen = strategy or ["owner", "auto", "split"]
        results = plans.compare(empty, job, speeds, optimizer or ["muon"], chosen, option or [])
        if picture is not None:
            plans.draw(results, picture)
    except ValueError as error:
        print_error("plan", error)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(plans.to_json(results, training, each), indent=1))
        return
    console = Console()
    console.print(f"{model.stem}; {engine}, {job.ranks} ranks; {machine}", highlight=False)
    console.print(plans.comparison(results, training))
    for line in plans.refusals(results):
        console.print(line, highlight=False, soft_wrap=True)
    first = next(result for result in results if result.prediction is not None)
    assert first.prediction is not None
    console.print(f"Matrices by {first.optimizer}, {first.strategy}:", highlight=False)
    console.print(plans.matrices(first.prediction, each))

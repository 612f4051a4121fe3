"""Pretrain a Llama with DeepSpeed or plain torch, on text found here or given.

torchrun --standalone --nproc_per_node 2 launch/pretrain.py \
    --model configs/models/quickstart.json --config configs/deepspeed/zero2.json
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import BadParameter, Option

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class EngineName(StrEnum):
    """Who drives the optimizer."""

    deepspeed = "deepspeed"
    torch = "torch"


class OptimizerName(StrEnum):
    """The torch engine's optimizers."""

    muon = "muon"
    adamw = "adamw"


TORCH_DEFAULTS: dict[str, Any] = {
    "optimizer": OptimizerName.muon,
    "lr": 3e-3,
    "momentum": 0.95,
    "weight_decay": 0.1,
    "clip": 1.0,
    "batch": 16,
    "micro_batch": None,  # batch / ranks
    "warmup": None,  # steps / 10
}
TORCH = "--engine torch"


@app.command()
def main(
    model: Annotated[Path, Option(help="LlamaConfig as JSON (configs/models)")],
    engine: Annotated[EngineName, Option()] = EngineName.deepspeed,
    config: Annotated[Path | None, Option(help="DeepSpeed JSON (configs/deepspeed)")] = None,
    data: Annotated[
        list[Path] | None,
        Option(help=".txt or .jsonl file or a folder of them; default: Python source found here"),
    ] = None,
    steps: Annotated[
        int | None, Option(min=1, help="default: total_num_steps of the JSON's scheduler")
    ] = None,
    seq_len: Annotated[int, Option(min=1)] = 256,
    seed: Annotated[int, Option(min=0)] = 0,
    eval_every: Annotated[int, Option(min=0, help="steps; 0: at the start and the end only")] = 50,
    eval_batches: Annotated[int, Option(min=1, help="of the training batch's size")] = 8,
    save_every: Annotated[int, Option(min=0, help="steps; 0: at the end only")] = 0,
    stop_at: Annotated[
        int, Option(min=0, help="save and end early at this step, for --resume to go on")
    ] = 0,
    out: Annotated[Path | None, Option(help="default: runs/MODEL-CONFIG")] = None,
    resume: Annotated[bool, Option("--resume", help="go on from the checkpoint in --out")] = False,
    prompt: Annotated[str, Option(help="what the sample at the end continues")] = "def ",
    zero_init: Annotated[
        bool, Option("--zero-init", help="ZeRO-3: build the model in shards")
    ] = False,
    optimizer: Annotated[OptimizerName | None, Option(rich_help_panel=TORCH)] = None,
    lr: Annotated[float | None, Option(min=0, rich_help_panel=TORCH)] = None,
    momentum: Annotated[float | None, Option(min=0, max=1, rich_help_panel=TORCH)] = None,
    weight_decay: Annotated[float | None, Option(min=0, rich_help_panel=TORCH)] = None,
    clip: Annotated[float | None, Option(min=0, rich_help_panel=TORCH)] = None,
    batch: Annotated[int | None, Option(min=1, rich_help_panel=TORCH)] = None,
    micro_batch: Annotated[int | None, Option(min=1, rich_help_panel=TORCH)] = None,
    warmup: Annotated[int | None, Option(min=0, rich_help_panel=TORCH)] = None,
    local_rank: Annotated[int | None, Option("--local_rank", hidden=True)] = None,
) -> None:
    """Pretrain a Llama, alone or under torchrun, deepspeed or mpirun."""
    # --local_rank is what the deepspeed launcher adds; the environment says the same.
    options = dict(locals())
    given = {name: options[name] for name in TORCH_DEFAULTS if options[name] is not None}
    if engine is EngineName.torch:
        if config is not None or zero_init:
            raise BadParameter("--config and --zero-init belong to --engine deepspeed")
        name = given.get("optimizer", TORCH_DEFAULTS["optimizer"])
    else:
        if config is None:
            raise BadParameter("--engine deepspeed needs --config (configs/deepspeed/*.json)")
        if given:
            said = ", ".join("--" + option.replace("_", "-") for option in given)
            raise BadParameter(f"{said}: with --engine deepspeed {config} says it")
        name = config.stem
    options["out"] = out or Path("runs") / f"{model.stem}-{name}"
    if not resume and (options["out"] / "metrics.jsonl").exists():
        raise BadParameter(f"{options['out']} holds a run: pass --resume or another --out")
    options["steps"] = steps or scheduled_steps(config)
    _run(options, TORCH_DEFAULTS | given)


def scheduled_steps(config: Path | None) -> int:
    """total_num_steps of a DeepSpeed JSON's scheduler."""
    from spectral_dist.launch.engines import read_deepspeed_config

    fields = read_deepspeed_config(config) if config else {}
    total = fields.get("scheduler", {}).get("params", {}).get("total_num_steps")
    if not isinstance(total, int):
        raise BadParameter(f"--steps is needed: {config or TORCH} has no total_num_steps")
    return total


def _run(options: dict[str, Any], torch_options: dict[str, Any]) -> None:
    import torch

    from spectral_dist.launch import corpus, llama, ranks, report, trainer

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _ranks_here()))
    torch.manual_seed(options["seed"])
    try:
        config = llama.load_config(options["model"])
        most, asked = config.max_position_embeddings, options["seq_len"]
        if asked > most:
            raise ValueError(f"--seq-len {asked}: the model's max_position_embeddings are {most}")
        here = ranks.start()
        text = here.once_per_node(lambda: corpus.load(options["data"] or [], config.vocab_size))
        engine = _engine(options, torch_options, config, here)
        job = trainer.Job(**{name: options[name] for name in trainer.Job.__dataclass_fields__})
        run = trainer.Trainer(job, engine, text, here)
        if options["resume"]:
            run.resume()
    except ValueError as error:  # about what was asked for; later ones are bugs
        typer.echo(f"pretrain: error: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        summary = run.run()
        if here.first:
            trainer.write_summary(job.out, summary)
            report.show([job.out], job.out / "loss.png")
    finally:
        ranks.stop()


def _ranks_here() -> int:
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def _engine(options: dict[str, Any], torch_options: dict[str, Any], config: Any, here: Any) -> Any:
    from spectral_dist.launch import engines

    if options["engine"] is EngineName.deepspeed:
        return engines.DeepSpeedEngine(
            options["config"], config, options["seed"], here, options["zero_init"]
        )
    steps, batch = options["steps"], torch_options["batch"]
    micro, warmup = torch_options["micro_batch"], torch_options["warmup"]
    chosen = engines.TorchOptions(
        optimizer=torch_options["optimizer"].value,
        lr=torch_options["lr"],
        momentum=torch_options["momentum"],
        weight_decay=torch_options["weight_decay"],
        clip=torch_options["clip"],
        batch=batch,
        micro=max(1, batch // here.world) if micro is None else micro,
        warmup=steps // 10 if warmup is None else warmup,
        steps=steps,
    )
    return engines.TorchEngine(chosen, config, options["seed"], here)


if __name__ == "__main__":
    app()

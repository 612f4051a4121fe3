"""Pretrain a Llama with DeepSpeed, plain torch or Megatron-core, on text found here or given.

torchrun --standalone --nproc_per_node 2 launch/pretrain.py \
    --model configs/models/quickstart.json --config configs/deepspeed/zero2.json
torchrun --standalone --nproc_per_node 2 launch/pretrain.py --engine fsdp \
    --model configs/models/quickstart.json --optimizer poet
torchrun --standalone --nproc_per_node 4 launch/pretrain.py --engine megatron \
    --model configs/models/tiny.json --config configs/megatron/tiny_muon.yaml
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import BadParameter, Option

if TYPE_CHECKING:
    from spectral_dist.launch import trainer, yaml_config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class EngineName(StrEnum):
    """Who drives the optimizer."""

    deepspeed = "deepspeed"
    ddp = "ddp"
    fsdp = "fsdp"
    megatron = "megatron"


@app.command()
def main(
    model: Annotated[Path, Option(help="LlamaConfig as JSON (configs/models)")],
    config: Annotated[
        Path | None,
        Option(
            help="deepspeed: JSON (configs/deepspeed); ddp, fsdp: YAML (configs/torch); megatron:"
            " YAML (configs/megatron)"
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        Option(
            help="in place of --config: muon, adamw or another's name, as shipped for the engine"
        ),
    ] = None,
    engine: Annotated[EngineName, Option()] = EngineName.deepspeed,
    data: Annotated[
        list[Path] | None,
        Option(help=".txt or .jsonl file or a folder of them; default: Python source found here"),
    ] = None,
    steps: Annotated[
        int | None,
        Option(min=1, help="deepspeed; default: total_num_steps of the JSON's scheduler"),
    ] = None,
    seq_len: Annotated[int, Option(min=1)] = 256,
    seed: Annotated[int, Option(min=0)] = 0,
    eval_every: Annotated[int, Option(min=0, help="steps; 0: at the start and the end only")] = 50,
    eval_batches: Annotated[int, Option(min=1, help="of the training batch's size")] = 8,
    save_every: Annotated[
        int | None,
        Option(min=0, help="steps; 0: at the end only; default: the YAML's save_every, or 0"),
    ] = None,
    stop_at: Annotated[
        int, Option(min=0, help="save and end early at this step, for --resume to go on")
    ] = 0,
    out: Annotated[Path | None, Option(help="default: runs/MODEL-CONFIG")] = None,
    resume: Annotated[bool, Option("--resume", help="go on from the checkpoint in --out")] = False,
    prompt: Annotated[str, Option(help="what the sample at the end continues")] = "def ",
    zero_init: Annotated[
        bool, Option("--zero-init", help="ZeRO-3: build the model in shards")
    ] = False,
    local_rank: Annotated[int | None, Option("--local_rank", hidden=True)] = None,
) -> None:
    """Pretrain a Llama, alone or under torchrun, deepspeed or mpirun."""
    # --local_rank is what the deepspeed launcher adds; the environment says the same.
    if (config is None) == (optimizer is None):
        wrong = "both are given" if config else "neither is given"
        raise BadParameter(f"{wrong}: write either --config FILE or --optimizer NAME")
    if config is None:
        from spectral_dist.launch import shipped

        try:
            config = shipped.config_of(engine.value, str(optimizer))
        except ValueError as error:
            raise BadParameter(str(error)) from None
    options = dict(locals())
    if engine is not EngineName.deepspeed:
        for flag, given in (("--steps", steps is not None), ("--zero-init", zero_init)):
            if given:
                raise BadParameter(f"{flag} belongs to --engine deepspeed; here {config} says all")
    options["out"] = out or Path("runs") / f"{model.stem}-{config.stem}"
    if not resume and (options["out"] / "metrics.jsonl").exists():
        raise BadParameter(f"{options['out']} holds a run: pass --resume or another --out")
    try:
        if engine is EngineName.deepspeed:
            options["steps"] = steps or scheduled_steps(config)
            options["save_every"] = save_every or 0
        else:
            options["settings"] = settings = read_settings(engine, config)
            options["steps"] = settings.steps
            if save_every is None:
                options["save_every"] = settings.save_every
        run = _prepare(options)
    except ValueError as error:  # about what was asked for; later ones are bugs
        typer.echo(f"pretrain: error: {error}", err=True)
        raise typer.Exit(2) from None
    _run(run)


def read_settings(engine: EngineName, config: Path) -> yaml_config.RunConfig:
    """The YAML of an engine that has one. ValueError: not for it, or not on this machine."""
    if engine is EngineName.megatron:
        from spectral_dist.launch import megatron_config

        settings = megatron_config.read(config)
        megatron_config.prepare()
        return settings
    from spectral_dist.launch import torch_config

    found = torch_config.read(config)
    found.check_engine(engine.value)
    return found


def scheduled_steps(config: Path) -> int:
    """total_num_steps of a DeepSpeed JSON's scheduler. ValueError: it has none."""
    from spectral_dist.launch.engines import read_deepspeed_config

    params = read_deepspeed_config(config).get("scheduler", {}).get("params", {})
    total = params.get("total_num_steps")
    if not isinstance(total, int):
        raise ValueError(f"--steps is needed: {config} has no total_num_steps")
    return total


def _prepare(options: dict[str, Any]) -> trainer.Trainer:
    import torch

    from spectral_dist.launch import corpus, llama, ranks, trainer

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _ranks_here()))
    torch.manual_seed(options["seed"])
    config = llama.load_config(options["model"])
    most, asked = config.max_position_embeddings, options["seq_len"]
    if asked > most:
        raise ValueError(f"--seq-len {asked}: the model's max_position_embeddings are {most}")
    here = ranks.start()
    text = here.once_per_node(lambda: corpus.load(options["data"] or [], config.vocab_size))
    engine = _engine(options, config, here)
    job = trainer.Job(**{name: options[name] for name in trainer.Job.__dataclass_fields__})
    run = trainer.Trainer(job, engine, text, here)
    if options["resume"]:
        run.resume()
    return run


def _run(run: trainer.Trainer) -> None:
    from spectral_dist.launch import ranks, report, trainer

    out = run.job.out
    try:
        summary = run.run()
        if run.ranks.first:
            trainer.write_summary(out, summary)
            report.show([out], out / "loss.png")
    finally:
        ranks.stop()


def _ranks_here() -> int:
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def _engine(options: dict[str, Any], config: Any, here: Any) -> Any:
    if options["engine"] is EngineName.deepspeed:
        from spectral_dist.launch.engines import DeepSpeedEngine

        return DeepSpeedEngine(
            options["config"], config, options["seed"], here, options["zero_init"]
        )
    settings, seed = options["settings"], options["seed"]
    if options["engine"] is EngineName.megatron:
        from spectral_dist.launch.megatron_engine import MegatronEngine

        return MegatronEngine(settings, config, seed, here)
    from spectral_dist.launch.torch_engine import TorchEngine

    sharded = options["engine"] is EngineName.fsdp
    return TorchEngine(settings, config, seed, here, sharded=sharded)


if __name__ == "__main__":
    app()

"""Pretrain a Llama with DeepSpeed, plain torch or Megatron-core, on text found here or given.

torchrun --standalone --nproc_per_node 2 launch/pretrain.py \
    --model configs/models/quickstart.json --config configs/deepspeed/zero2.json
torchrun --standalone --nproc_per_node 2 launch/pretrain.py --engine fsdp \
    --model configs/models/quickstart.json --optimizer poet
torchrun --standalone --nproc_per_node 4 launch/pretrain.py --engine megatron \
    --model configs/models/tiny.json --config configs/megatron/tiny_muon.yaml
"""

from __future__ import annotations

import math
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import BadParameter, Option

from spectral_dist.launch.preemption import PREEMPTED, Preemption
from spectral_dist.launch.run_folder import Resume, RunFolder

if TYPE_CHECKING:
    from spectral_dist.launch import ranks, trainer, yaml_config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


PATHS = ("--model", "--config", "--data", "--out")


class Command(typer.core.TyperCommand):
    """`--resume` may stand alone, which Typer has no option for: it is `--resume must` then.

    An empty path, as of a shell's variable that is not set, would be the folder that one is in.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Add the value that is left out. BadParameter: a path is empty."""
        whole: list[str] = []
        for place, argument in enumerate(args):
            option, equals, value = argument.partition("=")
            if option in PATHS and (value if equals else args[place + 1 : place + 2]) in ("", [""]):
                raise BadParameter(f"{option} is empty; write a file or folder")
            whole.append(argument)
            alone = place + 1 == len(args) or args[place + 1].startswith("-")
            if argument == "--resume" and alone:
                whole.append(Resume.must.value)
        return super().parse_args(ctx, whole)


class EngineName(StrEnum):
    """Who drives the optimizer."""

    deepspeed = "deepspeed"
    ddp = "ddp"
    fsdp = "fsdp"
    megatron = "megatron"


@app.command(cls=Command)
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
    seed: Annotated[int, Option(min=0, max=2**32 - 1)] = 0,
    eval_every: Annotated[int, Option(min=0, help="steps; 0: at the start and the end only")] = 50,
    eval_batches: Annotated[int, Option(min=1, help="of the training batch's size")] = 8,
    save_every: Annotated[
        int | None,
        Option(min=0, help="steps; 0: at the end only; default: the YAML's save_every, or 0"),
    ] = None,
    save_minutes: Annotated[
        float, Option(min=0.0, help="save as well when so long has passed; 0: never")
    ] = 30.0,
    keep: Annotated[int, Option(min=0, help="the newest N checkpoints; 0: all")] = 0,
    grace: Annotated[
        float,
        Option(
            min=1.0,
            help="seconds to save in after SIGTERM, SIGINT or SIGUSR1; torchrun waits for 30,"
            " or TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        ),
    ] = 25.0,
    stop_at: Annotated[
        int, Option(min=0, help="save and end early at this step, for --resume to go on")
    ] = 0,
    out: Annotated[Path | None, Option(help="default: runs/MODEL-CONFIG")] = None,
    resume: Annotated[
        Resume,
        Option(
            help="go on from the newest whole checkpoint in --out; auto: or begin, if there is none"
        ),
    ] = Resume.never,
    prompt: Annotated[str, Option(help="what the sample at the end continues")] = "def ",
    zero_init: Annotated[
        bool, Option("--zero-init", help="ZeRO-3: build the model in shards")
    ] = False,
    local_rank: Annotated[int | None, Option("--local_rank", hidden=True)] = None,
) -> None:
    """Pretrain a Llama, alone or under torchrun, deepspeed or mpirun.

    Exit status: 0, trained; 1, it failed; 2, something asked for is wrong; 75, ended by a signal
    with all steps saved; 128 + a signal's number, ended by it without.
    """
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
    for flag, number in (("--save-minutes", save_minutes), ("--grace", grace)):
        if not math.isfinite(number):
            raise BadParameter(f"{flag} is {number}: write a number of them")
    if engine is not EngineName.deepspeed:
        for flag, given in (("--steps", steps is not None), ("--zero-init", zero_init)):
            if given:
                raise BadParameter(f"{flag} belongs to --engine deepspeed; here {config} says all")
    options["out"] = out or Path("runs") / f"{model.stem}-{config.stem}"
    folder = RunFolder(options["out"], resume)
    try:
        status = _run(_prepare_or_exit(options, folder), grace)
    finally:
        folder.close()
    raise typer.Exit(status)


def _prepare_or_exit(options: dict[str, Any], folder: RunFolder) -> trainer.Trainer:
    """A run that is ready, or the error of what was asked for; later ones are bugs."""
    engine, config, steps = options["engine"], options["config"], options["steps"]
    try:
        if engine is EngineName.deepspeed:
            from spectral_dist.launch import deepspeed_config

            options["steps"] = steps or deepspeed_config.scheduled_steps(config)
            options["save_every"] = options["save_every"] or 0
        else:
            options["settings"] = settings = read_settings(engine, config)
            options["steps"] = settings.steps
            if options["save_every"] is None:
                options["save_every"] = settings.save_every
        return _prepare(options, folder)
    except ValueError as error:
        typer.echo(f"pretrain: error: {error}", err=True)
        raise typer.Exit(2) from None


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


def _prepare(options: dict[str, Any], folder: RunFolder) -> trainer.Trainer:
    import torch

    from spectral_dist.launch import llama, ranks, trainer

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _ranks_here()))
    torch.manual_seed(options["seed"])
    config = llama.load_config(options["model"])
    most, asked = config.max_position_embeddings, options["seq_len"]
    if asked > most:
        raise ValueError(f"--seq-len {asked}: the model's max_position_embeddings are {most}")
    here = ranks.start()
    checkpoint, notes = here.on_first(folder.open)
    if here.first:
        for note in notes:
            typer.echo(f"pretrain: {note}", err=True)
    text = _corpus(options["data"] or [], config.vocab_size, here)
    engine = _engine(options, config, here)
    job = trainer.Job(**{name: options[name] for name in trainer.Job.__dataclass_fields__})
    run = trainer.Trainer(job, engine, text, here)
    if checkpoint is not None:
        run.resume(checkpoint)
    return run


def _corpus(data: list[Path], vocab_size: int, here: ranks.Ranks) -> Any:
    """The text, tokenized by one rank of each node; the same text on all nodes."""
    from spectral_dist.launch import corpus

    keys = here.once_per_node(lambda: corpus.prepare(data, vocab_size))
    if len(set(keys)) > 1:
        raise ValueError(
            "the nodes do not have the same text: give all of them the same --data, and without"
            " --data the same releases of Python and torch"
        )
    texts: list[Any] = []
    here.together(lambda: texts.append(corpus.read(keys[0])))
    return texts[0]


def _run(run: trainer.Trainer, grace: float) -> int:
    """Train, and return the exit status."""
    from spectral_dist.launch import ranks, report, trainer

    out = run.job.out
    with Preemption(grace) as run.preemption:
        try:
            summary = run.run()
            run.preemption.disarm()
            if summary is None:
                if run.ranks.first:
                    typer.echo(
                        f"pretrain: stopped by a signal after step {run.done}, which is saved in"
                        f" {out}; --resume goes on (exit status {PREEMPTED})",
                        err=True,
                    )
                return PREEMPTED
            if run.ranks.first:
                trainer.write_summary(out, summary)
                report.show([out], out / "loss.png")
        except (FloatingPointError, ValueError, OSError) as error:  # gradients, losses, a full disk
            typer.echo(f"pretrain: error: {error}", err=True)
            return 1
        finally:
            # in here: one rank has failed, a launcher signals the others, and they may know why
            ranks.stop()
    return 0


def _ranks_here() -> int:
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def _engine(options: dict[str, Any], config: Any, here: Any) -> Any:
    if options["engine"] is EngineName.deepspeed:
        from spectral_dist.launch.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(
            options["config"], config, options["seed"], here, options["zero_init"]
        )
    settings, seed = options["settings"], options["seed"]
    if options["engine"] is EngineName.megatron:
        from spectral_dist.launch.engines.megatron import MegatronEngine

        return MegatronEngine(settings, config, seed, here)
    from spectral_dist.launch.engines.torch import TorchEngine

    sharded = options["engine"] is EngineName.fsdp
    return TorchEngine(settings, config, seed, here, sharded=sharded)


if __name__ == "__main__":
    app()

"""Pretrain a Llama with DeepSpeed, plain torch or Megatron-core, on your text or a default one.

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

from spectral_dist._error_help import with_page
from spectral_dist.launch.preemption import PREEMPTED, Preemption
from spectral_dist.launch.run_folder import Resume, RunFolder

if TYPE_CHECKING:
    from spectral_dist.launch import ranks, trainer, yaml_config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


PATHS = ("--model", "--config", "--data", "--out")


class Command(typer.core.TyperCommand):
    """The command, with two rules that Typer has no option for.

    `--resume` without a value is `--resume must`. An empty path, as of an unset shell variable, is
    an error: it would mean the current folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Add the value that `--resume` may leave out.

        Raises:
            BadParameter: a path is empty.
        """
        completed: list[str] = []
        for index, argument in enumerate(args):
            option, equals, value = argument.partition("=")
            if option in PATHS and (value if equals else args[index + 1 : index + 2]) in ("", [""]):
                raise BadParameter(f"{option} is empty; write a file or folder")
            completed.append(argument)
            has_no_value = index + 1 == len(args) or args[index + 1].startswith("-")
            if argument == "--resume" and has_no_value:
                completed.append(Resume.must.value)
        return super().parse_args(ctx, completed)


class EngineName(StrEnum):
    """The training framework that drives the optimizer."""

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
        list[str] | None,
        Option(
            help=".txt or .jsonl file or a folder of them; code: the Python source found here (a"
            " folder of that name: ./code); default: botocore's documentation, in English"
        ),
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
    prompt: Annotated[str, Option(help="what the sample at the end continues")] = "To create",
    zero_init: Annotated[
        bool, Option("--zero-init", help="ZeRO-3: build the model in shards")
    ] = False,
    local_rank: Annotated[int | None, Option("--local_rank", hidden=True)] = None,
) -> None:
    """Pretrain a Llama, alone or under torchrun, deepspeed or mpirun.

    Exit status: 0, trained; 1, it failed; 2, something asked for is wrong; 75, ended by a signal
    with all steps saved; 128 + a signal's number, ended by it without.
    """
    # The deepspeed launcher adds --local_rank; LOCAL_RANK in the environment says the same.
    if (config is None) == (optimizer is None):
        problem = "both are given" if config else "neither is given"
        raise BadParameter(f"{problem}: write either --config FILE or --optimizer NAME")
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
        for flag, is_set in (("--steps", steps is not None), ("--zero-init", zero_init)):
            if is_set:
                raise BadParameter(f"{flag} belongs to --engine deepspeed; here {config} says all")
    options["out"] = out or Path("runs") / f"{model.stem}-{config.stem}"
    folder = RunFolder(options["out"], resume)
    try:
        status = _run(_prepare_or_exit(options, folder), grace)
    finally:
        folder.close()
    raise typer.Exit(status)


def _prepare_or_exit(options: dict[str, Any], folder: RunFolder) -> trainer.Trainer:
    """Return a run that is ready, or exit if an option is wrong; later errors are bugs."""
    engine, config, steps = options["engine"], options["config"], options["steps"]
    try:
        if engine is EngineName.deepspeed:
            from spectral_dist.launch import deepspeed_config

            options["steps"] = steps or deepspeed_config.scheduled_steps(config)
            options["save_every"] = options["save_every"] or 0
        else:
            options["run_config"] = run_config = read_run_config(engine, config)
            options["steps"] = run_config.steps
            if options["save_every"] is None:
                options["save_every"] = run_config.save_every
        return _prepare(options, folder)
    except ValueError as error:
        typer.echo(f"pretrain: error: {with_page(str(error))}", err=True)
        raise typer.Exit(2) from None


def read_run_config(engine: EngineName, config: Path) -> yaml_config.RunConfig:
    """Read the YAML of --engine ddp, fsdp or megatron.

    Raises:
        ValueError: it is wrong or for another engine, or this machine cannot run it.
    """
    if engine is EngineName.megatron:
        from spectral_dist.launch import megatron_config

        run_config: yaml_config.RunConfig = megatron_config.read(config)
        megatron_config.prepare()
        return run_config
    from spectral_dist.launch import torch_config

    run_config = torch_config.read(config)
    run_config.check_engine(engine.value)
    return run_config


def _prepare(options: dict[str, Any], folder: RunFolder) -> trainer.Trainer:
    """Start the ranks, and build or restore all that a run needs."""
    import torch

    from spectral_dist.launch import llama, ranks, trainer

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _local_world_size()))
    torch.manual_seed(options["seed"])
    config = llama.load_config(options["model"])
    longest, seq_len = config.max_position_embeddings, options["seq_len"]
    if seq_len > longest:
        raise ValueError(f"--seq-len {seq_len}: the model's max_position_embeddings are {longest}")
    all_ranks = ranks.start()
    checkpoint, notes = all_ranks.on_first(folder.open)
    if all_ranks.first:
        for note in notes:
            typer.echo(f"pretrain: {note}", err=True)
    text = _corpus(options["data"] or [], config.vocab_size, all_ranks)
    engine = _engine(options, config, all_ranks)
    names = trainer.RunSettings.__dataclass_fields__
    settings = trainer.RunSettings(**{name: options[name] for name in names})
    run = trainer.Trainer(settings, engine, text, all_ranks)
    if checkpoint is not None:
        run.resume(checkpoint)
    return run


def _corpus(data: list[str], vocab_size: int, all_ranks: ranks.Ranks) -> Any:
    """Load the text, which one rank of each node tokenizes; all nodes must have the same."""
    from spectral_dist.launch import corpus

    keys = all_ranks.once_per_node(lambda: corpus.prepare(data, vocab_size))
    if len(set(keys)) > 1:
        raise ValueError(
            "the nodes do not have the same text: give all of them the same --data, and for --data"
            " code the same releases of Python and torch"
        )
    corpora: list[Any] = []
    all_ranks.together(lambda: corpora.append(corpus.read(keys[0])))
    return corpora[0]


def _run(run: trainer.Trainer, grace: float) -> int:
    """Train, and return the exit status."""
    from spectral_dist.launch import ranks, report, trainer

    out = run.settings.out
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
        except (FloatingPointError, ValueError, OSError) as error:  # not finite, or a full disk
            typer.echo(f"pretrain: error: {with_page(str(error))}", err=True)
            return 1
        finally:
            # Inside of the context: when one rank fails, its launcher signals the others, which may
            # still have to print why.
            ranks.stop()
    return 0


def _local_world_size() -> int:
    """Return the number of ranks on this node, from the environment."""
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def _engine(options: dict[str, Any], config: Any, all_ranks: Any) -> Any:
    """Build the engine that was asked for."""
    if options["engine"] is EngineName.deepspeed:
        from spectral_dist.launch.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(
            options["config"], config, options["seed"], all_ranks, options["zero_init"]
        )
    run_config, seed = options["run_config"], options["seed"]
    if options["engine"] is EngineName.megatron:
        from spectral_dist.launch.engines.megatron import MegatronEngine

        return MegatronEngine(run_config, config, seed, all_ranks)
    from spectral_dist.launch.engines.torch import TorchEngine

    sharded = options["engine"] is EngineName.fsdp
    return TorchEngine(run_config, config, seed, all_ranks, sharded=sharded)


if __name__ == "__main__":
    app()

"""Train with DeepSpeed: `deepspeed.initialize` with the user's JSON."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_dist.launch import deepspeed_config, llama
from spectral_dist.launch.engines.base import Engine
from spectral_dist.launch.ranks import Ranks


def _is_for_users(record: logging.LogRecord) -> bool:
    """Return False for what every rank says of a schedule that initialize itself asks too early."""
    return "scheduler before it has started" not in record.getMessage()


def prepare_deepspeed() -> Any:
    """Import deepspeed, set up for this machine, and return the module."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    from spectral_dist.integrations.deepspeed._compat import without_compiling

    logger.setLevel("WARNING")
    logger.addFilter(_is_for_users)
    # DeepSpeed calls functions that torch 2.13 has renamed; users cannot change that.
    warnings.filterwarnings("ignore", r".*is deprecated. Please use", FutureWarning)
    if deepspeed.get_accelerator().device_name() == "cpu":
        without_compiling()
    return deepspeed


class DeepSpeedEngine(Engine):
    """The engine that `deepspeed.initialize` builds of the user's JSON, unchanged."""

    def __init__(self, config: Path, model: Any, seed: int, ranks: Ranks, zero_init: bool) -> None:
        """Build the model and the engine.

        Args:
            config: the JSON file.
            model: a LlamaConfig.
            seed: of the initial weights.
            ranks: all ranks of the job.
            zero_init: construct the model in shards, so that no rank ever holds all of it.

        Raises:
            ValueError: the JSON is wrong, or DeepSpeed does not accept it.
        """
        fields = deepspeed_config.read(config)
        self.fields, self.path, self.llama = fields, config, model
        self.kind = fields["optimizer"]["type"]
        stage = fields.get("zero_optimization", {}).get("stage", 0)
        if zero_init and stage != 3:
            raise ValueError(f"--zero-init needs ZeRO stage 3; {config} asks for stage {stage}")
        deepspeed_config.check_batch(config, fields, ranks.world)
        deepspeed = prepare_deepspeed()
        if self.kind.lower().startswith("spectral"):
            import spectral_dist.integrations.deepspeed  # noqa: F401  registers the name
        with deepspeed_config.named_errors(config):
            init_context = deepspeed.zero.Init(config_dict_or_path=fields) if zero_init else None
        llama_model = llama.build(model, seed, init_context)
        tracker = deepspeed_config.ReadTracker(fields)
        with deepspeed_config.named_errors(config, tracker):
            self.model, *_ = deepspeed.initialize(model=llama_model, config=tracker)
        for note in tracker.unread_warnings(config):
            if ranks.first:
                print(f"pretrain: {note}", flush=True)
        self.engine: Any = self.model
        if self.engine.checkpoint_engine.is_decoupled():
            raise ValueError(
                f"{config}: checkpoint: its writer goes on after a save has returned, and a"
                " checkpoint is named here when it is whole; leave it out"
            )
        self.optimizer = self.engine.basic_optimizer
        self.batch = self.engine.train_batch_size()
        self.micro = self.engine.train_micro_batch_size_per_gpu()
        self.device, self.data_rank, self.data_ranks = ranks.device, ranks.rank, ranks.world

    def backward(self, rows: Tensor, *, last: bool) -> Tensor:
        """Run forward and backward of one micro-batch, and return its mean loss, detached."""
        loss = self.losses(rows).mean()
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # only counts micro-batches
        return loss.detach()

    def step(self) -> None:
        """Step the optimizer and the schedule, after the last micro-batch."""
        assert self.engine.is_gradient_accumulation_boundary()
        self.engine.step()

    @property
    def lr(self) -> float:
        """Return the first group's learning rate for the next step."""
        return float(self.engine.get_lr()[0])

    def write(self, target: Path) -> None:
        """Write a checkpoint into the existing folder ``target``; all ranks call this."""
        # DeepSpeed writes its own `latest` before other ranks' files; a kill can leave it empty.
        self.engine.save_checkpoint(str(target.parent), tag=target.name, save_latest=False)

    def read(self, source: Path) -> None:
        """Restore what ``write`` has written; all ranks call this.

        With "load_universal" in the JSON, the file `latest_universal` beside ``source`` names the
        universal checkpoint to load, which must be of the same step.

        Raises:
            ValueError: another engine has written it, or the universal one is of another step.
        """
        universal = self.engine.load_universal_checkpoint()
        path, _ = self.engine.load_checkpoint(
            str(source.parent), tag=None if universal else source.name
        )
        if path is None:
            raise ValueError(f"{source} was not saved by --engine deepspeed")
        if source.name != f"step_{self.engine.global_steps:06d}":
            raise ValueError(
                f"{path} is of step {self.engine.global_steps}, and the run goes on from {source};"
                " convert that one to a universal checkpoint"
            )

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must not change, as JSON."""
        return deepspeed_config.identity(self.path, self.fields)

    @property
    def skipped_steps(self) -> int:
        """Return how many steps DeepSpeed has skipped because a gradient was not finite."""
        return int(self.engine.skipped_steps)

"""DeepSpeed as an engine: `deepspeed.initialize` with the JSON of the user."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_dist.launch import deepspeed_config, llama
from spectral_dist.launch.engines.base import Engine
from spectral_dist.launch.ranks import Ranks


def prepare_deepspeed() -> Any:
    """The deepspeed module, set up for this machine."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    from spectral_dist.integrations.deepspeed._compat import without_compiling

    logger.setLevel("WARNING")
    # DeepSpeed calls what torch 2.13 renamed; nobody here can do anything about it.
    warnings.filterwarnings("ignore", r".*is deprecated. Please use", FutureWarning)
    if deepspeed.get_accelerator().device_name() == "cpu":
        without_compiling()
    return deepspeed


class DeepSpeedEngine(Engine):
    """`deepspeed.initialize` with the user's JSON, as it is."""

    def __init__(self, config: Path, model: Any, seed: int, ranks: Ranks, zero_init: bool) -> None:
        """`model` is a LlamaConfig. With `zero_init` the whole model never exists on one rank.

        Raises:
            ValueError: a JSON that is wrong, or that DeepSpeed does not take.
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
            under = deepspeed.zero.Init(config_dict_or_path=fields) if zero_init else None
        built = llama.build(model, seed, under)
        tracker = deepspeed_config.ReadTracker(fields)
        with deepspeed_config.named_errors(config, tracker):
            self.model, *_ = deepspeed.initialize(model=built, config=tracker)
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
        """Forward and backward of one micro-batch; its mean loss, detached."""
        loss = self.losses(rows).mean()
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # no step yet: DeepSpeed counts micro-batches in it
        return loss.detach()

    def step(self) -> None:
        """Optimizer and schedule, once the last micro-batch is done."""
        assert self.engine.is_gradient_accumulation_boundary()
        self.engine.step()

    @property
    def lr(self) -> float:
        """The first group's learning rate, for the step to come."""
        return float(self.engine.get_lr()[0])

    def write(self, target: Path) -> None:
        """Checkpoint everything into the folder `target`, which is there; on all ranks."""
        # DeepSpeed's own `latest` comes before other ranks' files, and can be left empty.
        self.engine.save_checkpoint(str(target.parent), tag=target.name, save_latest=False)

    def read(self, source: Path) -> None:
        """Restore what `write` has written; on all ranks. ValueError: it was another engine.

        With "load_universal" in the JSON: what `latest_universal` beside it names, of that step.
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
        """What must be the same for a checkpoint to be gone on from; JSON."""
        return deepspeed_config.identity(self.path, self.fields)

    @property
    def skipped_steps(self) -> int:
        """Steps that DeepSpeed has left out: a gradient was not finite."""
        return int(self.engine.skipped_steps)

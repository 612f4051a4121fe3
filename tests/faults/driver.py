"""launch/pretrain.py as a rank that ends, is told to, or waits, at a place that $FAULT names."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from spectral_dist.launch import checkpoints, megatron_config, pretrain
from spectral_dist.launch.engines import torch as torch_engine
from spectral_dist.launch.engines.deepspeed import DeepSpeedEngine
from spectral_dist.launch.trainer import Trainer
from tests.support import megatron_cpu

PHASES = ("forward", "exchange", "save", "shard", "manifest", "latest", "evaluate", "nan")
"""Before a step's forward; before its optimizer step; before a save; before this rank's part of it
is written; when all parts are; before `latest` names it; before an evaluation. And "nan", which is
no signal: a gradient that is NaN, of a loss that is not."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to some ranks, once: the file ``once`` is there from then on."""

    phase: str
    step: int
    ranks: tuple[int, ...]
    once: str
    number: int = signal.SIGKILL
    seconds: float = 0.0  # to wait, and no signal
    limit: int = 0  # bytes that a file may have from now on, and no signal

    def strike(self) -> None:
        """Have it happen to this process, if it is one of those and it has not."""
        rank = int(os.environ.get("RANK", "0"))
        once = Path(f"{self.once}.{rank}")
        if rank not in self.ranks or once.exists():
            return
        once.touch()
        if self.seconds:
            time.sleep(self.seconds)
        elif self.limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        else:
            os.kill(os.getpid(), self.number)


def install(fault: Fault) -> None:
    """Have the fault come in its phase of its step."""
    current = {"step": 0}

    def before(where: Any, name: str, phase: str) -> None:
        call: Callable[..., Any] = getattr(where, name)

        @functools.wraps(call)
        def changed(*args: Any, **kwargs: Any) -> Any:
            if phase == fault.phase and current["step"] == fault.step:
                fault.strike()
            return call(*args, **kwargs)

        setattr(where, name, changed)

    step = Trainer.step

    def counted(self: Trainer) -> Any:
        current["step"] = self.done + 1
        if fault.phase == "forward" and current["step"] == fault.step:
            fault.strike()
        return step(self)

    Trainer.step = counted  # type: ignore[method-assign]
    before(torch_engine.TorchEngine, "step", "exchange")
    before(DeepSpeedEngine, "step", "exchange")
    before(checkpoints, "save", "save")
    before(FileSystemWriter, "write_data", "shard")
    before(checkpoints, "_hash", "manifest")
    before(checkpoints, "name_latest", "latest")
    before(Trainer, "_validate", "evaluate")
    if fault.phase == "nan":
        losses = DeepSpeedEngine.losses

        def bad(self: DeepSpeedEngine, rows: Tensor) -> Tensor:
            result = losses(self, rows)
            steps = current["step"] == fault.step
            return result + (0.0 * result).abs().sqrt() if steps else result

        DeepSpeedEngine.losses = bad  # type: ignore[method-assign]
    assert fault.phase in PHASES
    if "megatron" in sys.argv:
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        from spectral_dist.launch.engines.megatron import MegatronEngine

        before(MegatronEngine, "step", "exchange")
        before(filesystem_async.FileSystemWriterAsync, "write_preloaded_data", "shard")
    elif fault.phase == "shard" and os.environ.get("DS_ACCELERATOR"):
        from deepspeed.runtime.checkpoint_engine import torch_checkpoint_engine

        before(torch_checkpoint_engine.TorchCheckpointEngine, "save", "shard")


if __name__ == "__main__":  # a multiprocessing manager imports this again
    if "megatron" in sys.argv:  # where there is no GPU
        megatron_cpu.install(megatron_cpu.VERSIONS[0])
        megatron_config.prepare = lambda: None
    if "FAULT" in os.environ:
        said = json.loads(os.environ["FAULT"])
        install(Fault(**{**said, "ranks": tuple(said["ranks"])}))
    pretrain.app(sys.argv[1:])

"""A tiny Llama 3 under torchtitan's Trainer; for ranks alone, as it changes torch for CPUs."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.distributed.torchtitan.cases import (
    BLOCK,
    CLIP,
    LAYOUTS,
    LENGTH,
    LR,
    MICRO,
    OPTIONS,
    ROWS,
    SAVED_AT,
    SCALAR_LR,
    STEPS,
    TITLES,
    WARMUP,
)
from tests.support import torchtitan_cpu

torchtitan_cpu.install()

from torchtitan.components.checkpoint import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import (  # noqa: E402
    CompileConfig,
    ConfigManager,
    DebugConfig,
    ParallelismConfig,
    TrainingConfig,
)
from torchtitan.models import llama3  # noqa: E402
from torchtitan.models.common.config_utils import decoder_vocab_size  # noqa: E402
from torchtitan.models.common.linear import Linear  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

import spectral_dist  # noqa: E402
from spectral_dist.integrations.torchtitan import PoetConverter, SpectralOptimizers  # noqa: E402
from tests.support.quiet import quiet  # noqa: E402

ROOT = Path(__file__).parents[3]


class Data(BaseDataLoader):
    """Rows of tokens, the same in every step whatever the number of ranks is."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Without fields."""

    def __init__(
        self, config: Any, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any
    ) -> None:
        self.row, self.size = 0, local_batch_size
        self.ranks, self.rank = dp_world_size, dp_rank

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            first = self.row + self.rank * self.size
            rows = torch.stack([row_of(first + i) for i in range(self.size)])
            self.row += self.size * self.ranks
            positions = torch.arange(LENGTH).expand(self.size, -1).contiguous()
            yield {"input": rows[:, :-1], "positions": positions}, rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row = state["row"]


def row_of(index: int) -> Tensor:
    return torch.randint(64, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))


class Tokenizer(BaseTokenizer):
    """One that nothing asks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Without fields."""

    def __init__(self, config: Any, *, tokenizer_path: Any = None) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return 2048


@torch.no_grad()
def fill(parts: list[nn.Module]) -> None:
    """Write weights that depend on the parameter's name alone, and on no layout."""
    for part in parts:
        for name, p in part.named_parameters():
            if p.dim() < 2:
                continue
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            whole = torch.randn(p.shape, generator=random) / p.shape[-1] ** 0.5
            is_cut = isinstance(p, DTensor)
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements) if is_cut else whole)


def config_of(
    folder: str,
    layout: str,
    optimizer: SpectralOptimizers.Config,
    steps: int = STEPS,
    rotated: bool = False,
) -> Trainer.Config:
    converters = [PoetConverter.Config(settings={"block": BLOCK})] if rotated else []
    spec = llama3.model_registry("debugmodel", attn_backend="flex", converters=converters)
    spec.model.layers = spec.model.layers[:2]
    spec.post_optimizer_build_fn = lambda optimizers, parts, dims: fill(parts)
    degrees = LAYOUTS[layout]
    data_parallel = dist.get_world_size() if layout in ("fsdp", "replicate") else 1
    micro = 1 if layout == "pp" else MICRO  # a pipeline cuts a batch itself
    return Trainer.Config(
        model_spec=spec, dump_folder=folder, tokenizer=Tokenizer.Config(),
        dataloader=Data.Config(), optimizer=optimizer, activation_checkpoint=None,
        loss=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec)),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=WARMUP, total_steps=STEPS),
        training=TrainingConfig(
            local_batch_size=ROWS // data_parallel // micro, global_batch_size=ROWS,
            seq_len=LENGTH, steps=steps, max_norm=CLIP, disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        metrics=MetricsProcessor.Config(log_freq=1), debug=DebugConfig(seed=0),
        compile=CompileConfig(enable=False),
        parallelism=ParallelismConfig(
            spmd_backend="partial_dtensor", pipeline_parallel_schedule="1F1B", **degrees
        ),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=SAVED_AT, last_save_model_only=False, keep_latest_k=0
        ),
    )  # fmt: skip


def by_trainer(
    folder: str, layout: str, optimizer: str, steps: int = STEPS, **changes: Any
) -> dict[int, float]:
    """{step: loss}; it goes on from the last checkpoint in the folder, if there is one."""
    options = {"scalar_lr": SCALAR_LR, **OPTIONS[optimizer], **changes}
    config = SpectralOptimizers.Config(name=optimizer, lr=LR, options=options)
    with quiet():
        trainer = config_of(folder, layout, config, steps, optimizer == "poet").build()
        losses: dict[int, float] = {}
        processor = trainer.metrics_processor
        processor.log = lambda step, loss, *others, **more: losses.update({step: float(loss)})
        trainer.train()
        trainer.close()
    return losses


def by_loop(optimizer: str) -> dict[int, float]:
    """What the Trainer does, in one process and without it."""
    spec = llama3.model_registry("debugmodel", attn_backend="flex")
    spec.model.layers = spec.model.layers[:2]
    model: Any = spec.model.build()
    model.init_weights(buffer_device=torch.device("cpu"))
    fill([model])
    if optimizer == "poet":
        for module in model.modules():
            if type(module) is Linear:
                module.__class__ = nn.Linear
        spectral_dist.poet.convert(model, block=BLOCK)
    with quiet():
        ours = getattr(spectral_dist, TITLES[optimizer])(
            spectral_dist.param_groups(model), lr=LR, scalar_lr=SCALAR_LR, **OPTIONS[optimizer]
        )  # fmt: skip
    # linear: up in two steps, down over the rest, and one more step to zero
    factors = [0.5, 1.0, 1.0, 0.5]
    losses = {}
    for step in range(STEPS):
        rows = torch.stack([row_of(step * ROWS + i) for i in range(ROWS)])
        positions = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
        masks = model.get_attention_masks(positions=positions)
        logits = model(rows[:, :-1], positions=positions, attention_masks=masks)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in ours.param_groups:
            group["lr"] = factors[step] * (SCALAR_LR if group["kind"] == "scalar" else LR)
        with quiet():
            ours.step()
        ours.zero_grad()
        losses[step + 1] = float(loss.detach())
    return losses


def remove_last(folder: str) -> None:
    """Remove the checkpoint of the last step, so that a run resumes from the one before."""
    if dist.get_rank() == 0:
        last = Path(folder, "checkpoint", f"step-{STEPS}")
        assert Path(folder, "checkpoint", f"step-{SAVED_AT}").exists()
        last.rename(Path(folder, f"step-{STEPS}"))
    dist.barrier()


def whole_and_resumed(folder: str, layout: str, optimizer: str) -> list[dict[int, float]]:
    """The losses of a run, and of one that resumes from its first checkpoint."""
    whole = by_trainer(folder, layout, optimizer)
    remove_last(folder)
    return [whole, by_trainer(folder, layout, optimizer)]


def refused(folder: str, layout: str, rotated: bool = False, **keywords: Any) -> None:
    config = SpectralOptimizers.Config(**keywords)
    with quiet():
        config_of(folder, layout, config, rotated=rotated).build()


def by_example(flags: list[str]) -> tuple[list[float], list[str]]:
    """The losses of examples/torchtitan_fsdp2.py with flags, on rows of our own; the optimizers."""
    sys.path.insert(0, str(ROOT / "examples"))
    config = ConfigManager().parse_args(
        ["--module", "torchtitan_fsdp2", "--config", "llama3_muon", *flags]
    )
    config.tokenizer, config.dataloader = Tokenizer.Config(), Data.Config()
    config.training.disable_cuda_graphs = True
    config.training.mixed_precision_param = "float32"
    with quiet():
        trainer = config.build()
        losses: list[float] = []
        trainer.metrics_processor.log = lambda step, loss, *_, **__: losses.append(float(loss))
        trainer.train()
        trainer.close()
    return losses, [type(each).__name__ for each in trainer.optimizers]

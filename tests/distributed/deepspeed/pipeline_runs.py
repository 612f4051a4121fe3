"""A small model in DeepSpeed's PipelineModule, and in one process; called through the harness."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.deepspeed import engine as engines
from tests.distributed.torch import layouts

STAGES = 2
MICRO = 2
"""Micro-batches of a step on each data-parallel rank."""


class Embed(nn.Embedding):
    """An embedding whose weight the last stage has, too."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(*weight.shape)
        self.weight.data.copy_(weight)


def as_head(module: nn.Module, x: Tensor) -> Tensor:
    """Map to the vocabulary with the embedding's weight."""
    return x @ module.weight.mT / 5


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Alone(nn.Module):
    """The whole model in one process, with the names that PipelineModule gives."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        model = layouts.conditioned(odd=False, layers=3)
        parts = [model.embed, *model.layers, model.head]
        if tied:
            self.tied_modules = nn.ModuleDict({"embed": parts[0]})
            parts = parts[1:-1]
        for index, part in enumerate(parts, tied):
            self.add_module(str(index), part)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tied_modules["embed"](tokens) if self.tied else tokens
        for name, module in self.named_children():
            x = module(x) if name.isdigit() else x
        return loss_of(as_head(self.tied_modules["embed"], x) if self.tied else x, tokens)


def pipeline(tied: bool) -> nn.Module:
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    alone = Alone(tied)
    layers: list[Any] = [m for name, m in alone.named_children() if name.isdigit()]
    if tied:
        weight = alone.tied_modules["embed"].weight.data
        spec = functools.partial(TiedLayerSpec, "embed", Embed, weight)
        layers = [spec(), *layers, spec(forward_fn=as_head)]
    return PipelineModule(layers, num_stages=STAGES, loss_fn=loss_of, partition_method="uniform")


def config(stage: int, kind: str, options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    result = engines.config(stage, 2, accumulation=MICRO, **changes)
    result["optimizer"] = {"type": kind, "params": options}
    return result


def tied_block() -> nn.Module:
    """A pipeline whose stages share a layer that holds a matrix."""
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    model = layouts.conditioned(odd=False)
    spec = TiedLayerSpec("block", nn.Linear, 24, 24)
    layers = [model.embed, spec, *model.layers, spec, model.head]
    return PipelineModule(layers, num_stages=STAGES, loss_fn=loss_of, partition_method="uniform")


def engine_of(configuration: dict[str, Any], tied: bool = False, model: str = "") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        from spectral_dist.integrations.deepspeed import _compat

        _compat.without_compiling()
        deepspeed.init_distributed("gloo", verbose=False)
        return deepspeed.initialize(
            model=tied_block() if model else pipeline(tied), config=configuration
        )[0]


def build(configuration: dict[str, Any], model: str) -> None:
    engine_of(configuration, model=model)


def poisoned(configuration: dict[str, Any]) -> None:
    """A good step, and one with a NaN gradient on one rank of the last stage; then another."""
    running = engine_of(configuration)
    steps(running, 0, 1)
    if dist.get_rank() == dist.get_world_size() - 1:
        weight = dict(running.module.named_parameters())["3.down.weight"]
        weight.register_hook(lambda grad: grad * float("nan"))
    steps(running, 1, 3)


def micro_batches(running: Any, step: int) -> list[tuple[Tensor, Tensor]]:
    grid = running.grid
    data = layouts.tokens(step).chunk(grid.data_parallel_size)[grid.data_parallel_id]
    return [(part, part) for part in data.chunk(MICRO)]


def steps(running: Any, first: int, last: int) -> list[float]:
    return [
        float(running.train_batch(iter(micro_batches(running, step))))
        for step in range(first, last)
    ]


def train(
    configuration: dict[str, Any],
    tied: bool = False,
    first: int = 0,
    last: int = 4,
    folder: str = "",
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    """Train, and return what a test looks at; this rank's part of the model."""
    running = engine_of(configuration, tied)
    if load is not None:
        path, _ = running.load_checkpoint(folder, tag=load)
        assert path is not None
    losses = steps(running, first, last)
    if save is not None:
        running.save_checkpoint(folder, tag=save)
    base = running.basic_optimizer
    result = {
        "parameters": {n: p.detach().clone() for n, p in running.module.named_parameters()},
        "losses": losses,
        "polar_calls": getattr(base, "polar_calls", 0),
        "kinds": {r.name: r.kind for r in getattr(base, "all_routes", ())},
        "stage": running.stage_id,
        "wrapper": type(running.optimizer).__name__,
    }
    running.destroy()
    return result

"""The same small model under every layout of plain torch; called through the harness.

``LAYOUTS`` says how many ranks each layout is for; the other functions run on one of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.support import models

LENGTH = 8
"""Tokens of a sequence: sequence parallelism divides them."""


def tokens(step: int) -> Tensor:
    """The global batch of a step."""
    return models.tokens(step, length=LENGTH)


def conditioned(**model_options: Any) -> models.Tiny:
    """The model with gradients far from singular, so that their exact polar factors are stable.

    ``models.build`` has LayerNorms, which take the mean out of what they normalise: the gradients
    of q and k lack a direction, and an exact polar factor fills it with rounding errors.
    """
    model = models.build(**model_options)
    for layer in model.layers:
        width = layer.out.in_features
        layer.norm = nn.RMSNorm(width)
        for weight in layer.qkv.weight.data.split(width):
            nn.init.orthogonal_(weight, 1.5)
        for linear in (layer.out, layer.up, layer.down):
            nn.init.orthogonal_(linear.weight)
    nn.init.orthogonal_(model.embed.weight, 5.0)
    nn.init.orthogonal_(model.head.weight)
    return model


@functools.cache
def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """One mesh for all tests of a pool: each makes new process groups."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@dataclass
class Laid:
    """A model under a layout, on this rank."""

    model: nn.Module
    data_rank: int = 0
    data_ranks: int = 1
    places: dict[str, Tensor] = field(default_factory=dict)
    """name -> for each element that this rank stores, its index in the flattened parameter"""
    named: dict[str, nn.Parameter] = field(default_factory=dict)
    """parameters by their names in the plain model, as an optimizer built now would see them"""

    def __post_init__(self) -> None:
        self.named = {n.removeprefix("module."): p for n, p in self.model.named_parameters()}

    def full(self) -> dict[str, Tensor]:
        """Whole parameters by name. A collective call."""
        return {name: whole(p) for name, p in self.named.items()}

    def batches(self, step: int, accumulation: int = 1, same: bool = False) -> list[Tensor]:
        """This rank's micro-batches of a step; ``same``: every rank's are the global batch."""
        ranks, rank = (1, 0) if same else (self.data_ranks, self.data_rank)
        chunks = tokens(step).chunk(ranks * accumulation)
        assert len(chunks) == ranks * accumulation
        return list(chunks[rank::ranks])

    def backward(self, step: int, accumulation: int = 1, same: bool = False) -> list[float]:
        """Gradients of the step's mean loss, and no others; returns this rank's losses."""
        for p in self.named.values():
            p.grad = None
        losses = []
        batches = self.batches(step, accumulation, same)
        for number, batch in enumerate(batches):
            with self.synchronised(number + 1 == len(batches)):
                loss = self.model(batch)
                (loss / accumulation).backward()
            losses.append(float(loss.detach()))
        return losses

    @contextlib.contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Reduce gradients over ranks after the last micro-batch only, as users do."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
            return
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        yield

    def clip(self, limit: float) -> float:
        """Scale all gradients so that their norm is at most ``limit``; returns what it was."""
        parameters = [p for p in self.named.values() if p.grad is not None]
        kinds = {
            (p.device_mesh, any(q.is_partial() for q in p.grad.placements))
            if isinstance(p, DTensor)
            else (None, hasattr(p, "_st_info"))
            for p in parameters
        }
        if len(kinds) == 1 and not kinds.pop()[1]:
            return float(whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        # torch cannot add the norms of plain tensors and DTensors, or of several meshes
        total = torch.stack([whole(p.grad, like=p).norm() for p in parameters]).norm()
        factor = torch.clamp(limit / (total + 1e-6), max=1.0).item()
        for p in parameters:
            p.grad.mul_(factor)
        return total.item()

    def give(self, name: str, gradient: Tensor | None, partial: bool = False) -> None:
        """Set a parameter's gradient from the whole one, with no arithmetic.

        ``partial``: of a replicated DTensor, as one that is still to be summed over its mesh.
        """
        p = self.named[name]
        p.grad = None
        if gradient is None or not p.requires_grad:
            return
        local = p.to_local() if isinstance(p, DTensor) else p
        mine = gradient.flatten()[self.places[name]].view(local.shape).to(p.dtype)
        if isinstance(p, DTensor):
            placements = p.placements
            if partial and all(q.is_replicate() for q in placements):
                placements = [Partial()] * len(placements)
                mine = mine * (not any(p.device_mesh.get_coordinate()))
            mine = DTensor.from_local(
                mine, p.device_mesh, placements, run_check=False, shape=p.shape, stride=p.stride()
            )
        p.grad = mine


def whole(value: Tensor, like: Tensor | None = None) -> Tensor:
    """A plain copy of all of a tensor, which lies as ``like``; a collective call if a DTensor."""
    # if DistributedDataParallel made a DTensor local
    spec = getattr(value if like is None else like, "_st_info", None)
    value = value.detach()
    if spec is not None:
        value = DTensor.from_local(
            value, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
        )
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


# -- layouts: each changes the model in place or wraps it


def one(model: nn.Module) -> Laid:
    return Laid(model)


def ddp(model: nn.Module) -> Laid:
    missing = getattr(model, "unused", None) is not None
    wrapped = DistributedDataParallel(model, find_unused_parameters=missing)
    return Laid(wrapped, dist.get_rank(), dist.get_world_size())


def shard(model: nn.Module, over: DeviceMesh, **options: Any) -> None:
    """fully_shard of each block and of the root."""
    for layer in getattr(model, "layers", ()):
        fully_shard(layer, mesh=over, **options)
    fully_shard(model, mesh=over, **options)


def fsdp(model: nn.Module) -> Laid:
    shard(model, mesh((dist.get_world_size(),), ("dp",)))
    return Laid(model, dist.get_rank(), dist.get_world_size())


def fsdp_mixed(model: nn.Module) -> Laid:
    """float32 shards, bfloat16 compute: gradients arrive in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mesh((dist.get_world_size(),), ("dp",)), mp_policy=policy)
    return Laid(model, dist.get_rank(), dist.get_world_size())


def hsdp(model: nn.Module) -> Laid:
    shard(model, mesh((2, 2), ("replicate", "shard")))
    return Laid(model, dist.get_rank(), dist.get_world_size())


def blocks(model: nn.Module, over: DeviceMesh) -> None:
    """up by rows and down by columns (uneven ones), qkv by rows, out by columns; the rest plain."""
    for layer in model.layers:
        parallelize_module(
            layer, over,
            {
                "qkv": ColwiseParallel(output_layouts=Replicate()),
                "out": RowwiseParallel(input_layouts=Replicate()),
                "up": ColwiseParallel(use_local_output=False),
                "down": RowwiseParallel(),
            },
        )  # fmt: skip


def tp(model: nn.Module) -> Laid:
    """Plain tensors beside DTensors: each rank of the mesh holds, and computes, all of those."""
    blocks(model, mesh((dist.get_world_size(),), ("tp",)))
    return Laid(model)


class Sequence(RowwiseParallel):
    """A Linear that every rank holds whole and applies to its part of each sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        prepare = PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False
        )
        prepare._apply(module, device_mesh)
        return SequenceParallel(use_local_output=True)._apply(module, device_mesh)


def sequence_parallel(model: nn.Module, over: DeviceMesh) -> None:
    """The stream cut along the sequence; replicated parameters get partial gradients.

    A matrix is among them: the last block's ``out``.
    """
    cut = Shard(1)
    parallelize_module(
        model, over,
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=cut),
            "head": ColwiseParallel(input_layouts=cut, output_layouts=Replicate()),
        },
    )  # fmt: skip
    for number, layer in enumerate(model.layers):
        last = number + 1 == len(model.layers)
        rowwise = RowwiseParallel(input_layouts=Replicate(), output_layouts=cut)
        parallelize_module(
            layer, over,
            {
                "norm": SequenceParallel(),
                "qkv": ColwiseParallel(input_layouts=cut, output_layouts=Replicate()),
                "out": Sequence() if last else rowwise,
                "up": ColwiseParallel(input_layouts=cut, use_local_output=False),
                "down": RowwiseParallel(output_layouts=cut),
            },
        )  # fmt: skip


def tp_sequence(model: nn.Module) -> Laid:
    sequence_parallel(model, mesh((dist.get_world_size(),), ("tp",)))
    return Laid(model)


def tp_fsdp(model: nn.Module) -> Laid:
    """2 x 2; what no plan names is sharded over dp only, and so held by both ranks of tp."""
    both = mesh((2, 2), ("dp", "tp"))
    blocks(model, both["tp"])
    shard(model, both["dp"])
    return Laid(model, both["dp"].get_local_rank(), 2)


def tp_sequence_fsdp(model: nn.Module) -> Laid:
    both = mesh((2, 2), ("dp", "tp"))
    sequence_parallel(model, both["tp"])
    shard(model, both["dp"])
    return Laid(model, both["dp"].get_local_rank(), 2)


def ddp_tp(model: nn.Module) -> Laid:
    """DistributedDataParallel keeps local tensors between steps, which know no mesh."""
    both = mesh((2, 2), ("dp", "tp"))
    blocks(model, both["tp"])
    missing = getattr(model, "unused", None) is not None
    wrapped = DistributedDataParallel(model, device_mesh=both["dp"], find_unused_parameters=missing)
    return Laid(wrapped, both["dp"].get_local_rank(), 2)


def copies(model: nn.Module, over: DeviceMesh) -> None:
    """torch's newer data parallelism: replicated DTensors."""
    # torch 2.9 has another name for it
    name = "mesh" if "mesh" in inspect.signature(replicate).parameters else "device_mesh"
    for layer in getattr(model, "layers", ()):
        replicate(layer, **{name: over})
    replicate(model, **{name: over})


def replicated(model: nn.Module) -> Laid:
    copies(model, mesh((dist.get_world_size(),), ("dp",)))
    return Laid(model, dist.get_rank(), dist.get_world_size())


def replicated_tp(model: nn.Module) -> Laid:
    both = mesh((2, 2), ("dp", "tp"))
    blocks(model, both["tp"])
    copies(model, both["dp"])
    return Laid(model, both["dp"].get_local_rank(), 2)


def fsdp_columns(model: nn.Module) -> Laid:
    """Matrices cut by columns where they divide, and by rows where not."""
    over = mesh((dist.get_world_size(),), ("dp",))

    def place(p: nn.Parameter) -> Shard:
        return Shard(p.ndim - 1 if p.shape[-1] % over.size() == 0 else 0)

    shard(model, over, shard_placement_fn=place)
    return Laid(model, dist.get_rank(), dist.get_world_size())


def stages(model: nn.Module) -> Laid:
    """Pairs of ranks, each with a model of its own, as pipeline stages are."""
    shard(model, mesh((2, 2), ("pipeline", "dp"))["dp"])
    return Laid(model, dist.get_rank() % 2, 2)


LAYOUTS: dict[str, tuple[Callable[[nn.Module], Laid], tuple[int, ...]]] = {
    "one": (one, (1,)),
    "ddp": (ddp, (2, 4)),
    "fsdp": (fsdp, (2, 3, 4)),
    "fsdp_columns": (fsdp_columns, (2,)),
    "fsdp_mixed": (fsdp_mixed, (2,)),
    "hsdp": (hsdp, (4,)),
    "replicate": (replicated, (2,)),
    "replicate_tp": (replicated_tp, (4,)),
    "tp": (tp, (2,)),
    "tp_sequence": (tp_sequence, (2,)),
    "tp_fsdp": (tp_fsdp, (4,)),
    "tp_sequence_fsdp": (tp_sequence_fsdp, (4,)),
    "ddp_tp": (ddp_tp, ()),
    "stages": (stages, ()),
}
"""name -> (what lays a plain model out, the numbers of ranks it is tested with)"""
HALF = {"ddp": (2,), "fsdp": (2, 3), "hsdp": (4,), "tp": (2,), "tp_fsdp": (4,)}
"""Layouts that are tested with bfloat16 parameters as well, by the names ddp_bf16, ..."""


def in_half(layout: str) -> Callable[[nn.Module], Laid]:
    return lambda model: LAYOUTS[layout][0](model.to(torch.bfloat16))


LAYOUTS |= {f"{layout}_bf16": (in_half(layout), worlds) for layout, worlds in HALF.items()}
PLAIN = ("tp_sequence", "tp_sequence_fsdp")
"""Layouts whose sequence-cut stream only a model without odd parts understands."""


def options_for(layout: str, **model_options: Any) -> dict[str, Any]:
    """Options of ``models.build`` with which the layout works."""
    return {"odd": False, **model_options} if layout in PLAIN else model_options


def build(layout: str, make: Callable[..., nn.Module] = conditioned, **model_options: Any) -> Laid:
    """The model of ``make``, laid out. A collective call.

    Where each element went is read off a copy whose elements are their own indices.
    """
    flat_layout = LAYOUTS[layout][0]
    if make is conditioned:
        model_options = options_for(layout, **model_options)
    indices = make(**model_options)
    with torch.no_grad():
        for p in indices.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))
    if layout.endswith("_bf16"):  # which has not the digits
        flat_layout = LAYOUTS[layout.removesuffix("_bf16")][0]
    numbered = flat_layout(indices)
    placed = LAYOUTS[layout][0](make(**model_options))
    for name, p in numbered.named.items():
        local = p.to_local() if isinstance(p, DTensor) else p
        placed.places[name] = local.detach().flatten().long()
    return placed

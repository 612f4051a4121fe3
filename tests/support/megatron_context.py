"""Attention over context-parallel ranks on a CPU, for ranks; all else of CP is Megatron's own.

Megatron leaves such attention to Transformer Engine, a GPU package, whose ``cp_comm_type=
"all_gather"`` this does: keys and values are gathered, and a rank attends from its own positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def part(text: Tensor) -> Tensor:
    """This context-parallel rank's columns of [sequences, length], of 2 x size equal pieces."""
    from megatron.core import parallel_state

    size = parallel_state.get_context_parallel_world_size()
    return text if size == 1 else of_rank(text, parallel_state.get_context_parallel_rank(), size)


def of_rank(text: Tensor, rank: int, size: int) -> Tensor:
    """The columns that a rank of ``size`` has: an early piece and a late one."""
    pieces = text.chunk(2 * size, 1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], 1)


class Gather(torch.autograd.Function):
    """[size * s, ...] of [s, ...], rank by rank; gradients are summed over ranks."""

    @staticmethod
    def forward(context: Any, own: Tensor, group: Any) -> Tensor:
        context.group = group
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=context.group)
        return total.chunk(context.group.size())[context.group.rank()], None


class GatheringAttention(nn.Module):
    """Causal attention of a rank's queries to the keys and values of all ranks."""

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[s, b, heads, d] of queries, fewer heads of keys and values; [s, b, heads * d]."""
        groups = query.shape[2] // key.shape[2]
        key, value = (
            Gather.apply(x, self.group).repeat_interleave(groups, dim=2) for x in (key, value)
        )
        positions = torch.arange(len(key))[None]
        size = self.group.size()
        order = torch.cat([of_rank(positions, rank, size)[0] for rank in range(size)])
        at = part(positions)[0]
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(at[:, None] < order[None, :], float("-inf"))
        out = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value)
        return out.reshape(*out.shape[:2], -1)


def attend_over_ranks(spec: Any) -> None:
    """Put this attention into a layer's spec of Megatron's."""
    spec.submodules.self_attention.submodules.core_attention = GatheringAttention

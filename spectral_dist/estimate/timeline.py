"""The seconds of a unit's step: buckets that overlap, as ``Exchange.run`` starts them.

A rank has a queue of computations and one of collectives; each is worked off in order, as GPUs
and NCCL do. All tensors are (replicas, ranks of a replica), or spread to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BucketSeconds:
    """What the stages of a bucket take on each rank.

    Attributes:
        gather: to accumulate momentum, and pack what is sent.
        collect: the all-to-all to owners; that back takes as long.
        compute: the directions.
        spread: the exchange among replicas; None if there are none.
        apply: to unpack directions and update weights.
    """

    gather: Tensor
    collect: Tensor
    compute: Tensor
    spread: Tensor | None
    apply: Tensor


class _Queues:
    """When each rank's computations and collectives that were started so far will have ended."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.computed, self.sent = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))

    def compute(self, seconds: Tensor, after: Tensor | None = None) -> None:
        """Start a computation, which waits for a collective that ends at ``after``."""
        begin = self.computed if after is None else torch.maximum(self.computed, after)
        self.computed = begin + seconds

    def collective(self, seconds: Tensor, dim: int) -> Tensor:
        """Start a collective over a dimension of ranks, and return when it ends.

        It begins when all of them have come to it, and ends for all with the slowest.

        Args:
            seconds: of each rank.
            dim: 1 over the ranks of each replica, 0 over the replicas.
        """
        if not bool(seconds.any()):
            return self.computed
        begin = torch.maximum(self.computed, self.sent).amax(dim, keepdim=True)
        end = begin + torch.as_tensor(seconds).expand_as(self.sent).amax(dim, keepdim=True)
        self.sent = end.expand_as(self.sent)
        return self.sent


def finish(buckets: Sequence[BucketSeconds], shape: tuple[int, int]) -> Tensor:
    """Return the seconds after which each rank has done all buckets of a unit.

    Args:
        buckets: in the order of the plan.
        shape: (replicas, ranks of a replica).
    """
    queues = _Queues(shape)
    waiting = [_run(bucket, queues) for bucket in buckets][::-1]
    running: list[Iterator[None]] = []
    while waiting or running:
        if waiting:
            running.insert(0, waiting.pop())
        running = [bucket for bucket in running if next(bucket, bucket) is not bucket]
    return torch.maximum(queues.computed, queues.sent)


def _run(bucket: BucketSeconds, queues: _Queues) -> Iterator[None]:
    """Run one bucket, and yield where ``Exchange._run_bucket`` does."""
    queues.compute(bucket.gather)
    collected = queues.collective(bucket.collect, 1)
    yield
    queues.compute(bucket.compute, collected)
    delivered = queues.collective(bucket.collect, 1)
    yield
    if bucket.spread is not None:
        queues.compute(torch.zeros(()), delivered)
        delivered = queues.collective(bucket.spread, 0)
        yield
    queues.compute(bucket.apply, delivered)

"""Who orthogonalizes each matrix, and in which bucket. Computed once, the same on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spectral_dist.sharding.layout import Layout


@dataclass(frozen=True)
class Bucket:
    """Matrices exchanged and computed together: for each owner, the indices of its matrices."""

    matrices: dict[int, list[int]]
    moves: bool
    """Whether any is cut among several ranks (the same answer on every rank)."""


@dataclass(frozen=True)
class Plan:
    """The owner of each layout's matrix, and the buckets in the order in which they are worked.

    Owners and loads count ranks replica by replica: rank r of replica k is k * ranks + r.
    """

    owners: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    loads: tuple[float, ...]
    """Each rank's Newton-Schulz cost per step, in multiply-adds."""

    @property
    def imbalance(self) -> float:
        """The largest load over the mean load; 1 is perfect."""
        return max(self.loads) * len(self.loads) / sum(self.loads)


def cost(shape: tuple[int, int]) -> float:
    """Multiply-adds of one Newton-Schulz step: s^2 (2 l + s) with s the short side, l the long."""
    short, long = sorted(shape)
    return float(short * short * (2 * long + short))


def choose_owners(
    layouts: Sequence[Layout], ranks: int, replicas: int = 1
) -> tuple[list[int], list[bool], list[float]]:
    """Owner, whether the matrix must move, and the resulting loads, by longest processing time.

    Matrices that one rank holds whole stay with it (in one of its replicas); the others go,
    costliest first, to the least loaded rank: of those that hold a part if they are few (of two
    with equal loads, to the one that holds more), of all if not.
    """
    owners, moves = [-1] * len(layouts), [False] * len(layouts)
    loads = [0.0] * (ranks * replicas)
    open_: list[tuple[float, int, Sequence[int]]] = []
    for i, layout in enumerate(layouts):
        holders = layout.holders() if ranks > 1 else (0,)
        moves[i] = len(holders) > 1
        if replicas > 1 or moves[i]:
            open_.append((-cost(layout.matrix.shape), i, holders))
        else:
            owners[i] = holders[0]
            loads[owners[i]] += cost(layout.matrix.shape)
    heap = [(load, r) for r, load in enumerate(loads)]
    heapq.heapify(heap)
    for negative, i, holders in sorted(open_, key=lambda item: item[:2]):
        if ranks == 1 or len(holders) > max(2, ranks // 2):
            while heap[0][0] != loads[heap[0][1]]:  # an entry that a later load has outdated
                heapq.heappop(heap)
            owner = heap[0][1]
        else:
            share = {r: sum(t.run(r)[1] for t in layouts[i].tiles) for r in holders}
            candidates = [k * ranks + r for k in range(replicas) for r in holders]
            owner = min(candidates, key=lambda r: (loads[r], -share[r % ranks], r))
        owners[i] = owner
        loads[owner] -= negative
        heapq.heappush(heap, (loads[owner], owner))
    return owners, moves, loads


def chunks(
    layouts: Sequence[Layout], indices: list[int], owners: Sequence[int], numel: int
) -> Iterator[dict[int, list[int]]]:
    """Cut each owner's matrices into runs of at most ``numel`` elements; the k-th runs together.

    Costliest first, so that the k-th runs of all owners cost about the same; equal shapes are
    neighbours, so that a run holds few batches.
    """
    queues: dict[int, list[list[int]]] = {}
    filled: dict[int, int] = {}
    for i in sorted(
        indices, key=lambda i: (-cost(layouts[i].matrix.shape), layouts[i].matrix.shape, i)
    ):
        owner, more = owners[i], layouts[i].matrix.numel
        runs = queues.setdefault(owner, [])
        if not runs or filled[owner] + more > numel:
            runs.append([])
            filled[owner] = 0
        runs[-1].append(i)
        filled[owner] += more
    for k in range(max(map(len, queues.values()), default=0)):
        yield {owner: runs[k] for owner, runs in sorted(queues.items()) if k < len(runs)}


def make_plan(
    layouts: Sequence[Layout],
    ranks: int,
    bucket_numel: int,
    replicas: int = 1,
) -> Plan:
    """Owners and buckets. A bucket holds at most ``bucket_numel`` elements (or one matrix) a rank.

    ``ranks`` are those of one replica. Buckets that move come after the first one that does not,
    so that their first exchange is in flight while that one is computed.
    """
    owners, moves, loads = choose_owners(layouts, ranks, replicas)
    # every replica gets the directions of all of them: share the bound among replicas
    limit = max(1, bucket_numel // replicas)
    still = [i for i, m in enumerate(moves) if not m]
    moving = [i for i, m in enumerate(moves) if m]
    at_rest = [Bucket(c, False) for c in chunks(layouts, still, owners, limit)]
    in_motion = [Bucket(c, True) for c in chunks(layouts, moving, owners, limit)]
    return Plan(tuple(owners), (*at_rest[:1], *in_motion, *at_rest[1:]), tuple(loads))

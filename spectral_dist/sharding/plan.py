"""Who orthogonalizes each matrix, and in which bucket. Computed once, the same on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from spectral_dist.sharding.boxes import slabs
from spectral_dist.sharding.layout import Layout, Tile, holders_of


@dataclass(frozen=True)
class Bucket:
    """Matrices exchanged and computed together: for each owner, the indices of its matrices."""

    matrices: dict[int, list[int]]
    moves: bool
    """Whether any is cut among several ranks (the same answer on every rank); of ``gram``, whether
    any is not in its slabs."""
    gram: bool = False


@dataclass(frozen=True)
class Plan:
    """The owner of each layout's matrix, and the buckets in the order in which they are worked.

    Owners and loads count ranks replica by replica: rank r of replica k is k * ranks + r. Under
    ``gram`` all ranks of the owner's replica do the matrix, and the owner its polynomial.
    """

    owners: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    loads: tuple[float, ...]
    """Each rank's Newton-Schulz cost per step, in multiply-adds; of ``gram``, the polynomials'; or
    whatever else was balanced."""
    strategies: tuple[str, ...]
    """Each matrix's: 'owner', 'gram', or 'local' where one rank holds it whole."""

    @property
    def imbalance(self) -> float:
        """The largest load over the mean load; 1 is perfect."""
        return max(self.loads) * len(self.loads) / sum(self.loads)


def cost(shape: tuple[int, int]) -> float:
    """Multiply-adds of one Newton-Schulz step: s^2 (2 l + s) with s the short side, l the long."""
    short, long = sorted(shape)
    return float(short * short * (2 * long + short))


def polynomial_cost(shape: tuple[int, int]) -> float:
    """Multiply-adds of one Newton-Schulz step on the Gram matrix of the short side, 4 s^3."""
    return 4.0 * min(shape) ** 3


def gram_bucket_elements(shape: tuple[int, int], ranks: int) -> int:
    """Elements that a rank keeps in a bucket of one matrix of ``gram``: its slab and the Gram.

    The Gram twice, as a square and as halves, of numbers twice as wide as the wire's.
    """
    return -(-shape[0] * shape[1] // ranks) + 4 * min(shape) ** 2


def choose_owners(
    layouts: Sequence[Layout],
    ranks: int,
    replicas: int = 1,
    gram: Sequence[bool] = (),
    homes: Sequence[int] = (),
    load: Callable[[tuple[int, int]], float] | None = None,
) -> tuple[list[int], list[bool], list[float]]:
    """Owner, whether the matrix must move, and the resulting loads, by longest processing time.

    gram: of each matrix, whether it is done in slabs; then any rank may have its polynomial.
    homes: of each matrix, the replica that it must be done in, if that is not open.
    load: of a shape, what is to be balanced; None: ``cost``, and ``polynomial_cost`` in slabs.

    Matrices that one rank holds whole stay with it (in one of its replicas); the others go,
    costliest first, to the least loaded rank: of those that hold a part if they are few (of two
    with equal loads, to the one that holds more), of all if not.
    """
    owners, moves = [-1] * len(layouts), [False] * len(layouts)
    loads = [0.0] * (ranks * replicas)
    open_: list[tuple[float, int, Sequence[int]]] = []
    for i, layout in enumerate(layouts):
        holders = holders_of(layout.storage()) if ranks > 1 else (0,)
        moves[i] = len(holders) > 1
        if gram and gram[i]:
            moves[i] = not slabs(layout, ranks).still
            open_.append((-(load or polynomial_cost)(layout.matrix.shape), i, range(ranks)))
        elif replicas > 1 or moves[i]:
            open_.append((-(load or cost)(layout.matrix.shape), i, holders))
        else:
            owners[i] = holders[0]
            loads[owners[i]] += (load or cost)(layout.matrix.shape)
    heaps: dict[Hashable, list[tuple[float, int, int]]] = {}  # one for all that may go to the same
    for negative, i, holders in sorted(open_, key=lambda item: item[:2]):
        anywhere = ranks == 1 or len(holders) > max(2, ranks // 2)
        storage = () if anywhere and not homes else layouts[i].storage()
        home = homes[i] if homes else None
        key = (storage, home, anywhere)
        if key not in heaps:
            held = _held(storage)
            heaps[key] = [
                (loads[k * ranks + r], -held.get(r, 0), k * ranks + r)
                for k in (range(replicas) if home is None else (home,))
                for r in (range(ranks) if anywhere else holders)
            ]
            heapq.heapify(heaps[key])
        owners[i] = _least_loaded(heaps[key], loads)
        loads[owners[i]] -= negative
    return owners, moves, loads


def _held(storage: Sequence[Tile]) -> dict[int, int]:
    """How many elements of the tiles each rank stores, of those that store any."""
    held: dict[int, int] = {}
    for rank, begin, end in (part for tile in storage for part in tile.parts()):
        held[rank] = held.get(rank, 0) + end - begin
    return held


def _least_loaded(heap: list[tuple[float, int, int]], loads: Sequence[float]) -> int:
    """The first owner of a heap of (load, tie, owner), whose loads may be of before they grew."""
    while heap[0][0] != loads[heap[0][2]]:
        _, tie, owner = heap[0]
        heapq.heapreplace(heap, (loads[owner], tie, owner))
    return heap[0][2]


def owner_buckets(
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


def gram_buckets(
    layouts: Sequence[Layout], indices: list[int], owners: Sequence[int], numel: int, ranks: int
) -> Iterator[dict[int, list[int]]]:
    """``owner_buckets`` of ``gram``: each replica's matrices in runs of which no rank has too much.

    In the order in which owners were chosen, so that the polynomials of a run are spread.
    """
    queues: dict[int, list[list[int]]] = {}
    filled: dict[int, int] = {}
    for i in sorted(indices, key=lambda i: (-polynomial_cost(layouts[i].matrix.shape), i)):
        replica, more = owners[i] // ranks, gram_bucket_elements(layouts[i].matrix.shape, ranks)
        runs = queues.setdefault(replica, [])
        if not runs or filled[replica] + more > numel:
            runs.append([])
            filled[replica] = 0
        runs[-1].append(i)
        filled[replica] += more
    for k in range(max(map(len, queues.values()), default=0)):
        bucket: dict[int, list[int]] = {}
        for i in (i for runs in queues.values() if k < len(runs) for i in runs[k]):
            bucket.setdefault(owners[i], []).append(i)
        yield dict(sorted(bucket.items()))


def make_plan(
    layouts: Sequence[Layout],
    ranks: int,
    bucket_numel: int,
    replicas: int = 1,
    *,
    gram: Sequence[bool] = (),
    homes: Sequence[int] = (),
    load: Callable[[tuple[int, int]], float] | None = None,
) -> Plan:
    """Owners and buckets. A bucket holds at most ``bucket_numel`` elements (or one matrix) a rank.

    ``ranks`` are those of one replica. Buckets that move come after the first one that does not,
    so that their first exchange is in flight while that one is computed. ``gram``, ``homes`` and
    ``load``: as ``choose_owners``; a matrix that one rank holds whole is no matter for ``gram``.
    """
    cut = [len(holders_of(x.storage())) > 1 for x in layouts] if any(gram) else []
    gram = [wanted and apart for wanted, apart in zip(gram, cut, strict=True)] if cut else []
    owners, moves, loads = choose_owners(layouts, ranks, replicas, gram, homes, load)
    # every replica gets the directions of all of them: share the bound among replicas
    limit = max(1, bucket_numel // replicas)
    at_rest, in_motion = (
        [Bucket(c, moving) for c in owner_buckets(layouts, found, owners, limit)]
        + [Bucket(c, moving, True) for c in gram_buckets(layouts, slabbed, owners, limit, ranks)]
        for moving in (False, True)
        for found, slabbed in [_split_by_strategy(moves, moving, gram)]
    )
    buckets = (*at_rest[:1], *in_motion, *at_rest[1:])
    strategies = tuple(
        "gram" if gram and gram[i] else "owner" if m else "local" for i, m in enumerate(moves)
    )
    return Plan(tuple(owners), buckets, tuple(loads), strategies)


def _split_by_strategy(
    moves: Sequence[bool], moving: bool, gram: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Indices of the matrices that move, or of those that do not: whole, and in slabs."""
    found = [i for i, m in enumerate(moves) if m == moving]
    return [i for i in found if not (gram and gram[i])], [i for i in found if gram and gram[i]]

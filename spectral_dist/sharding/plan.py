"""Who orthogonalizes each matrix, and in which bucket. Computed once, the same on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from spectral_dist.sharding.boxes import slabs
from spectral_dist.sharding.layout import Layout, Tile, holders_of
from spectral_dist.sharding.teams import seat


@dataclass(frozen=True)
class Bucket:
    """Matrices that are exchanged and computed together.

    Attributes:
        matrices: the indices of each owner's matrices.
        moves: whether any of them must be exchanged, the same on every rank: whether it is cut
            among several ranks, or under ``gram`` is not stored in its slabs.
        gram: whether they are orthogonalized in slabs, by strategy ``gram``.
        team: under strategy ``split``, how many ranks work on each of them in slabs; else 1. The
            team of an owner are its neighbours from a multiple of this number on: ranks of its
            replica, or replicas if each has one rank.
        in_turn: whether each replica in turn sends its directions to all others, as all of them
            together would take too much memory.
    """

    matrices: dict[int, list[int]]
    moves: bool
    gram: bool = False
    team: int = 1
    in_turn: bool = False


@dataclass(frozen=True)
class Plan:
    """The owner and strategy of each matrix, and the buckets in the order in which they are run.

    Owners and loads count ranks replica by replica: rank r of replica k is k * ranks + r. Under
    ``gram`` all ranks of the owner's replica work on the matrix, and its owner evaluates the
    polynomial. Under ``split`` the ranks of the owner's team share all work.

    Attributes:
        owners: the owner of each layout's matrix.
        buckets: all matrices, in the order in which they are exchanged and computed.
        loads: each rank's Newton-Schulz cost per step, in multiply-adds (of ``gram`` matrices, that
            of their polynomials); or the sum of the loads that ``make_plan`` was given.
        strategies: of each matrix: 'owner', 'gram', 'split', or 'local' where one rank holds it
            whole.
    """

    owners: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    loads: tuple[float, ...]
    strategies: tuple[str, ...]

    @property
    def imbalance(self) -> float:
        """Return the largest load over the mean load; 1 is perfect."""
        return max(self.loads) * len(self.loads) / sum(self.loads)


AT_ONCE = 2
"""How many times a bucket's bound the directions are that are gathered from replicas at once."""
LEAST_BUCKET = 2**20
"""Elements of a bucket that are never too many to be gathered."""


def cost(shape: tuple[int, int]) -> float:
    """Return the multiply-adds of one Newton-Schulz step: s^2 (2 l + s), s short side, l long."""
    short, long = sorted(shape)
    return float(short * short * (2 * long + short))


def polynomial_cost(shape: tuple[int, int]) -> float:
    """Return the multiply-adds of one Newton-Schulz step on the short side's Gram matrix, 4 s^3."""
    return 4.0 * min(shape) ** 3


def gram_bucket_elements(shape: tuple[int, int], ranks: int) -> int:
    """Return the elements that a rank holds of one ``gram`` matrix of a bucket: its slab and Grams.

    The Gram matrix counts twice, as a square and as halves, of numbers twice as wide as the wire's.
    """
    return -(-shape[0] * shape[1] // ranks) + 4 * min(shape) ** 2


def split_bucket_elements(shape: tuple[int, int], team: int) -> int:
    """Return the elements that a rank holds of one ``split`` matrix of a bucket.

    Its slab counts once; so do the Gram matrix in numbers twice as wide as the wire's, that in the
    wire's and the polynomial.
    """
    return -(-shape[0] * shape[1] // team) + 4 * min(shape) ** 2


def first_of(owner: int, ranks: int, team: int) -> int:
    """Return the first rank of an owner's team; ranks are counted replica by replica.

    Args:
        owner: of a matrix.
        ranks: the number of ranks of one replica.
        team: the number of ranks of the team.
    """
    return owner - (owner % ranks if ranks > 1 else owner) % team


def choose_owners(
    layouts: Sequence[Layout],
    ranks: int,
    replicas: int = 1,
    gram: Sequence[bool] = (),
    required_replicas: Sequence[int] = (),
    load: Sequence[float] = (),
    teams: Sequence[int] = (),
) -> tuple[list[int], list[bool], list[float]]:
    """Choose the owner of each matrix by longest processing time.

    A matrix that one rank holds whole stays with it (in one of its replicas). The others go,
    costliest first, to the least loaded rank: among the ranks that hold a part, if they are few (of
    two with equal loads, to the one that holds more), else among all ranks.

    Args:
        layouts: of all matrices.
        ranks: the number of ranks of one replica.
        replicas: the number of replicas.
        gram: whether each matrix is orthogonalized in slabs, so that any rank may own its
            polynomial; empty: none is.
        required_replicas: the replica that must work on each matrix; empty: any replica may.
        load: of each matrix, for each rank that works on it; empty: ``cost``, ``polynomial_cost``.
        teams: how many ranks work on each matrix; empty: one. Those of several are given to ranks
            first.

    Returns:
        For each matrix its owner, and whether it must be exchanged; and each rank's load. Ranks are
        counted replica by replica, as in ``Plan``.
    """
    owners, moves, loads = [-1] * len(layouts), [False] * len(layouts), [0.0] * (ranks * replicas)
    unassigned: list[tuple[float, int, Sequence[int]]] = []  # (-load, index, possible owners)
    load = load or _multiply_adds(layouts, gram, teams)
    if teams:
        loads = _seat_teams(load, teams, ranks, replicas, owners)
    for i, layout in enumerate(layouts):
        if owners[i] >= 0:
            moves[i] = ranks > 1
            continue
        holders = holders_of(layout.storage()) if ranks > 1 else (0,)
        moves[i] = len(holders) > 1
        if gram and gram[i]:
            moves[i] = not slabs(layout, ranks).in_place
            unassigned.append((-load[i], i, range(ranks)))
        elif replicas > 1 or moves[i]:
            unassigned.append((-load[i], i, holders))
        else:
            owners[i] = holders[0]
            loads[owners[i]] += load[i]
    # one heap for all matrices that have the same possible owners and ties
    heaps: dict[Hashable, list[tuple[float, int, int]]] = {}
    for negative_load, i, holders in sorted(unassigned, key=lambda item: item[:2]):
        any_owner = ranks == 1 or len(holders) > max(2, ranks // 2)
        storage = () if any_owner and not required_replicas else layouts[i].storage()
        required = required_replicas[i] if required_replicas else None
        key = (storage, required, any_owner)
        if key not in heaps:
            numel_of = _stored_elements(storage)
            heaps[key] = [
                (loads[k * ranks + r], -numel_of.get(r, 0), k * ranks + r)
                for k in (range(replicas) if required is None else (required,))
                for r in (range(ranks) if any_owner else holders)
            ]
            heapq.heapify(heaps[key])
        owners[i] = _least_loaded(heaps[key], loads)
        loads[owners[i]] -= negative_load
    return owners, moves, loads


def _multiply_adds(
    layouts: Sequence[Layout], gram: Sequence[bool], teams: Sequence[int]
) -> list[float]:
    """Return the multiply-adds of each matrix on each rank that works on it."""
    gram, teams = gram or [False] * len(layouts), teams or [1] * len(layouts)
    return [
        (polynomial_cost if in_slabs else cost)(layout.matrix.shape) / size
        for layout, in_slabs, size in zip(layouts, gram, teams, strict=True)
    ]


def _seat_teams(
    load: Sequence[float], teams: Sequence[int], ranks: int, replicas: int, owners: list[int]
) -> list[float]:
    """Write the owners of matrices that several ranks work on, and return the ranks' loads.

    Owners of a team's matrices take turns: they keep what state belongs to an owner.
    """
    length, rows = (ranks, replicas) if ranks > 1 else (replicas, 1)
    indices = [i for i, size in enumerate(teams) if size > 1]
    sizes = [teams[i] for i in indices]
    firsts, loads = seat([load[i] for i in indices], sizes, length, rows)
    turns: dict[tuple[int, int], int] = {}
    for i, size, first in zip(indices, sizes, firsts, strict=True):
        turn = turns.get((first, size), 0)
        owners[i], turns[first, size] = first + turn % size, turn + 1
    return loads


def _stored_elements(storage: Sequence[Tile]) -> dict[int, int]:
    """Return {rank: how many elements of the tiles it stores}, without ranks that store none."""
    numel_of: dict[int, int] = {}
    for rank, begin, end in (part for tile in storage for part in tile.parts()):
        numel_of[rank] = numel_of.get(rank, 0) + end - begin
    return numel_of


def _least_loaded(heap: list[tuple[float, int, int]], loads: Sequence[float]) -> int:
    """Return the owner of least load in a heap of (load, tie, owner), after bringing it up to date.

    Args:
        heap: its loads may be older, and so lower, than ``loads``; they are replaced on the way.
        loads: the current load of each rank.
    """
    while heap[0][0] != loads[heap[0][2]]:
        _, tie, owner = heap[0]
        heapq.heapreplace(heap, (loads[owner], tie, owner))
    return heap[0][2]


def owner_buckets(
    layouts: Sequence[Layout], indices: list[int], owners: Sequence[int], numel: int
) -> Iterator[dict[int, list[int]]]:
    """Yield buckets of matrices that go whole to their owners.

    Each owner's matrices are cut into chunks of at most ``numel`` elements (or one matrix); the
    k-th bucket is the k-th chunk of every owner. The costliest come first, so that the k-th chunks
    cost about the same everywhere; equal shapes are neighbours, so that a chunk holds few batches.

    Args:
        layouts: of all matrices.
        indices: of the matrices that are to be put into buckets.
        owners: of all matrices.
        numel: the most elements of a bucket on one owner.

    Yields:
        {owner: indices of its matrices} of one bucket.
    """
    chunks_of: dict[int, list[list[int]]] = {}
    filled: dict[int, int] = {}
    for i in sorted(
        indices, key=lambda i: (-cost(layouts[i].matrix.shape), layouts[i].matrix.shape, i)
    ):
        owner, size = owners[i], layouts[i].matrix.numel
        chunks = chunks_of.setdefault(owner, [])
        if not chunks or filled[owner] + size > numel:
            chunks.append([])
            filled[owner] = 0
        chunks[-1].append(i)
        filled[owner] += size
    for k in range(max(map(len, chunks_of.values()), default=0)):
        yield {owner: chunks[k] for owner, chunks in sorted(chunks_of.items()) if k < len(chunks)}


def slab_buckets(
    layouts: Sequence[Layout],
    indices: Sequence[int],
    owners: Sequence[int],
    numel: int,
    team_of: Callable[[int], int],
    elements: Callable[[tuple[int, int]], int],
) -> Iterator[dict[int, list[int]]]:
    """Yield buckets of matrices on each of which several ranks work, in slabs.

    The matrices of the same ranks are cut into chunks of which no rank holds more than ``numel``
    elements (or one matrix); the k-th bucket is the k-th chunk of all. They come in the order in
    which owners were chosen, so that a chunk's polynomials are spread over the ranks.

    Args:
        layouts: of all matrices.
        indices: of the matrices that are to be put into buckets.
        owners: of all matrices.
        numel: the most elements of a bucket on one rank.
        team_of: from an owner to a number of the ranks that work on its matrices.
        elements: from a shape to the elements of a matrix that count for a rank.

    Yields:
        {owner: indices of its matrices} of one bucket.
    """
    chunks_of: dict[int, list[list[int]]] = {}
    filled: dict[int, int] = {}
    for i in sorted(indices, key=lambda i: (-polynomial_cost(layouts[i].matrix.shape), i)):
        team, size = team_of(owners[i]), elements(layouts[i].matrix.shape)
        chunks = chunks_of.setdefault(team, [])
        if not chunks or filled[team] + size > numel:
            chunks.append([])
            filled[team] = 0
        chunks[-1].append(i)
        filled[team] += size
    for k in range(max(map(len, chunks_of.values()), default=0)):
        bucket: dict[int, list[int]] = {}
        for i in (i for chunks in chunks_of.values() if k < len(chunks) for i in chunks[k]):
            bucket.setdefault(owners[i], []).append(i)
        yield dict(sorted(bucket.items()))


def _is_too_much(
    layouts: Sequence[Layout],
    chunk: dict[int, list[int]],
    ranks: int,
    replicas: int,
    team: int,
    bucket_numel: int,
) -> bool:
    """Return whether a bucket's directions are too many to be gathered from all replicas at once.

    A gather brings as many from each replica as from the one that has most.

    Args:
        layouts: of all matrices.
        chunk: the indices of each owner's matrices.
        ranks: the number of ranks of one replica, which share its matrices.
        replicas: the number of replicas.
        team: how many ranks work on each matrix.
        bucket_numel: the most elements of a bucket on a rank.
    """
    of_replica: dict[int, float] = {}
    for owner, matrices in chunk.items():
        numel = sum(layouts[i].matrix.numel for i in matrices) / ranks
        shared = team if ranks == 1 else 1
        first = first_of(owner, ranks, team) // ranks
        for k in range(first, first + shared):
            of_replica[k] = of_replica.get(k, 0.0) + numel / shared
    gathered = replicas * max(of_replica.values(), default=0.0)
    return replicas > 1 and gathered > AT_ONCE * max(bucket_numel, LEAST_BUCKET)


def make_plan(
    layouts: Sequence[Layout],
    ranks: int,
    bucket_numel: int,
    replicas: int = 1,
    *,
    gram: Sequence[bool] = (),
    required_replicas: Sequence[int] = (),
    load: Sequence[float] = (),
    teams: Sequence[int] = (),
) -> Plan:
    """Choose the owners of matrices and divide them into buckets.

    Buckets that move come after the first one that does not, so that their first exchange is in
    flight while that one is computed.

    Args:
        layouts: of all matrices, equal on all ranks.
        ranks: the number of ranks of one replica.
        bucket_numel: the most elements (or one matrix) that a rank has of a bucket.
        replicas: the number of replicas.
        gram, required_replicas, load, teams: as in ``choose_owners``; ``gram`` has no effect on a
            matrix that one rank holds whole.
    """
    is_cut = [len(holders_of(x.storage())) > 1 for x in layouts] if any(gram) else []
    gram = [wanted and cut for wanted, cut in zip(gram, is_cut, strict=True)] if is_cut else []
    owners, moves, loads = choose_owners(
        layouts, ranks, replicas, gram, required_replicas, load, teams
    )
    teams = teams or [1] * len(layouts)
    # every replica receives the directions of all replicas' matrices: they share the bound
    limit = max(1, bucket_numel // replicas)
    strategies = [
        "split" if teams[i] > 1 else "gram" if gram and gram[i] else "owner" if m else "local"
        for i, m in enumerate(moves)
    ]

    def buckets_of(moving: bool) -> Iterator[Bucket]:
        """Yield the buckets that are exchanged, or the others; the largest teams come first."""
        by_strategy: dict[tuple[int, bool], list[int]] = {}
        for i, strategy in enumerate(strategies):
            if moves[i] == moving:
                by_strategy.setdefault((-teams[i], strategy == "gram"), []).append(i)
        for (negative_size, is_gram), indices in sorted(by_strategy.items()):
            size = -negative_size
            if size > 1:
                chunks = slab_buckets(
                    layouts, indices, owners, limit, partial(first_of, ranks=ranks, team=size),
                    partial(split_bucket_elements, team=size),
                )  # fmt: skip
            elif is_gram:
                chunks = slab_buckets(
                    layouts, indices, owners, limit, lambda owner: owner // ranks,
                    partial(gram_bucket_elements, ranks=ranks),
                )  # fmt: skip
            else:
                chunks = owner_buckets(layouts, indices, owners, limit)
            for chunk in chunks:
                in_turn = _is_too_much(layouts, chunk, ranks, replicas, size, bucket_numel)
                yield Bucket(chunk, moving, is_gram, size, in_turn)

    local, communicated = ([*buckets_of(moving)] for moving in (False, True))
    buckets = (*local[:1], *communicated, *local[1:])
    return Plan(tuple(owners), buckets, tuple(loads), tuple(strategies))

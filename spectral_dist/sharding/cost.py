"""What a step of each strategy takes, in seconds, on a machine of four numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectral_dist.machine import Machine
from spectral_dist.sharding.boxes import slabs
from spectral_dist.sharding.layout import Layout
from spectral_dist.sharding.plan import cost, polynomial_cost


@dataclass(frozen=True)
class CostContext:
    """What the cost of a matrix depends on beside its shape.

    ranks: of one replica. steps: of the iteration. itemsize: bytes of an element on the wire.
    half: whether the polar factor is computed in half precision. gram_itemsize: bytes of a Gram's.
    """

    ranks: int
    replicas: int
    steps: int
    itemsize: int
    half: bool
    gram_itemsize: int


def owner_seconds(shape: tuple[int, int], count: int, job: CostContext, machine: Machine) -> float:
    """Of ``count`` matrices of one shape that are spread over owners.

    The busiest owner has ceil(count / ranks) of them: it computes their steps, and takes in and
    sends out each of them. Two collectives.
    """
    busiest = -(-count // (job.ranks * job.replicas))
    flops = machine.flops if job.half else machine.flops_wide
    moved = 2 * shape[0] * shape[1] * job.itemsize / machine.bandwidth
    return busiest * (job.steps * cost(shape) / flops + moved) + 2 * machine.latency


def gram_seconds(
    shape: tuple[int, int], count: int, still: bool, job: CostContext, machine: Machine
) -> float:
    """Of ``count`` matrices of one shape that stay in slabs.

    Each replica does its share of them: every rank multiplies its slabs twice, s^2 l / P each; the
    busiest owner evaluates polynomials; the halves of Grams and of their functions travel, and the
    slabs there and back if they are not where the elements are. Four collectives.
    """
    short, long = sorted(shape)
    mine = -(-count // job.replicas)
    others = (job.ranks - 1) / job.ranks
    products = mine * 2 * short * short * long / job.ranks
    polynomials = -(-mine // job.ranks) * job.steps * polynomial_cost(shape)
    sent = mine * others * short * (short + 1) * job.gram_itemsize
    if not still:
        sent += 2 * others * mine * short * long / job.ranks * job.itemsize
    computed = (products + polynomials) / machine.flops_wide
    return computed + sent / machine.bandwidth + 4 * machine.latency


def subspace_seconds(
    shape: tuple[int, int], rank: int, count: int, job: CostContext, machine: Machine
) -> tuple[float, float]:
    """Of ``count`` matrices whose rule works in a subspace of this rank: (at owners, in slabs).

    What travels alone: an owner takes in and sends out whole matrices, while of slabs rank x short
    numbers go to the owner and back. The rare refreshes are left out.
    """
    short, long = sorted(shape)
    busiest = -(-count // (job.ranks * job.replicas))
    whole = 2 * busiest * short * long * job.itemsize / machine.bandwidth
    mine = -(-count // job.replicas)
    others = (job.ranks - 1) / job.ranks
    small = 2 * others * mine * rank * short * job.itemsize / machine.bandwidth
    return whole + 2 * machine.latency, small + 2 * machine.latency


def cheaper_in_slabs(
    layouts: Sequence[Layout], able: Sequence[bool], job: CostContext, machine: Machine
) -> list[bool]:
    """Of each matrix, whether ``auto`` does it in slabs.

    If it is ``able``, the cost says so, and tensor parallelism has cut it into slabs already. FSDP
    and ZeRO cut as well, but tell of no blocks: there the owner's bits are those of one process.
    """

    def seconds(shape: tuple[int, int], count: int) -> tuple[float, float]:
        whole = owner_seconds(shape, count, job, machine)
        return whole, gram_seconds(shape, count, True, job, machine)

    return in_slabs_if_cheaper(layouts, able, job.ranks, seconds)


def in_slabs_if_cheaper(
    layouts: Sequence[Layout],
    able: Sequence[bool],
    ranks: int,
    seconds: Callable[[tuple[int, int], int], tuple[float, float]],
) -> list[bool]:
    """``cheaper_in_slabs`` by (shape, how many) -> seconds (at owners, in slabs)."""
    found: dict[tuple[int, int], list[int]] = {}
    for i, layout in enumerate(layouts):
        cut = len({tile.block for tile in layout.tiles}) > 1
        if able[i] and cut and slabs(layout, ranks).still:
            found.setdefault(layout.matrix.shape, []).append(i)
    result = [False] * len(layouts)
    for shape, indices in found.items():
        at_owners, in_slabs = seconds(shape, len(indices))
        if in_slabs < at_owners:
            for i in indices:
                result[i] = True
    return result

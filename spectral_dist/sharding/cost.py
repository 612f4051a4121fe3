"""What a step of each strategy takes, in seconds, on a machine of a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_dist.machine import Machine
from spectral_dist.sharding.boxes import slabs
from spectral_dist.sharding.hosts import Grid
from spectral_dist.sharding.layout import Layout
from spectral_dist.sharding.plan import cost, polynomial_cost


@dataclass(frozen=True)
class CostContext:
    """What the cost of a matrix depends on, other than its shape.

    Attributes:
        ranks: the number of ranks of one replica.
        replicas: the number of replicas.
        steps: Newton-Schulz steps.
        itemsize: bytes of an element on the wire.
        half: whether polar factors are computed in half precision.
        gram_itemsize: bytes of an element of a Gram matrix on the wire.
    """

    ranks: int
    replicas: int
    steps: int
    itemsize: int
    half: bool
    gram_itemsize: int


def owner_seconds(shape: tuple[int, int], count: int, job: CostContext, machine: Machine) -> float:
    """Estimate the seconds of a step on ``count`` matrices of one shape under strategy ``owner``.

    The busiest owner has ceil(count / ranks) of them, over all replicas: it computes their steps,
    receives each of them and sends it back. Two collectives.
    """
    busiest = -(-count // (job.ranks * job.replicas))
    flops = machine.flops if job.half else machine.flops_wide
    moved = 2 * shape[0] * shape[1] * job.itemsize / machine.bandwidth
    return busiest * (job.steps * cost(shape) / flops + moved) + 2 * machine.latency


def gram_seconds(
    shape: tuple[int, int], count: int, in_place: bool, job: CostContext, machine: Machine
) -> float:
    """Estimate the seconds of a step on ``count`` matrices of one shape under strategy ``gram``.

    Each replica works on its share of them: every rank multiplies its slabs twice, s^2 l / P each;
    the busiest owner evaluates polynomials; the halves of Grams and of their polynomials travel,
    and the slabs both ways unless they are stored ``in_place``. Four collectives.

    Args:
        shape: of each matrix.
        count: the number of matrices.
        in_place: whether ranks store the slabs that they work on.
        job: ranks, precision and steps.
        machine: the speeds.
    """
    short, long = sorted(shape)
    per_replica = -(-count // job.replicas)
    remote = (job.ranks - 1) / job.ranks  # the fraction that leaves a rank
    products = per_replica * 2 * short * short * long / job.ranks
    polynomials = -(-per_replica // job.ranks) * job.steps * polynomial_cost(shape)
    sent = per_replica * remote * short * (short + 1) * job.gram_itemsize
    if not in_place:
        sent += 2 * remote * per_replica * short * long / job.ranks * job.itemsize
    computed = (products + polynomials) / machine.flops_wide
    return computed + sent / machine.bandwidth + 4 * machine.latency


def split_seconds(
    shape: tuple[int, int],
    team: int,
    squares: int,
    in_host: bool,
    job: CostContext,
    machine: Machine,
) -> float:
    """Estimate the seconds of a step on one matrix under strategy ``split``, on a rank of its team.

    Ranks share all products. In each Newton-Schulz step parts of the Gram matrix leave a rank, its
    rows of it, and its rows of the polynomial where this has a square. Shards travel to the team as
    they would to an owner, while other matrices are computed, and are left out. So is that matrices
    of a shape are sent in one collective.

    Args:
        shape: of the matrix.
        team: the number of ranks; for one, what the owner computes.
        squares: in how many steps the polynomial has a square.
        in_host: whether the team lies within one host.
        job: precision and steps.
        machine: the speeds.
    """
    flops = machine.flops if job.half else machine.flops_wide
    computed = job.steps * cost(shape) / (team * flops)
    if team == 1:
        return computed
    bandwidth = machine.bandwidth if in_host else machine.host_bandwidth
    latency = machine.latency if in_host else machine.host_latency
    itemsize = 2 if job.half else job.gram_itemsize
    of_an_element = job.steps * (job.gram_itemsize + itemsize) + squares * itemsize
    sent = (team - 1) / team * min(shape) ** 2 * of_an_element
    calls = 2 * job.steps + squares
    return computed + sent / bandwidth + calls * (latency + (team - 2) * machine.message)


def subspace_seconds(
    shape: tuple[int, int], rank: int, count: int, job: CostContext, machine: Machine
) -> tuple[float, float]:
    """Estimate the seconds of communication for a rule that works in a subspace of a matrix.

    Only what travels is counted: an owner receives and sends whole matrices, while of slabs
    rank x short numbers go to the owner and back. The rare refreshes are left out.

    Args:
        shape: of each matrix.
        rank: the dimension of the subspace.
        count: the number of matrices.
        job: ranks and bytes.
        machine: the speeds.

    Returns:
        The seconds with the matrices at owners, and with the matrices in slabs.
    """
    short, long = sorted(shape)
    busiest = -(-count // (job.ranks * job.replicas))
    whole = 2 * busiest * short * long * job.itemsize / machine.bandwidth
    per_replica = -(-count // job.replicas)
    remote = (job.ranks - 1) / job.ranks  # the fraction that leaves a rank
    projected = 2 * remote * per_replica * rank * short * job.itemsize / machine.bandwidth
    return whole + 2 * machine.latency, projected + 2 * machine.latency


@dataclass(frozen=True)
class ExchangeLoad:
    """What a rank sends in an all-to-all of a group that is a grid of hosts: elements.

    Fields are tensors of one rank, (), or of any ranks.

    Attributes:
        total: all, with what it keeps.
        of_host: for the ranks of its host.
        of_number: for the ranks of its number in each host.
        own: what it keeps.
        messages: the number of other ranks that it sends to.
    """

    total: Tensor
    of_host: Tensor
    of_number: Tensor
    own: Tensor
    messages: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], rank: int, grid: Grid) -> ExchangeLoad:
        """Return the load of one rank.

        Args:
            counts: the elements that it sends to each rank of the group.
            rank: this rank in the group.
            grid: the group's hosts.
        """
        sent = torch.tensor(counts, dtype=torch.float64).view(grid.hosts, grid.size)
        host, number = divmod(rank, grid.size)
        own = sent[host, number]
        messages = (sent > 0).sum() - (own > 0).long()
        return cls(sent.sum(), sent[host].sum(), sent[:, number].sum(), own, messages)


def exchange_seconds(
    load: ExchangeLoad, grid: Grid, itemsize: int, machine: Machine
) -> tuple[Tensor, Tensor]:
    """Estimate the seconds of an all-to-all at once, and in two steps (``two_steps.TwoSteps``).

    In two steps all bytes but those for ranks of this one's number travel within the host first,
    and are put in order twice.

    Args:
        load: of a rank, or of many.
        grid: the group's hosts.
        itemsize: bytes of an element.
        machine: the speeds.
    """
    sent_between = (load.total - load.of_host) * (itemsize / machine.host_bandwidth)
    between = machine.host_latency + sent_between
    within = (load.of_host - load.own) * (itemsize / machine.bandwidth)
    at_once = between + within + (load.messages - 1).clamp(min=0) * machine.message
    first = (load.total - load.of_number) * (itemsize / machine.bandwidth)
    copied = load.total * (4 * itemsize / machine.memory_bandwidth)  # each time read and written
    most = grid.size + grid.hosts - 4  # ranks beyond the first of each step
    in_two = between + machine.latency + first + copied + most * machine.message
    return at_once, in_two


def cheaper_in_slabs(
    layouts: Sequence[Layout], able: Sequence[bool], job: CostContext, machine: Machine
) -> list[bool]:
    """Return for each matrix whether strategy ``auto`` orthogonalizes it in slabs.

    It does if the rule is able to, the slabs are estimated to be faster, and tensor parallelism has
    cut the matrix into slabs already. FSDP and ZeRO cut matrices as well, but their layouts have
    no blocks: there the owner's result is bit by bit that of one process.

    Args:
        layouts: of the matrices.
        able: whether the rule can work on each matrix in slabs.
        job: ranks, precision and steps.
        machine: the speeds.
    """

    def seconds(shape: tuple[int, int], count: int) -> tuple[float, float]:
        at_owners = owner_seconds(shape, count, job, machine)
        return at_owners, gram_seconds(shape, count, True, job, machine)

    return in_slabs_if_cheaper(layouts, able, job.ranks, seconds)


def in_slabs_if_cheaper(
    layouts: Sequence[Layout],
    able: Sequence[bool],
    ranks: int,
    seconds: Callable[[tuple[int, int], int], tuple[float, float]],
) -> list[bool]:
    """Return for each matrix whether to orthogonalize it in slabs, by an estimate of seconds.

    Args:
        layouts: of the matrices.
        able: whether the rule can work on each matrix in slabs.
        ranks: the number of ranks that share the matrices.
        seconds: (shape, number of matrices) -> seconds (at owners, in slabs).
    """
    indices_by_shape: dict[tuple[int, int], list[int]] = {}
    for i, layout in enumerate(layouts):
        has_blocks = len({tile.block for tile in layout.tiles}) > 1
        if able[i] and has_blocks and slabs(layout, ranks).in_place:
            indices_by_shape.setdefault(layout.matrix.shape, []).append(i)
    result = [False] * len(layouts)
    for shape, indices in indices_by_shape.items():
        at_owners, in_slabs = seconds(shape, len(indices))
        if in_slabs < at_owners:
            for i in indices:
                result[i] = True
    return result

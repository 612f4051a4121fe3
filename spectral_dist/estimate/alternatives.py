"""Where a plan puts each matrix, why, and what other strategies would take for it alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spectral_dist.estimate.counts import MatrixCounter
from spectral_dist.estimate.prediction import Prediction, device_seconds
from spectral_dist.estimate.traffic import BucketTraffic
from spectral_dist.machine import Machine
from spectral_dist.rules.base import Shape
from spectral_dist.sharding.boxes import slabs
from spectral_dist.sharding.layout import Layout, holders_of
from spectral_dist.sharding.plan import first_of


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix in a plan.

    Attributes:
        name, shape: of the matrix as it is stored.
        strategy: "local", "owner", "gram" or "split".
        owner: the rank of the job that orthogonalizes it, or keeps what state belongs to an owner.
        team: how many ranks work on it.
        holders: how many ranks store a part of it.
        reason: why it is there.
        seconds: {strategy: seconds of this matrix alone}, computation and messages, by each
            strategy that could be taken; "owner" counts for "local" too, without messages.
    """

    name: str
    shape: Shape
    strategy: str
    owner: int
    team: int
    holders: int
    reason: str
    seconds: dict[str, float]


def planned(prediction: Prediction) -> Iterator[PlannedMatrix]:
    """Yield all matrices of a prediction, unit by unit."""
    ranks = prediction.estimate.job.ranks
    for counter in prediction.counters:
        traffic = BucketTraffic(counter, prediction.machine, ranks)
        unit = counter.unit
        numbers = unit.replica_of * counter.ranks + unit.rank_of
        job_rank_of = numbers.argsort().tolist()
        team_of = {
            i: bucket.team
            for bucket in counter.plan.buckets
            for matrices in bucket.matrices.values()
            for i in matrices
        }
        for i, layout in enumerate(counter.layouts):
            yield _planned(counter, i, layout, team_of[i], job_rank_of, traffic)


def _planned(
    counter: MatrixCounter,
    index: int,
    layout: Layout,
    team: int,
    job_rank_of: list[int],
    traffic: BucketTraffic,
) -> PlannedMatrix:
    """Return one matrix of a unit's plan.

    Args:
        counter: of the unit.
        index, layout: of the matrix.
        team: how many ranks work on it, if it is split.
        job_rank_of: the rank of the job by the rank of the unit's ranks.
        traffic: of the unit.
    """
    strategy, owner = counter.plan.strategies[index], counter.plan.owners[index]
    holders = len(holders_of(layout.storage())) if counter.ranks > 1 else 1
    reasons = {
        "local": "one rank stores all of it"
        if counter.replicas == 1
        else f"each of {counter.replicas} replicas has all of it; this one is least loaded",
        "owner": f"least loaded of the {holders} ranks that hold a part"
        if holders <= max(2, counter.ranks // 2)
        else f"least loaded of all {counter.ranks * counter.replicas} ranks",
        "gram": "asked for, or faster in slabs",
        "split": f"more than a rank's share of the work: {team} ranks share it",
    }
    size = team if strategy == "split" else counter.ranks if strategy == "gram" else 1
    first = first_of(owner, counter.ranks, team) if strategy == "split" else owner
    return PlannedMatrix(
        layout.matrix.name, layout.matrix.shape, strategy, job_rank_of[first], size, holders,
        reasons[strategy], _alone(counter, layout, traffic),
    )  # fmt: skip


def _alone(counter: MatrixCounter, layout: Layout, traffic: BucketTraffic) -> dict[str, float]:
    """Return the seconds of one matrix by each strategy, without any other work."""
    machine, wire = traffic.machine, counter.wire.itemsize
    crosses = traffic.num_hosts > 1
    bandwidth = machine.host_bandwidth if crosses else machine.bandwidth
    latency = machine.host_latency if crosses else machine.latency
    is_cut = counter.ranks > 1 and len(holders_of(layout.storage())) > 1
    moved = layout.matrix.numel * wire
    seconds = {"owner": device_seconds(counter.whole(layout), machine)}
    if not is_cut:
        return seconds
    seconds["owner"] += 2 * (moved / bandwidth + latency)
    gram = _in_slabs(counter, layout, machine, bandwidth, latency)
    if gram is not None:
        in_place = slabs(layout, counter.ranks).in_place
        shards = 0.0 if in_place else 2 * (moved / counter.ranks / bandwidth + latency)
        seconds["gram"] = gram + shards
    return seconds


def _in_slabs(
    counter: MatrixCounter, layout: Layout, machine: Machine, bandwidth: float, latency: float
) -> float | None:
    """Return the seconds of a matrix's direction in slabs; None: the rule needs it whole."""
    try:
        probe, _ = counter.slab(layout, True)
    except (ValueError, NotImplementedError):
        return None
    return (
        device_seconds(probe, machine) + probe.sent_bytes / bandwidth + probe.collectives * latency
    )

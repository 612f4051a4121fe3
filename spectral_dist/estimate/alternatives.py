"""Where a plan puts each matrix, why, and what other strategies would take for it alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spectral_dist.core.teams import polynomials
from spectral_dist.estimate.counts import MatrixCounter
from spectral_dist.estimate.prediction import Prediction, device_seconds
from spectral_dist.estimate.slabs import Team
from spectral_dist.estimate.traffic import BucketTraffic
from spectral_dist.machine import Machine
from spectral_dist.rules.base import Shape
from spectral_dist.sharding.layout import Layout, holders_of
from spectral_dist.sharding.plan import Bucket, first_of


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix in a plan.

    Attributes:
        name, shape: of the matrix as it is stored.
        strategy: "local", "owner", "gram" or "split".
        owner: the rank of the job that orthogonalizes it; under "split" the first of those that do.
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
    for counter in prediction.counters:
        traffic = BucketTraffic(counter.unit, counter.teams, prediction.machine)
        job_rank_of = counter.unit.job_rank_of.flatten().tolist()
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
        else f"all of {counter.replicas} replicas have it; the least loaded one takes it",
        "owner": f"least loaded of the {holders} ranks that hold a part"
        if holders <= max(2, counter.ranks // 2)
        else f"least loaded of all {counter.ranks * counter.replicas} ranks",
        "gram": "the strategy is 'gram'"
        if counter.options.strategy == "gram"
        else "predicted to be faster in slabs",
        "split": f"more than a rank's share of the work: {team} ranks share it",
    }
    size = team if strategy == "split" else counter.ranks if strategy == "gram" else 1
    first = first_of(owner, counter.ranks, team) if strategy == "split" else owner
    return PlannedMatrix(
        layout.matrix.name, layout.matrix.shape, strategy, job_rank_of[first], size, holders,
        reasons[strategy], _alone(counter, layout, traffic),
    )  # fmt: skip


def _alone(counter: MatrixCounter, layout: Layout, traffic: BucketTraffic) -> dict[str, float]:
    """Return the seconds of one matrix by each strategy, without any other work.

    It is split over as many ranks as share a host.
    """
    machine = traffic.machine
    link = (machine.host_bandwidth, machine.host_latency)
    if traffic.num_hosts == 1:
        link = (machine.bandwidth, machine.latency)
    shape = layout.matrix.read_shape
    is_cut = counter.ranks > 1 and len(holders_of(layout.storage())) > 1
    moved = layout.matrix.numel * counter.wire.itemsize * is_cut
    seconds = {"owner": device_seconds(counter.whole(layout), machine, shape)}
    seconds["owner"] += 2 * (moved / link[0] + link[1] * is_cut)
    if is_cut:
        team = Team.of(Bucket({}, True, gram=True), layout, 0, counter.ranks, counter.replicas)
        in_slabs = _in_slabs(counter, layout, team, machine, link)
        if in_slabs is not None:
            shards = 0.0 if team.cut.in_place else moved / counter.ranks / link[0] + link[1]
            seconds["gram"] = in_slabs + 2 * shards
    size = traffic.host_team
    spec = counter.rule.polar(counter.options, shape)
    able = is_cut if counter.ranks > 1 else layout.stacked()
    if size > 1 and able and polynomials(spec) is not None:
        team = Team.of(Bucket({}, True, team=size), layout, 0, counter.ranks, counter.replicas)
        near = (machine.bandwidth, machine.latency)
        split = _in_slabs(counter, layout, team, machine, near)
        if split is not None:
            seconds["split"] = split + 2 * (moved / size / link[0] + link[1] * is_cut)
    return seconds


def _in_slabs(
    counter: MatrixCounter,
    layout: Layout,
    team: Team,
    machine: Machine,
    link: tuple[float, float],
) -> float | None:
    """Return the seconds of the slowest of a team; None: the rule needs whole matrices.

    Args:
        counter: of the unit.
        layout: of the matrix.
        team: that works on it.
        machine: the speeds.
        link: bytes/s and latency of what the team sends.
    """
    try:
        counts = counter.members(layout, team)
    except ValueError:
        return None
    sent = counts.sent_bytes / link[0] + counts.collectives * link[1]
    return float((device_seconds(counts, machine, layout.matrix.shape) + sent).max())

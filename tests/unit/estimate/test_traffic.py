"""What travels for a bucket against the counts of the routes that training builds for each rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_dist.estimate import Job
from spectral_dist.estimate.counts import MatrixCounter
from spectral_dist.estimate.prediction import predict
from spectral_dist.estimate.traffic import BucketTraffic
from spectral_dist.machine import Machine
from spectral_dist.sharding.bucket_routes import route_to_owners
from spectral_dist.sharding.cost import ExchangeLoad, exchange_seconds
from spectral_dist.sharding.plan import Bucket
from spectral_dist.sharding.slabs import route_to_slabs
from tests.support import models


def model() -> nn.Module:
    with torch.device("meta"):
        return models.build(width=24, hidden=56, layers=3, odd=True)


def counts(counter: MatrixCounter, bucket: Bucket, replica: int) -> Tensor:
    """The elements that each rank of a replica sends to each, (ranks, ranks)."""
    rows = []
    for rank in range(counter.ranks):
        given = (bucket, counter.layouts, rank, counter.ranks, replica, counter.replicas)
        if bucket.gram or bucket.team > 1:
            route, _ = route_to_slabs(*given)
        else:
            route = route_to_owners(*given)
        rows.append(route.send_counts)
    return torch.tensor(rows)


def hosts_of_two(sent: Tensor) -> dict[str, Tensor]:
    """What leaves each rank at once, and in the two steps, by a list of all messages."""
    ranks = len(sent)
    left = {name: torch.zeros(ranks, dtype=torch.int64) for name in ("near", "far", "one", "two")}
    for source in range(ranks):
        for target in range(ranks):
            n, way = int(sent[source, target]), source // 2 * 2 + target % 2
            left["near" if source // 2 == target // 2 else "far"][source] += n * (source != target)
            left["one"][source] += n * (way != source)  # to the rank of the target's number
            left["two"][way] += n * (way != target)
    return left


@pytest.mark.parametrize("strategy", ["owner", "gram", "split"])
@pytest.mark.parametrize(
    ("engine", "ranks"),
    [(engine, ranks) for engine in ("fsdp", "zero1", "zero3") for ranks in (4, 6, 8)]
    + [("hsdp", 4), ("hsdp", 8)],
)
def test_what_each_rank_sends(engine: str, strategy: str, ranks: int) -> None:
    sizes = {"nodes": 2} if engine == "hsdp" else {}
    options: dict[str, Any] = {"strategy": strategy, "bucket_mb": 0.01}
    prediction = predict(
        model(), Job.from_user(engine, dp=ranks, **sizes), Machine(), "muon", options
    )
    machine = Machine(ranks_per_host=2)
    for counter in prediction.counters:
        traffic = BucketTraffic(counter.unit, counter.teams, machine)
        assert (traffic.grid is None) == (counter.ranks == 2)
        for bucket in (bucket for bucket in counter.plan.buckets if bucket.moves):
            collected = traffic.collected(bucket)
            for replica in range(counter.replicas):
                sent = counts(counter, bucket, replica)
                there, back = hosts_of_two(sent), hosts_of_two(sent.T)
                names = {False: ("near", "far"), True: ("one", "two")}
                for in_two in (False, True) if traffic.grid else (False,):
                    for name, found in zip(names[in_two], collected.sent(in_two), strict=True):
                        assert found[replica].tolist() == (there[name] + back[name]).tolist()
                if traffic.grid is not None:
                    check_seconds(collected.load, sent, replica, traffic)


def test_exchanges_go_at_once_where_messages_cost_little() -> None:
    """A machine alone changes no byte; messages that take long make some travel twice."""
    job = Job.from_user("fsdp", dp=4)
    moved = [
        int(predict(model(), job, Machine(), "muon", {"strategy": "owner", **more})
            .estimate.by_rank["moved"].sum())
        for more in (
            {}, {"machine": {"ranks_per_host": 2, "message": 1e-12}},
            {"machine": {"ranks_per_host": 2, "message": 1.0}},
        )
    ]  # fmt: skip
    assert moved[0] == moved[1] < moved[2]


def check_seconds(load: ExchangeLoad, sent: Tensor, replica: int, traffic: BucketTraffic) -> None:
    """Against the loads that training makes of each rank's own counts."""
    assert traffic.grid is not None
    for way, table in enumerate((sent, sent.T)):
        found = exchange_seconds(load, traffic.grid, 2, traffic.machine)
        for rank, row in enumerate(table.tolist()):
            own = ExchangeLoad.of(row, rank, traffic.grid)
            wanted = exchange_seconds(own, traffic.grid, 2, traffic.machine)
            for all_ranks, one in zip(found, wanted, strict=True):
                assert float(all_ranks[way, replica, rank]) == pytest.approx(float(one))

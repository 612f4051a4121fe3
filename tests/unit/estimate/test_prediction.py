"""Predictions of a step against what is counted and reckoned by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from spectral_dist.estimate import Job
from spectral_dist.estimate.alternatives import planned
from spectral_dist.estimate.estimate import AGREEMENT
from spectral_dist.estimate.prediction import (
    PER_BUCKET,
    active_numbers,
    predict,
    training_seconds,
)
from spectral_dist.estimate.timeline import BucketSeconds, finish
from spectral_dist.machine import Machine
from tests.support import models

MACHINE = Machine(ranks_per_host=2, message=0.0)
ZERO = torch.zeros(1, 1, dtype=torch.float64)


def model() -> nn.Module:
    with torch.device("meta"):
        return models.build(width=24, hidden=56, layers=3, odd=True)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "hsdp", "zero1", "zero3"])
@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
def test_bytes_of_links_are_those_of_the_estimate(engine: str, ranks: int, optimizer: str) -> None:
    sizes = {"nodes": 2} if engine == "hsdp" else {}
    job = Job.from_user(engine, dp=ranks, dtype="float32", **sizes)
    prediction = predict(model(), job, MACHINE, optimizer, {"check_finite": False})
    moved = prediction.by_rank["within"] + prediction.by_rank["between"]
    assert moved.tolist() == prediction.estimate.by_rank["moved"].tolist()
    if ranks <= MACHINE.host_size:
        assert not prediction.by_rank["between"].any()


def test_each_pair_of_ranks_is_within_a_host_or_between_two() -> None:
    """Against a list of all messages: every holder to every owner, and back."""
    ranks = 6
    prediction = predict(model(), Job.from_user("fsdp", dp=ranks), MACHINE, "muon")
    (counter,) = prediction.counters
    sent = {place: [0] * ranks for place in ("within", "between")}
    for layout, owner in zip(counter.layouts, counter.plan.owners, strict=True):
        for tile in layout.storage():
            for rank, begin, end in tile.parts():
                place = "within" if rank // 2 == owner // 2 else "between"
                if rank != owner:
                    sent[place][rank] += end - begin
                    sent[place][owner] += end - begin
    for place, elements in sent.items():
        expected = [n * counter.wire.itemsize for n in elements]
        assert prediction.by_rank[place].tolist() == expected


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_of_teams_of_replicas_are_those_of_the_estimate(ranks: int) -> None:
    with torch.device("meta"):
        one = nn.Sequential(nn.Linear(32, 48, bias=False))
    job = Job.from_user("ddp", dp=ranks, dtype="float32")
    options = {"strategy": "split", "check_finite": False}
    prediction = predict(one, job, MACHINE, "muon", options)
    assert [matrix.team for matrix in planned(prediction)] == [ranks]
    moved = prediction.by_rank["within"] + prediction.by_rank["between"]
    assert torch.allclose(moved, prediction.estimate.by_rank["moved"].double())
    # a team of one host sends its products within it, and of two hosts half or more between them
    assert bool(prediction.by_rank["between"].any()) == (ranks > MACHINE.host_size)


def test_an_exchange_takes_two_steps_where_messages_cost_and_a_machine_is_given() -> None:
    """Each of 4 ranks sends 3 messages at once, of which 2 come after the first; in two steps 1."""
    job = Job.from_user("fsdp", dp=4)
    machine = Machine(**{**vars(MACHINE), "message": 1.0})
    options = {"strategy": "owner"}
    at_once, in_two = (
        predict(model(), job, machine, "muon", {**options, **more}).by_rank["exchange"]
        for more in ({}, {"machine": vars(machine)})
    )
    buckets = 1
    assert float(at_once.max()) == pytest.approx(2 * buckets * 2.0, rel=1e-2)
    assert float(in_two.max()) < 0.1


def seconds(values: tuple[float, float, float, float, float | None]) -> BucketSeconds:
    gather, collect, compute, apply = (ZERO + v for v in values[:4] if v is not None)
    spread = None if values[4] is None else ZERO + values[4]
    return BucketSeconds(gather, collect, compute, spread, apply)


def test_one_bucket_takes_the_sum_of_its_stages() -> None:
    one = seconds((1.0, 2.0, 4.0, 8.0, None))
    assert float(finish([one], (1, 1))) == 1 + 2 + 4 + 2 + 8
    assert float(finish([seconds((1.0, 2.0, 4.0, 8.0, 16.0))], (1, 1))) == 1 + 2 + 4 + 2 + 16 + 8


def test_exchange_hides_behind_computation_and_the_other_way_round() -> None:
    """All but the first collection and the last return, or all computation but one."""
    computing = [seconds((0.0, 1.0, 10.0, 0.0, None))] * 10
    assert float(finish(computing, (1, 1))) == 1 + 10 * 10 + 1
    sending = [seconds((0.0, 10.0, 1.0, 0.0, None))] * 10
    assert float(finish(sending, (1, 1))) == pytest.approx(20 * 10, abs=2)


def test_a_collective_waits_for_the_slowest_rank() -> None:
    slow = torch.tensor([[1.0, 5.0]], dtype=torch.float64)
    bucket = BucketSeconds(slow, ZERO + 2, ZERO, None, ZERO)
    assert finish([bucket], (1, 2)).tolist() == [[9.0, 9.0]]  # 5, and twice 2


def test_a_faster_machine_is_faster_in_what_it_is_faster_at() -> None:
    job = Job.from_user("fsdp", dp=4)
    slow = predict(model(), job, MACHINE, "muon")
    parts = {
        "flops": "compute", "host_bandwidth": "exchange", "memory_bandwidth": "memory",
        "launch": "launch",
    }  # fmt: skip
    for number, part in parts.items():
        factor = 0.5 if number == "launch" else 2.0
        machine = Machine(**{**vars(MACHINE), number: factor * getattr(MACHINE, number)})
        fast = predict(model(), job, machine, "muon")
        assert float(fast.by_rank[part].max()) < float(slow.by_rank[part].max()), part
        for other in {"compute", "exchange", "memory", "launch"} - {part}:
            if {number, other} != {"memory_bandwidth", "compute"}:  # polar factors pass memory too
                assert torch.equal(fast.by_rank[other], slow.by_rank[other]), (number, other)


def test_a_training_step_has_three_multiply_adds_for_a_weight_and_token() -> None:
    net = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False))
    job = Job.from_user("fsdp", dp=4)
    machine = Machine(training_flops=10.0)
    assert training_seconds(net, job, machine, 20) == 3 * (8 * 4 + 4 * 2) * 20 / (4 * 10.0)


def test_of_experts_those_count_that_see_a_token() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    numbers = []
    for chosen, experts in itertools.product((1, 2), (4, 8)):
        config = MixtralConfig(
            **sizes, **heads, num_experts_per_tok=chosen, num_local_experts=experts
        )
        with torch.device("meta"):
            net = MixtralForCausalLM(config)
        numbers.append(active_numbers(net))
    one_expert = 3 * 16 * 8
    router = 16 * 4  # 4 experts more
    assert numbers[1] - numbers[0] == numbers[3] - numbers[2] == router
    assert numbers[2] - numbers[0] == one_expert


def test_every_matrix_has_a_place_a_reason_and_its_alternatives() -> None:
    job = Job.from_user("fsdp", dp=4)
    prediction = predict(model(), job, MACHINE, "muon")
    matrices = list(planned(prediction))
    (counter,) = prediction.counters
    assert [m.owner for m in matrices] == list(counter.plan.owners)
    assert {m.strategy for m in matrices} <= {"owner", "local"}
    for matrix in matrices:
        assert matrix.reason
        more = {"gram", "split"} if matrix.holders > 1 else set()
        assert set(matrix.seconds) == {"owner", *more}
    zolo = predict(model(), job, MACHINE, "polargrad", {"polar": "zolo"})
    assert set(next(planned(zolo)).seconds) == {"owner"}  # which needs whole matrices


def test_the_agreement_of_ranks_is_left_out_of_links() -> None:
    job = Job.from_user("fsdp", dp=2)
    prediction = predict(model(), job, MACHINE, "muon")
    moved = prediction.by_rank["within"] + prediction.by_rank["between"]
    assert (prediction.estimate.by_rank["moved"] - moved).tolist() == [AGREEMENT] * 2


@pytest.mark.parametrize("side", [16, 64])
def test_products_of_small_matrices_are_slower(side: int) -> None:
    """At the side of half the speed they take twice as long, at four times it 5 / 4."""
    net = nn.Linear(side, 256, bias=False, device="meta")
    job = Job.from_user("fsdp", dp=2)
    # no memory worth the name: what is left of a direction is products
    fast = {"memory_bandwidth": 1e30}
    large, small = (
        float(
            predict(net, job, Machine(**fast, half_speed_side=half), "muon")
            .by_rank["compute"]
            .max()
        )
        for half in (0.0, 16.0)
    )
    assert small == pytest.approx(large * (1 + 16 / side))


@pytest.mark.parametrize(("side", "batches"), [(32, 1), (128, 6)])
def test_a_cpu_starts_operators_and_runs_them(side: int, batches: int) -> None:
    """In one queue, and of matrices above 64 x 64 those of each."""
    net = nn.Sequential(*[nn.Linear(side, side, bias=False, device="meta") for _ in range(6)])
    job = Job.from_user("fsdp", dp=1, dtype="float32", device="cpu")
    seconds, launch = [], []
    for machine in (Machine(launch=1e-9), Machine(launch=1.0)):
        prediction = predict(net, job, machine, "muon", {"polar_dtype": "float32"})
        seconds.append(prediction.seconds)
        launch.append(float(prediction.by_rank["launch"].max()))
    assert seconds[1] - seconds[0] == pytest.approx(launch[1] - launch[0])
    (counter,) = prediction.counters
    (of_one,) = {counter.whole(layout).operators for layout in counter.layouts}
    assert launch[1] == PER_BUCKET * len(counter.plan.buckets) + batches * of_one


def test_a_side_of_half_the_speed_may_be_0_and_no_speed_may() -> None:
    assert Machine.from_user({"half_speed_side": 0}).half_speed_side == 0
    for name, text in (("half_speed_side", "at least 0"), ("flops", "above 0")):
        for value in (-1.0, 0.0) if name == "flops" else (-1.0, float("inf")):
            with pytest.raises(ValueError, match=f"{name} is .*{text}"):
                Machine.from_user({name: value})

"""Estimates against what is counted by hand, and against the exchange itself for each rank."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist.core.strategy import plan_of
from spectral_dist.estimate import Job, estimate
from spectral_dist.estimate.counts import kept_in_slabs, shares
from spectral_dist.estimate.engines import TensorPlan, place
from spectral_dist.estimate.megatron import in_buckets
from spectral_dist.integrations.huggingface.empty import empty_model
from spectral_dist.params.classify import classify
from spectral_dist.placement.tiles import FlatRange
from spectral_dist.rules import registry
from spectral_dist.sharding.boxes import Ranges, Slabs
from spectral_dist.sharding.bucket_routes import route_to_owners
from spectral_dist.sharding.layout import Cut, Tile
from tests.support import models

WIDTHS = {"width": 24, "hidden": 56, "layers": 3, "odd": True}


LLAMA = {
    "model_type": "llama", "hidden_size": 60, "head_dim": 14, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 92, "vocab_size": 126,
}  # fmt: skip


def model() -> nn.Module:
    with torch.device("meta"):
        return models.build(**WIDTHS)


def job(engine: str, ranks: int, **sizes: Any) -> Job:
    return Job.from_user(engine, dp=ranks, dtype="float32", **sizes)


def test_one_rank_keeps_a_number_for_a_matrix_and_two_for_the_rest() -> None:
    found = estimate(model(), job("fsdp", 1), "muon").by_rank
    specs = [spec for spec in classify(model()) if spec.kind != "frozen"]
    numbers = {"matrix": 0, "scalar": 0}
    for spec in specs:
        numbers[spec.kind] += math.prod(spec.shape)
    state = 4 * (numbers["matrix"] + 2 * numbers["scalar"] + len(specs))
    assert found["optimizer_state"].tolist() == [state]
    assert found["moved"].tolist() == [0]
    assert found["polar_calls"].tolist() == [sum(len(spec.matrices) for spec in specs)]


@pytest.mark.parametrize("engine", ["ddp", "ddp in turn", "fsdp", "zero1", "zero3"])
@pytest.mark.parametrize("ranks", [2, 3, 7, 64])
def test_the_exchange_of_every_rank_sends_as_much(
    engine: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The routes that training builds for each rank have the bytes of the estimate."""
    if engine == "ddp in turn":
        monkeypatch.setattr("spectral_dist.sharding.plan.AT_ONCE", 0)
        engine = "ddp"
    rule = registry.find("muon").rule
    assert rule is not None
    options = rule.options_type.from_user({"bucket_mb": 0.01})
    matrices = [spec for spec in classify(model()) if spec.kind == "matrix"]
    sent = torch.zeros(ranks, dtype=torch.int64)
    for unit in place(job(engine, ranks), matrices, False, TensorPlan({})):
        plan, wire = plan_of(rule(), options, unit.located, torch.float32)
        groups = (1, ranks) if engine == "ddp" else (ranks, 1)
        for job_rank in range(ranks):
            rank, replica = int(unit.rank_of[job_rank]), int(unit.replica_of[job_rank])
            for bucket in plan.buckets:
                route = route_to_owners(
                    bucket, unit.located.layouts, rank, groups[0], replica, groups[1]
                )
                if route.moves:
                    both = sum(route.send_counts) + sum(route.recv_counts)
                    own = route.send_counts[rank] + route.recv_counts[rank]
                    sent[job_rank] += (both - own) * wire.itemsize
                if groups[1] > 1:
                    counts = route.counts_per_replica
                    numel = counts[replica] if bucket.in_turn else max(counts)
                    sent[job_rank] += (groups[1] - 1) * numel * wire.itemsize
    everything = estimate(
        model(), job(engine, ranks), "muon", {"bucket_mb": 0.01, "check_finite": False}
    )
    assert everything.by_rank["moved"].tolist() == sent.tolist()
    assert int(everything.by_rank["polar_calls"].sum()) == sum(len(m.matrices) for m in matrices)


@pytest.mark.parametrize("along", [0, 1])
def test_what_stays_in_its_slab_is_counted_element_by_element(along: int) -> None:
    rows, columns, ranks = 7, 10, 3
    tiles = (
        Tile(0, 0, 7, 4, Cut((0, 5, 19, 28)), 0),
        Tile(0, 4, 7, 6, Cut((0, 30, 31, 42), (1, 0, 2)), 0),
    )
    cut = Slabs(along, Ranges.even((rows, columns)[along], ranks), False)
    expected = [0] * ranks
    for tile in tiles:
        for rank, begin, end in tile.parts():
            low, high = cut.ranges[rank]
            for element in range(begin, end):
                place = tile.row + element // tile.cols, tile.col + element % tile.cols
                expected[rank] += low <= place[along] < high
    assert kept_in_slabs(tiles, cut).tolist() == expected
    assert shares(tiles)[2] == {0: 6, 1: 44, 2: 20}


@pytest.mark.parametrize("method", ["jordan", "gram_jordan"])
def test_flops_of_newton_schulz_are_those_of_the_formula(method: str) -> None:
    """Five steps of s^2 (2 l + s) multiply-adds, of which products of symmetric ones are whole."""
    with torch.device("meta"):
        one = nn.Sequential(nn.Linear(48, 16, bias=False))
    flops = estimate(one, job("fsdp", 1), "muon", {"polar": method}).by_rank["flops"].item()
    by_formula = 2 * 5 * 16**2 * (2 * 48 + 16)
    assert flops == by_formula if method == "jordan" else 0 < flops < by_formula


def test_memory_falls_and_the_optimizers_differ() -> None:
    def state(engine: str, ranks: int, optimizer: str = "muon", **options: object) -> int:
        found = estimate(model(), job(engine, ranks), optimizer, options)
        return int(found.by_rank["optimizer_state"].max())

    assert state("zero1", 8) < state("zero1", 2) < state("zero1", 1)
    assert state("ddp", 4) < state("ddp", 4, replicate_momentum=True) == state("zero0", 4)
    assert state("fsdp", 4, "sumo", rank=2) < state("fsdp", 4)


def test_an_estimate_as_json_has_most_and_mean() -> None:
    found = estimate(model(), job("hsdp", 8, nodes=2), "muon")
    written = found.to_json()
    assert written["job"]["ranks"] == 8
    assert (written["job"]["replicate"], written["job"]["shard"]) == (2, 4)
    calls = written["per_rank"]["polar_calls"]
    assert calls["max"] >= calls["mean"] == found.by_rank["polar_calls"].double().mean()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Job.from_user("zero4", dp=2), "did you mean"),
        (lambda: Job.from_user("megatron", dp=3, ep=2), "no multiple of ep"),
        (lambda: Job.from_user("megatron", dp=3, tp=2, ep=2, etp=2), "no multiple of ep x etp, 4"),
        (lambda: Job.from_user("megatron", dp=2, tp=2, etp=1), "needs ep above 1"),
        (lambda: Job.from_user("fsdp", dp=2, distributed_optimizer=True), "only engine megatron"),
        (lambda: Job.from_user("megatron", dp=2, distributed=True), "did you mean"),
        (lambda: Job.from_user("megatron", dp=2, transformer_impl="torch"), "transformer_impl is"),
        (lambda: Job.from_user("megatron", dp=2, ddp_bucket_size=0), "ddp_bucket_size is 0"),
        (lambda: Job.from_user("megatron", pp=3, nodes=2, gpus_per_node=2), "tp x pp is 3"),
        (lambda: estimate(model(), job("megatron", 2), "muon"), "model_type is None"),
        (lambda: estimate(model(), job("megatron", 2), "poet"), "not estimated for poet"),
        (lambda: Job.from_user("fsdp"), "dp is needed"),
        (lambda: Job.from_user("fsdp", dp=0), "dp is 0"),
        (lambda: Job.from_user("fsdp", dp=2.0), "dp is 2.0"),  # type: ignore[arg-type]
        (lambda: Job.from_user("zero1", dp=2, tp=2), "take fsdp"),
        (lambda: Job.from_user("fsdp", dp=2, pp=2), "pp is 2"),
        (lambda: Job.from_user("fsdp", tp=3, nodes=2, gpus_per_node=2), "no multiple"),
        (lambda: Job.from_user("fsdp", dp=3, nodes=2, gpus_per_node=2), "leave 4 to it"),
        (lambda: Job.from_user("hsdp", dp=3, nodes=2), "no multiple of nodes"),
        (lambda: Job.from_user("fsdp", dp=2, nodes=2), "no effect"),
        (lambda: Job.from_user("zero2", dp=2, sub_group=9), "only engine zero3"),
        (lambda: Job.from_user("fsdp", dp=2, dtype="fp8"), "dtype is"),
        (lambda: Job.from_user("fsdp", dp=2, device="tpu"), "device is"),
        (lambda: estimate(model(), job("fsdp", 2), "moun"), "did you mean"),
        (lambda: estimate(model(), job("fsdp", 2), "muon", {"momentun": 1}), "momentum"),
        (lambda: estimate(model(), job("zero1", 7), "muon", {"strategy": "block"}), "rectangles"),
        (lambda: estimate(model(), job("fsdp", 2, tp=2), "muon"), "base_model_tp_plan"),
    ],
)
def test_what_cannot_be_estimated_is_an_error(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"tp": 3}, "num_attention_heads, 4, is no multiple"),
        ({"pp": 3}, "num_hidden_layers, 2, is no multiple"),
        ({"ep": 2}, "number of experts, 0, is no multiple"),
        ({"biased": True}, "attention_bias is True"),
    ],
)
def test_models_that_megatron_does_not_cut_evenly(sizes: dict[str, int], text: str) -> None:
    fields = {**LLAMA, "attention_bias": bool(sizes.pop("biased", False))}
    with pytest.raises(ValueError, match=text):
        estimate(empty_model(fields, "here"), job("megatron", 6, **sizes), "muon")


def test_buckets_are_padded_and_a_tied_embedding_has_its_own() -> None:
    numels, tied = [100, 10, 300, 7], [True, False, False, False]
    flat, numel = in_buckets(numels, tied, 3, None)
    # from the last on, at multiples of 64; buckets end at multiples of 3 x 128
    assert flat == [FlatRange(0, 128), *(FlatRange(at, 256) for at in (384, 64, 0))]
    assert numel == 384 + 768
    flat, numel = in_buckets(numels, [False] * 4, 3, 300)
    assert flat == [FlatRange(64, 128), FlatRange(0, 128), FlatRange(64, 128), FlatRange(0, 128)]
    assert numel == 768
    assert in_buckets([], [], 3, None) == ([], 0)


def test_alike_stages_and_experts_are_counted_once_for_all() -> None:
    """One unit stands for what lies alike on several stages, or for several ranks of experts."""
    fields = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 4}
    sizes = {"pp": 4, "ep": 4, "tp": 2}
    big = job("megatron", 8, **sizes, distributed_optimizer=True)
    found = estimate(empty_model(fields, "here"), big, "muon")
    assert found.job.ranks == 64
    by_stage = found.by_rank["polar_calls"].view(4, 16).sum(1)
    # q, k, v, o, the router, and gate, up and down of eight experts
    assert by_stage.tolist() == [5 + 8 * 3] * 4
    state = found.by_rank["optimizer_state"].view(4, 16).sum(1)
    assert state[1] == state[2] < state[3] < state[0] + 4 * 64 * 60


def test_deepspeeds_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """With Adam on nearly all parameters the numbers are those that DeepSpeed prints."""
    with torch.device("meta"):
        big = nn.Sequential(nn.Embedding(50_000_000, 64), nn.Linear(64, 8, bias=False))
    numel = sum(p.numel() for p in big.parameters())
    spectral_dist.estimate_zero3_model_states_mem_needs_all_live(big, 4, 2)
    text = capsys.readouterr().out
    largest = 4 * big[0].weight.numel()
    gib = f"{(largest + 18 * numel / 8) / 2**30:6.2f}GB"
    assert f"| {gib} | offload_param=none, offload_optimizer=none, zero_init=1" in text
    cpu = f"{18 * numel / 2 * 1.5 / 2**30:7.2f}GB"
    assert f"{cpu} | {largest / 2**30:6.2f}GB | offload_param=cpu " in text
    spectral_dist.estimate_zero2_model_states_mem_needs_all_live(big, 4, 2)
    gib = f"{(2 * numel + 18 * numel / 8) / 2**30:6.2f}GB"
    assert f"| {gib} | offload_optimizer=none" in capsys.readouterr().out


def test_a_number_of_parameters_is_no_model() -> None:
    with pytest.raises(ValueError, match="a number of parameters does not tell it"):
        spectral_dist.estimate_zero3_model_states_mem_needs_all_cold(8e9, 1e8)  # type: ignore[arg-type]


def test_nothing_is_printed_or_changed_by_an_estimate() -> None:
    live = models.build(**WIDTHS)
    before = {name: p.clone() for name, p in live.named_parameters()}
    with contextlib.redirect_stderr(io.StringIO()) as err:
        estimate(live, job("zero2", 4), "root")
    assert not err.getvalue()
    assert all(torch.equal(p, before[name]) for name, p in live.named_parameters())

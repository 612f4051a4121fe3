"""Estimates equal what real ranks of Megatron-core keep, send and compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from spectral_dist.estimate import Job, estimate
from spectral_dist.estimate.megatron_model import MegatronModel
from spectral_dist.integrations.huggingface.empty import empty_model
from tests.support import harness
from tests.support import megatron_estimates as runs
from tests.support.megatron_cpu import VERSIONS

NEW, OLD = VERSIONS
WIDE = {"polar_dtype": "float32"}
"""The estimate computes as a GPU does, where 'auto' is bfloat16."""
SMALL = {"bucket_mb": 60 * 92 * 4 / 2**20}
"""Buckets of the largest matrix, so that there are many."""
MUON = ("muon", {**WIDE, **SMALL})
CASES = [MUON, ("sumo", {"rank": 5, "period": 1000})]
MORE = [
    ("normuon", WIDE),
    ("polargrad", {**WIDE, "polar_first": True}),
    ("root", {**WIDE, **SMALL}),
    ("muon", {**WIDE, "replicate_momentum": True}),
]
TILED = [
    ("muon", {**WIDE, "strategy": "gram", "polar": "gram_jordan"}),
    ("muon", {**WIDE, "strategy": "block"}),
    ("sumo", {"strategy": "gram", "rank": 5, "period": 1000}),
]
SPLIT = [("muon", {**WIDE, "strategy": "split", "scalars": ["linear_fc", "linear_proj"]})]
"""Only the matrices of linear_qkv are orthogonalized, those of two layers."""
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = {**DISTRIBUTED, "overlap_grad_reduce": True, "bucket_size": 4000}


def job_of(ranks: int, sizes: Mapping[str, int], wrapping: Mapping[str, Any], dtype: str) -> Job:
    return Job.from_user(
        "megatron",
        dp=ranks // (sizes.get("tp", 1) * sizes.get("pp", 1)),
        device="cpu",
        dtype=dtype,
        transformer_impl="local",
        distributed_optimizer=wrapping.get("use_distributed_optimizer", False),
        ddp_bucket_size=wrapping.get("bucket_size"),
        **sizes,
    )


def check(
    ranks: int,
    model: str,
    cases: list[Any],
    sizes: Mapping[str, int],
    wrapping: Mapping[str, Any],
    dtype: str = "float32",
    version: str = NEW,
) -> set[int]:
    """Compare every rank of a run of each case with its estimate; return the teams' sizes."""
    found = harness.run(
        ranks, runs.measure, version, model, cases, sizes, wrapping, dtype, pool=version
    )
    job, wrong, teams = job_of(ranks, sizes, wrapping, dtype), [], set()
    for number, (optimizer, options) in enumerate(cases):
        routing = {"scalars": options["scalars"]} if "scalars" in options else {}
        others = {name: value for name, value in options.items() if name not in routing}
        empty = empty_model(runs.MODELS[model], model)
        expected = estimate(empty, job, optimizer, {"lr": 1e-3, **others}, routing).by_rank
        for rank in range(ranks):
            measured = dict(found[rank][number])
            teams.add(measured.pop("team"))
            peak, bound = measured.pop("temporary"), int(expected["temporary"][rank])
            equal = {name: int(expected[name][rank]) for name in measured}
            if equal != measured or peak > 1.05 * bound:
                wrong.append((rank, optimizer, dict(options), peak, bound, equal, measured))
    assert wrong == []
    return teams


@pytest.mark.parametrize("name", runs.MODELS)
def test_names_shapes_and_order_are_megatrons(name: str) -> None:
    (found,) = harness.run(1, runs.names_and_shapes, NEW, name, pool=NEW)
    config = empty_model(runs.MODELS[name], name).config
    parameters = MegatronModel(config, job_of(1, {}, {}, "float32")).named_parameters()
    assert [(n, list(p.shape)) for n, p in parameters] == found


LAYOUTS: dict[str, tuple[int, str, dict[str, int], dict[str, Any]]] = {
    "one rank, distributed optimizer": (1, "llama", {}, DISTRIBUTED),
    "DP 2": (2, "llama", {}, {}),
    "DP 2, distributed optimizer": (2, "llama", {}, DISTRIBUTED),
    "DP 2, buckets": (2, "llama", {}, OVERLAP),
    "TP 2": (2, "llama", {"tp": 2}, {}),
    "TP 2, distributed optimizer": (2, "llama", {"tp": 2}, DISTRIBUTED),
    "PP 2": (2, "llama", {"pp": 2}, {}),
    "PP 2, tied, distributed optimizer": (2, "tied", {"pp": 2}, DISTRIBUTED),
    "EP 2": (2, "mixtral", {"ep": 2}, {}),
    "EP 2, distributed optimizer": (2, "mixtral", {"ep": 2}, DISTRIBUTED),
    "experts without EP": (2, "mixtral", {}, DISTRIBUTED),
    "TP 2 x DP 2": (4, "llama", {"tp": 2}, {}),
    "TP 2 x DP 2, distributed optimizer": (4, "llama", {"tp": 2}, DISTRIBUTED),
    "TP 2 x PP 2": (4, "llama", {"tp": 2, "pp": 2}, {}),
    "TP 4 of two query groups": (4, "llama", {"tp": 4}, {}),
    "PP 2 x DP 2, tied": (4, "tied", {"pp": 2}, {}),
    "PP 2 x DP 2, tied, buckets": (4, "tied", {"pp": 2}, OVERLAP),
    "EP 2 x DP 4": (4, "mixtral", {"ep": 2}, {}),
    "EP 2 x DP 4, distributed optimizer": (4, "mixtral", {"ep": 2}, DISTRIBUTED),
    # tiles of experts need gathers of different lengths, which gloo has not
    "TP 2, EP 2, each expert whole": (4, "mixtral", {"ep": 2, "tp": 2, "etp": 1}, {}),
    "TP 2, EP 2, each expert whole, distributed optimizer": (
        4, "mixtral", {"ep": 2, "tp": 2, "etp": 1}, DISTRIBUTED,
    ),
    "PP 2 x EP 2, distributed optimizer": (4, "mixtral", {"ep": 2, "pp": 2}, DISTRIBUTED),
}  # fmt: skip
"""Ranks, model, sizes and options of Megatron's DistributedDataParallel."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_ranks_have_what_is_estimated(layout: str) -> None:
    ranks, model, sizes, wrapping = LAYOUTS[layout]
    check(ranks, model, CASES, sizes, wrapping)


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED])
def test_other_optimizers(wrapping: dict[str, Any]) -> None:
    check(4, "llama", MORE, {"tp": 2}, wrapping)


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED])
def test_slabs_and_blocks(wrapping: dict[str, Any]) -> None:
    cases = [case for case in TILED if not (wrapping and case[1].get("strategy") == "block")]
    check(2, "llama", cases, {"tp": 2}, wrapping)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "wrapping"), [({}, {}), ({}, DISTRIBUTED), ({"tp": 2}, {}), ({"tp": 2}, DISTRIBUTED)]
)
def test_teams(sizes: dict[str, int], wrapping: dict[str, Any]) -> None:
    check(4, "llama", SPLIT, sizes, wrapping)


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED])
def test_parameters_in_bfloat16(wrapping: dict[str, Any]) -> None:
    check(2, "qwen3_moe", [MUON], {"ep": 2}, wrapping, dtype="bfloat16")


@pytest.mark.slow
def test_the_older_megatron() -> None:
    check(2, "llama", [MUON], {"tp": 2}, DISTRIBUTED, version=OLD)

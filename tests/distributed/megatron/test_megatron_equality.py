"""However Megatron cuts a model, our optimizers give it the parameters of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.megatron import megatron_runs as runs
from tests.distributed.megatron.megatron_runs import DISTRIBUTED
from tests.reference import rules
from tests.support import harness
from tests.support import megatron_model as models

NEW, OLD = "0.19.2", "0.16.1"
BOUND = 1e-6
NAMES = ("spectral_muon", "spectral_polargrad", "spectral_root")
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 4000, "overlap_param_gather": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "distributed optimizer": (1, {}, DISTRIBUTED),
    "DP 2": (2, {}, {}),
    "DP 2, distributed optimizer": (2, {}, DISTRIBUTED),
    "DP 2, distributed optimizer, overlap": (2, {}, DISTRIBUTED | OVERLAP),
    "TP 2": (2, {"tp": 2}, {}),
    "TP 2, distributed optimizer": (2, {"tp": 2}, DISTRIBUTED),
    "TP 2 x DP 2": (4, {"tp": 2}, {}),
    "TP 2 x DP 2, distributed optimizer": (4, {"tp": 2}, DISTRIBUTED),
    "TP 4": (4, {"tp": 4}, {}),
    "TP 4, distributed optimizer": (4, {"tp": 4}, DISTRIBUTED),
    "TP 2 x PP 2": (4, {"tp": 2, "pp": 2}, {}),
}
"""ranks; options of models.parallel and models.wrap. TP 4 cuts each of two query groups."""

MATRICES = 14
"""of two layers: q, k, v, out, gate, up, down"""


@functools.cache
def alone(version: str, name: str, model: tuple[tuple[str, Any], ...] = ()) -> dict[str, Any]:
    return harness.run(1, runs.train, version, name, model=dict(model), pool=version)[0]


def check(version, name, layout, model=None, options=None, cut=None):
    """``cut``: options of the model that only a cut one has."""
    ranks, groups, wrapping = LAYOUTS[layout] if isinstance(layout, str) else layout
    wanted = alone(version, name, tuple((model or {}).items()))
    args = (version, name, groups, wrapping, (model or {}) | (cut or {}), options)
    found = harness.run(ranks, runs.train, *args, pool=version)
    for one in found:
        assert one["norms"] == pytest.approx(wanted["norms"], rel=BOUND, abs=BOUND)
        assert one["parameters"].keys() == wanted["parameters"].keys()
        for key, value in wanted["parameters"].items():
            torch.testing.assert_close(
                one["parameters"][key], value, rtol=0, atol=BOUND, msg=lambda m, k=key: f"{k}: {m}"
            )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.fast_cases("TP 2 x DP 2", "TP 2 x DP 2, distributed optimizer", "TP 2 x PP 2")
def test_five_steps_are_those_of_one_process(layout):
    found = check(NEW, "spectral_muon", layout)
    assert sum(one["polar_calls"] for one in found) == 5 * MATRICES


@pytest.mark.parametrize(
    "layout",
    ["TP 2 x DP 2", pytest.param("TP 4, distributed optimizer", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", NAMES[1:])
def test_five_steps_of_the_other_rules(name, layout):
    """What a rule is given does not depend on the rule: every layout is above."""
    found = check(NEW, name, layout)
    assert sum(one["polar_calls"] for one in found) == 5 * MATRICES


@pytest.mark.slow  # four ranks for this version alone
@pytest.mark.parametrize("layout", ["TP 2 x DP 2", "TP 2 x DP 2, distributed optimizer"])
@pytest.mark.parametrize("name", NAMES)
def test_five_steps_are_those_of_one_process_in_the_older_megatron(name, layout):
    found = check(OLD, name, layout)
    assert sum(one["polar_calls"] for one in found) == 5 * MATRICES


GRAM = {"strategy": "gram"}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("spectral_muon", "TP 2 x DP 2, distributed optimizer"),
        pytest.param("spectral_muon", "TP 2 x DP 2", marks=pytest.mark.slow),
        pytest.param("spectral_muon", "TP 4", marks=pytest.mark.slow),
        pytest.param(
            "spectral_polargrad", "TP 2 x DP 2, distributed optimizer", marks=pytest.mark.slow
        ),
        pytest.param("spectral_root", "TP 2 x DP 2", marks=pytest.mark.slow),
        pytest.param("spectral_polargrad", "TP 4", marks=pytest.mark.slow),
        pytest.param("spectral_root", "TP 4, distributed optimizer", marks=pytest.mark.slow),
    ],
)
def test_matrices_that_stay_cut_take_the_same_steps(name, layout):
    """Each polynomial is evaluated once in the job; slabs lie with tiles, or must move."""
    found = check(NEW, name, layout, options=GRAM)
    assert sum(one["polar_calls"] for one in found) == 5 * MATRICES


def test_heads_take_the_same_steps():
    """It equals one process that cuts linear_qkv into 8 heads in place of 3 matrices."""
    heads = {"heads": "auto"}
    (wanted,) = harness.run(1, runs.train, NEW, "spectral_muon", {}, {}, {}, heads, pool=NEW)
    assert wanted["norms"] != pytest.approx(alone(NEW, "spectral_muon")["norms"], rel=BOUND)
    found = harness.run(2, runs.train, NEW, "spectral_muon", {"tp": 2}, {}, {}, heads, pool=NEW)
    assert sum(one["polar_calls"] for one in found) == 5 * (MATRICES + 2 * 5)
    for one in found:
        for key, value in wanted["parameters"].items():
            torch.testing.assert_close(one["parameters"][key], value, rtol=0, atol=BOUND, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", [{}, DISTRIBUTED], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("strategy", ["owner", "gram"])
@pytest.mark.parametrize("name", NAMES)
def test_eight_ranks(name, strategy, wrapping):
    """TP 4 x DP 2."""
    found = check(NEW, name, (8, {"tp": 4}, wrapping), options={"strategy": strategy})
    assert sum(one["polar_calls"] for one in found) == 5 * MATRICES


@pytest.mark.slow
def test_matrices_that_stay_cut_in_the_older_megatron():
    check(OLD, "spectral_muon", "TP 2 x DP 2", options=GRAM)


KINDS: dict[str, dict[str, Any]] = {
    "gate beside q, k, v": {"attention_output_gate": True},
    "no gate in the MLP": {"swiglu": False},
    "tied embeddings": {"tied": True},
    "one query group": {"query_groups": 1},
    "all heads their own": {"query_groups": 4},
}


@pytest.mark.parametrize(
    ("kind", "wrapping"), list(zip(KINDS, [{}, DISTRIBUTED] * 3, strict=False))
)
@pytest.mark.fast_cases("gate beside q, k, v-wrapping0", "one query group-wrapping3")
def test_every_kind_of_layer(kind, wrapping):
    check(NEW, "spectral_muon", (4, {"tp": 2}, wrapping), KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "wrapping"), list(zip(KINDS, [DISTRIBUTED, {}] * 3, strict=False))
)
def test_every_kind_of_layer_with_the_other_wrapping(kind, wrapping):
    check(NEW, "spectral_muon", (4, {"tp": 2}, wrapping), KINDS[kind])


EXPERTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "DP 2, distributed optimizer": (2, {}, DISTRIBUTED),
    "EP 2": (2, {"ep": 2}, {}),
    "EP 2 x DP 2, distributed optimizer": (4, {"ep": 2}, DISTRIBUTED),
    "TP 2, EP 2, each expert whole": (4, {"tp": 2, "ep": 2, "etp": 1}, DISTRIBUTED),
    "TP 2, EP 2, each expert whole, replicas": (4, {"tp": 2, "ep": 2, "etp": 1}, {}),
}


@pytest.mark.parametrize("layout", EXPERTS)
@pytest.mark.fast_cases(
    "EP 2 x DP 2, distributed optimizer", "TP 2, EP 2, each expert whole, replicas"
)
def test_experts_on_their_own_ranks(layout):
    cut = {"sequence_parallel": "tp" in EXPERTS[layout][1]}
    found = check(NEW, "spectral_muon", EXPERTS[layout], {"moe_experts": 4}, cut=cut)
    wanted = alone(NEW, "spectral_muon", (("moe_experts", 4),))
    assert sum(one["polar_calls"] for one in found) == wanted["polar_calls"]


def test_sequence_parallelism():
    check(NEW, "spectral_muon", "TP 2 x DP 2", cut={"sequence_parallel": True})


@pytest.mark.slow
def test_replicas_keep_one_momentum_between_them():
    found = check(NEW, "spectral_muon", "TP 2 x DP 2")
    whole = alone(NEW, "spectral_muon")["momentum"]
    assert sum(one["momentum"] for one in found) == whole
    assert max(one["momentum"] for one in found) < whole / 2  # of TP 2, with room for owners


@pytest.mark.slow
def test_bf16_has_float32_masters():
    model = {"bf16": True}
    wanted = alone(NEW, "spectral_muon", (("bf16", True),))
    for layout in ("TP 2 x DP 2", "TP 2 x DP 2, distributed optimizer"):
        ranks, groups, wrapping = LAYOUTS[layout]
        args = (NEW, "spectral_muon", groups, wrapping, model)
        for one in harness.run(ranks, runs.train, *args, pool=NEW):
            assert one["losses"] == pytest.approx(wanted["losses"], abs=0.02)
            for key, value in wanted["parameters"].items():
                if "layers" in key and value.ndim == 2:  # matrices, by how they have moved
                    start = models.weight(key, list(value.shape))
                    moved = value.float() - start
                    difference = one["parameters"][key].float() - value.float()
                    assert difference.norm() < 0.25 * moved.norm(), key


def parts(key: str, value: Tensor) -> list[Tensor]:
    """The matrices of a weight of the default model, written out: 2 groups of [q q k v]."""
    if "linear_qkv" in key:
        groups = value.view(2, 4, 16, 64)
        return [groups[:, :2].reshape(64, 64), *(groups[:, i].reshape(32, 64) for i in (2, 3))]
    return [value[:96], value[96:]] if "linear_fc1" in key else [value]


@pytest.mark.parametrize(("version", "name"), [*((NEW, name) for name in NAMES), (OLD, NAMES[0])])
def test_one_process_takes_the_step_of_the_reference(version, name):
    """Of gradients as Megatron gives them, which is what all the other tests rest on."""
    config = {"clip_grad": 0.0}
    found = harness.run(1, runs.gradients, version, name, config=config, pool=version)[0]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    for key, after in found["after"].items():
        before, gradient = found["before"][key], found["gradients"][key]
        if before.ndim == 2 and "embedding" not in key and "output" not in key:
            wanted = [part.clone() for part in parts(key, before)]
            for w, g in zip(wanted, parts(key, gradient), strict=True):
                rules.RULES[name.removeprefix("spectral_")](w, g, torch.zeros_like(w), settings)
            pairs = list(zip(parts(key, after), wanted, strict=True))
        else:
            weight = before.clone().requires_grad_()
            weight.grad = gradient
            torch.optim.AdamW([weight], 0.01, (0.9, 0.999), 1e-4, 0.1).step()
            pairs = [(after, weight.detach())]
        for ours, reference in pairs:
            torch.testing.assert_close(ours, reference, rtol=0, atol=BOUND)


def blocks(key: str, value: Tensor) -> list[Tensor]:
    """What each of two tensor-parallel ranks has of each matrix: half of its rows or columns."""
    dimension = 1 if "linear_proj" in key or "linear_fc2" in key else 0
    return [block for part in parts(key, value) for block in part.chunk(2, dimension)]


@pytest.mark.parametrize("layout", ["TP 2 x DP 2", "TP 2 x DP 2, distributed optimizer"])
@pytest.mark.slow
def test_blocks_are_orthogonalized_alone(layout):
    """In the first steps of five, each with its own scale; then whole matrices again."""
    ranks, groups, wrapping = LAYOUTS[layout]
    config = {"clip_grad": 0.0}
    plain = harness.run(1, runs.gradients, NEW, "spectral_muon", config=config, pool=NEW)[0]
    args = (NEW, "spectral_muon", groups, wrapping)
    options = {"strategy": "block"}
    found = harness.run(
        ranks, runs.train, *args, options=options, config=config, steps=1, pool=NEW
    )[0]  # fmt: skip
    for key in plain["gradients"]:
        if "layers" not in key or "norm" in key:
            continue
        wanted = [block.clone() for block in blocks(key, plain["before"][key])]
        for w, g in zip(wanted, blocks(key, plain["gradients"][key]), strict=True):
            rules.muon(w, g, torch.zeros_like(w), {"lr": 0.01, "weight_decay": 0.1})
        ours = blocks(key, found["parameters"][key])
        for one, reference in zip(ours, wanted, strict=True):
            torch.testing.assert_close(one, reference, rtol=0, atol=BOUND)
        assert (found["parameters"][key] - plain["after"][key]).abs().max() > 1e-3
    options = {"strategy": "block", "block_period": 1}
    check(NEW, "spectral_muon", layout, options=options)


@pytest.mark.parametrize("layout", ["TP 2 x DP 2", "TP 2 x DP 2, distributed optimizer"])
@pytest.mark.fast_cases("TP 2 x DP 2, distributed optimizer")
def test_gradients_are_clipped_as_for_adam(layout):
    """The first step's norm is Megatron's for Adam; clipping changes the weights of Adam only."""
    ranks, groups, wrapping = LAYOUTS[layout]
    norms, weights = [], []
    for name, clip in (("adam", 1.0), ("spectral_muon", 1.0), ("spectral_muon", 0.01)):
        args = (NEW, name, groups, wrapping)
        config = {"clip_grad": clip}
        found = harness.run(ranks, runs.train, *args, config=config, steps=1, pool=NEW)[0]
        norms.append(found["norms"])
        weights.append(found["parameters"]["decoder.layers.1.mlp.linear_fc2.weight"])
    assert norms[1] == norms[0]
    assert norms[2] == norms[0]
    assert norms[0][0] > 1  # so that 1.0 clips, too
    torch.testing.assert_close(weights[2], weights[1], rtol=0, atol=BOUND)

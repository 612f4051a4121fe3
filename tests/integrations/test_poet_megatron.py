"""spectral_poet under Megatron: one process's numbers, and its merges under every layout."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import harness
from tests.integrations import megatron_cpu
from tests.integrations import megatron_model as models
from tests.integrations.megatron_runs import DISTRIBUTED

NEW, OLD = "0.19.2", "0.16.1"
EVERY, STEPS = 3, 8  # two merges, and steps after them
SETTINGS = {"block": 8, "segments": 4}
MODEL = {"query_groups": 4}  # for TP 4


def build(
    version: str,
    groups: dict[str, Any] | None = None,
    wrapping: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[int, int], Any, Any]:
    """(data rank, ranks), the wrapped converted model, Megatron's optimizer."""
    megatron_cpu.install(version)
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer, poet

    data = models.parallel(**(groups or {}))
    gpt = models.gpt(**{**MODEL, **(model or {})})
    fill_biases(gpt)
    ddp = models.wrap(poet.convert(gpt, **{**SETTINGS, **(settings or {})}), **(wrapping or {}))
    given = {"adam_eps": 1e-4, "adam_beta2": 0.999, **(config or {})}
    chosen = {"merge_every": EVERY, **(options or {})}
    asked = models.optimizer_config(ddp, optimizer="spectral_poet", **given)
    return data, ddp, get_spectral_megatron_optimizer(asked, [ddp], **chosen)


def fill_biases(gpt: Any) -> None:
    """By their names, like weights."""
    for name, p in models.named_parameters(gpt):
        if name.endswith(".bias") and "norm" not in name:
            values = models.weight(name, [1, *models.full_shape(p)])[0]
            p.data.copy_(models.shard(values, p))


def layers(ddp: Any) -> dict[str, Any]:
    return {m.key: m for m in models.gpt_of(ddp).modules() if hasattr(m, "rotations")}


def inner(optimizer: Any) -> Any:
    return optimizer.chained_optimizers[0].optimizer


def whole(ddp: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Every parameter (or gradient) of the whole model: fused ones with their ranks' rows."""
    if not gradients:
        return models.full_parameters(ddp)
    found = {
        name: models.gathered(p.main_grad, p)
        for name, p in models.named_parameters(ddp)
        if p.requires_grad
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    merged: dict[str, Tensor] = {}
    for theirs in everyone:
        for name, value in theirs.items():
            first = merged.setdefault(name, value)
            assert torch.equal(first, value), f"ranks differ in the gradient of {name}"
    return merged


def diverge(ddp: Any) -> None:
    """The mistake: rotations of the dimension that is not cut differ from rank to rank."""
    for layer in layers(ddp).values():
        sides = [
            tuple(replace(r, seed=dist.get_rank()) if r.ranks == 1 else r for r in side)
            for side in (layer.inner, layer.outer)
        ]
        layer.inner, layer.outer = sides
        layer.forget()


def spectra(ddp: Any) -> dict[str, Tensor]:
    """Singular values of the whole matrices, as they are merged."""
    found = {key: layer.assembled(layer.weight.detach()) for key, layer in layers(ddp).items()}
    return {key: torch.linalg.svdvals(w.double()) for key, w in found.items()}


def tile_spectra(ddp: Any) -> dict[str, Tensor]:
    return {k: torch.linalg.svdvals(m.weight.detach().double()) for k, m in layers(ddp).items()}


def drift(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((after[k] / s - 1).abs().max()) for k, s in before.items())


def train(
    *args: Any, steps: int = STEPS, monitored: bool = False, independent: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Losses, norms, the parameters after the steps, the last gradients, and what merges did."""
    data, ddp, optimizer = build(*args, **kwargs)
    reports = []
    if monitored:
        from spectral_dist.monitor import Monitor

        sinks = [lambda step, report: reports.append((step, report))]
        inner(optimizer).monitor = Monitor(1, sinks)
    if independent:
        diverge(ddp)
    before, tiles = spectra(ddp), tile_spectra(ddp)
    grads: dict[str, Tensor] = {}
    step = optimizer.step

    def look() -> Any:
        if not independent and not ddp.ddp_config.use_distributed_optimizer:  # no rank has all
            grads.update(whole(ddp, gradients=True))
        return step()

    optimizer.step = look
    found = [models.train_step(ddp, optimizer, models.batch(s, *data)) for s in range(steps)]
    return {
        "losses": [loss for loss, _ in found],
        "norms": [norm for _, norm in found],
        "parameters": {} if independent else whole(ddp),
        "spectra": spectra(ddp),
        "drift": drift(before, spectra(ddp)),
        "tile drift": drift(tiles, tile_spectra(ddp)),
        "reports": reports,
        "gradients": grads,
        "merges": {layer.merges for layer in layers(ddp).values()},
        "since": inner(optimizer).since,
        "bytes": inner(optimizer).comm_bytes,
    }


# -- the same numbers under every layout


@functools.cache
def alone(model: tuple[tuple[str, Any], ...] = (), **kwargs: Any) -> dict[str, Any]:
    return harness.run(1, train, NEW, None, None, dict(model), monitored=True, pool=NEW)[0]


def compare(one: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    assert one["losses"] == pytest.approx(wanted["losses"], rel=0, abs=bound)
    assert one["norms"] == pytest.approx(wanted["norms"], rel=0, abs=bound)
    for what in ("parameters", "gradients"):
        for key, value in one[what].items():
            error = float((value - wanted[what][key]).abs().max())
            assert error < bound, (what, key, error)
    assert (one["merges"], one["since"]) == ({STEPS // EVERY}, STEPS % EVERY)


def check_reports(one: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert [step for step, _ in one["reports"]] == [3, 6]
    for (_, here), (_, there) in zip(one["reports"], wanted["reports"], strict=True):
        assert here.keys() == there.keys() > {"skew_norm", "singular_value_drift"}
        for key, value in here["skew_norm"].items():
            assert value == pytest.approx(there["skew_norm"][key], rel=1e-4)
            assert value > 0.01
            assert here["singular_value_drift"][key] < 1e-5
            assert there["singular_value_drift"][key] < 1e-5


def test_tensor_parallel_ranks_give_the_numbers_of_one() -> None:
    """In float32: losses, gradients and parameters to 2e-6, spectra of whole matrices to 1e-5."""
    wanted = alone()
    args = (NEW, {"tp": 2}, {}, {"sequence_parallel": True})
    found = harness.run(2, train, *args, monitored=True, pool=NEW)
    for one in found:
        compare(one, wanted, 2e-6)
        assert one["bytes"] == 4 * STEPS  # whether gradients are finite
        assert one["drift"] < 1e-5
        for key, values in one["spectra"].items():
            assert torch.allclose(values, wanted["spectra"][key], atol=2e-6), key
    check_reports(found[0], wanted)


def test_a_rotation_of_each_rank_would_be_wrong() -> None:
    """The negative control: the spectra of tiles stay, those of whole matrices do not."""
    for one in harness.run(2, train, NEW, {"tp": 2}, independent=True, pool=NEW):
        assert one["tile drift"] < 1e-5
        assert one["drift"] > 1e-3


GATHERING = {**DISTRIBUTED, "overlap_param_gather": True, "overlap_grad_reduce": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "TP 2": (2, {"tp": 2}, {}, {}),
    "TP 4": (4, {"tp": 4}, {}, {}),
    "TP 4, sequence parallel": (4, {"tp": 4}, {}, {"sequence_parallel": True}),
    "DP 2": (2, {}, {}, {}),
    "TP 2 x DP 2": (4, {"tp": 2}, {}, {}),
    "TP 2 x DP 2, distributed optimizer": (4, {"tp": 2}, DISTRIBUTED, {}),
    "TP 2 x DP 2, overlapped": (4, {"tp": 2}, GATHERING, {"sequence_parallel": True}),
    "DP 4, distributed optimizer": (4, {}, DISTRIBUTED, {}),
    "TP 2 x PP 2": (4, {"tp": 2, "pp": 2}, {}, {}),
    "TP 2 x PP 2, distributed optimizer": (4, {"tp": 2, "pp": 2}, DISTRIBUTED, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("version", [NEW, OLD])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, version: str) -> None:
    ranks, *args = LAYOUTS[layout]
    for one in harness.run(ranks, train, version, *args, monitored=True, pool=version):
        compare(one, alone(), 2e-6)
        assert one["drift"] < 1e-5
        assert one["bytes"] == (4 * STEPS if ranks == 2 or "tp" not in args[0] else one["bytes"])


DOUBLE = {"params_dtype": torch.float64, "pipeline_dtype": torch.float64}
UNCLIPPED = {"config": {"clip_grad": 0.0}}  # Megatron clips float32 only


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "groups", "model"),
    [(2, {"tp": 2}, {"sequence_parallel": True}), (4, {"tp": 2}, {}), (4, {"tp": 4}, {})],
)
def test_double_precision_leaves_what_the_losses_float32_does(ranks, groups, model) -> None:
    """Megatron takes losses and norms' gradients in float32 even here."""
    wanted = harness.run(1, train, NEW, {}, {}, DOUBLE, pool=NEW, **UNCLIPPED)[0]
    args = (NEW, groups, {}, {**DOUBLE, **model})
    for one in harness.run(ranks, train, *args, pool=NEW, **UNCLIPPED):
        compare(one, wanted, 5e-7)
        assert one["drift"] < 1e-12
        for key, value in one["gradients"].items():
            if "skew" in key:
                assert float((value - wanted["gradients"][key]).abs().max()) < 1e-8, key


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "biases": ({"add_bias_linear": True, "add_qkv_bias": True}, {}),
    "memory": ({}, {"variant": "memory"}),
    "grouped queries": ({"query_groups": 2}, {"blocks": {r"linear_qkv\.[kv]$": 4}}),
    "a gate of attention": ({"query_groups": 2, "attention_output_gate": True}, {}),
    "no gate": ({"swiglu": False, "tied": True}, {"order": 3}),
    "drawn": ({}, {"init": "normalized", "seed": 5}),
    "drawn, uniform": ({}, {"init": "uniform_spectrum"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_and_settings(name: str, sequence_parallel: bool) -> None:
    model, settings = OTHERS[name]
    wanted = harness.run(1, train, NEW, {}, {}, model, settings, pool=NEW)[0]
    args = ({**model, "sequence_parallel": sequence_parallel}, settings)
    for one in harness.run(2, train, NEW, {"tp": 2}, DISTRIBUTED, *args, pool=NEW):
        compare(one, wanted, 4e-6)
    assert (name == "memory") <= (wanted["losses"] == alone()["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("version", [NEW, OLD])
def test_experts_are_rotated_each_by_itself(version: str) -> None:
    wanted = harness.run(1, train, NEW, {}, {}, {"moe_experts": 4}, pool=NEW)[0]
    found = harness.run(2, train, version, {"ep": 2}, {}, {"moe_experts": 4}, pool=version)
    for one in found:
        compare(one, wanted, 4e-6)
    assert any("experts.3." in key and "skew_out_up" in key for key in wanted["parameters"])

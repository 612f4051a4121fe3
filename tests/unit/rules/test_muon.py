"""spectral_dist.Muon in one process against specs/muon.md written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import spectral_dist
from spectral_dist.placement.dtensor import MeshPlacement
from spectral_dist.polar import METHODS
from tests.reference import polar as reference
from tests.support.weights import (
    FACTORS,
    OPTIONS,
    SHAPES,
    Weights,
    expect,
    give_gradients,
    jordan,
    mixed_model,
    moonlight,
    muon,
    values,
)


def test_defaults_follow_the_spec():
    model = Weights(dtype=torch.float64, **SHAPES)
    wanted = expect(model, 6, moonlight, lr=0.02, polar=jordan)
    optimizer = muon(model)
    for step in range(6):
        give_gradients(model, step)
        optimizer.step()
    for name, w in values(model).items():
        torch.testing.assert_close(w, wanted[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", FACTORS)
def test_scales_and_nesterov(scale, nesterov):
    model = Weights(dtype=torch.float64, **SHAPES)
    o = {"beta": 0.8, "decay": 0.3, "lr": 0.05}
    wanted = expect(model, 4, FACTORS[scale], polar=jordan, nesterov=nesterov, **o)
    optimizer = muon(model, lr=0.05, momentum=0.8, weight_decay=0.3, scale=scale, nesterov=nesterov)
    for step in range(4):
        give_gradients(model, step)
        optimizer.step()
    for name, w in values(model).items():
        torch.testing.assert_close(w, wanted[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_every_polar_method(method):
    name = method.removeprefix("gram_")
    exact = method in ("svd", "eigh", "qdwh", "zolo")

    def polar(x):
        if exact:
            return reference.exact(x)
        return reference.newton_schulz(name, reference.NATURAL_STEPS[name], x)

    model = Weights(wide=(4, 9), tall=(10, 3))
    wanted = expect(model, 2, moonlight, lr=0.02, polar=polar)
    optimizer = muon(model, polar=method)
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    for key, w in values(model).items():
        torch.testing.assert_close(w.double(), wanted[key], rtol=0, atol=2e-5)


def test_steps_of_the_polar_factor():
    model = Weights(wide=(4, 9))
    wanted = expect(
        model, 1, moonlight, lr=0.02, polar=lambda x: reference.newton_schulz("quintic", 3, x)
    )
    optimizer = muon(model, polar="quintic", polar_steps=3)
    give_gradients(model, 0)
    optimizer.step()
    torch.testing.assert_close(model.wide.weight.double(), wanted["wide.weight"], rtol=0, atol=1e-5)


def test_scalars_are_torchs_adamw_bitwise():
    model, other = mixed_model(), mixed_model()
    optimizer = muon(model, betas=(0.8, 0.99), eps=1e-6, **OPTIONS)
    params = [p for n, p in other.named_parameters() if n not in ("1.weight", "3.weight")]
    adamw = torch.optim.AdamW(params, lr=0.005, weight_decay=0.01, betas=(0.8, 0.99), eps=1e-6)
    for step in range(5):
        give_gradients(model, step)
        give_gradients(other, step)
        optimizer.step()
        adamw.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) == (name not in ("1.weight", "3.weight")), name


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_update_has_rms_a_fifth_of_lr(decay):
    """match_rms_adamw with an exact polar factor; wd uses the base lr and nothing else."""
    model = Weights(wide=(4, 9), tall=(10, 3), square=(6, 6))
    optimizer = muon(model, lr=0.03, weight_decay=decay, polar="svd")
    before = values(model)
    give_gradients(model, 0)
    optimizer.step()
    for name, w in values(model).items():
        update = (1 - 0.03 * decay) * before[name].double() - w.double()
        assert update.square().mean().sqrt().item() == pytest.approx(0.2 * 0.03, rel=1e-4)


def test_zero_gradients_from_the_start_only_decay():
    model = Weights(**SHAPES)
    before = values(model)
    optimizer = muon(model, lr=0.5, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, w in values(model).items():
        assert torch.equal(w, before[name] * 0.75)


def test_momentum_outlives_a_zero_gradient():
    model = Weights(**SHAPES)
    optimizer = muon(model, weight_decay=0.0)
    give_gradients(model, 0)
    optimizer.step()
    before = values(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not any(torch.equal(w, before[name]) for name, w in values(model).items())


# -- lr


def test_scalar_lr_stays_a_ratio_where_a_scheduler_knows_one_lr():
    """DeepSpeed's write one lr into every group."""
    model, other = mixed_model(), mixed_model()
    optimizer = muon(model, placement=MeshPlacement(), **OPTIONS)
    biases = [other[1].bias, other[3].bias]
    adamw = torch.optim.AdamW(biases, lr=1.0, weight_decay=0.01, betas=(0.9, 0.95), eps=1e-8)
    weight = other[1].weight.detach().double()
    momentum = torch.zeros_like(weight)
    for step, lr in enumerate((0.02, 0.01, 0.004, 0.0)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        adamw.param_groups[0]["lr"] = lr / 4  # 0.005 / 0.02
        give_gradients(model, step)
        give_gradients(other, step)
        optimizer.step()
        adamw.step()
        g = other[1].weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * g
        u = jordan(0.05 * g + 0.95 * momentum)
        weight = (1 - lr * 0.1) * weight - lr * moonlight(8, 6) * u
    for mine, theirs in zip((model[1].bias, model[3].bias), biases, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model[1].weight.double(), weight, rtol=0, atol=1e-6)


def test_torch_schedulers():
    model = mixed_model()
    optimizer = muon(model, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        rates = [g["lr"] * g["lr_ratio"] for g in optimizer.param_groups]
        assert rates == [pytest.approx(0.02 / (1 + step)), pytest.approx(0.005 / (1 + step))]
        give_gradients(model, step)
        optimizer.step()
        scheduler.step()


def test_lr_of_a_group_given_before():
    """groups[0]["lr"] of param_groups, as its docstring says."""
    model, other = Weights(a=(4, 6)), Weights(a=(4, 6))
    found = spectral_dist.param_groups(model)
    found[0]["lr"] = 0.005
    first, second = spectral_dist.Muon(found, lr=0.02), muon(other, lr=0.005)
    for step in range(3):
        for m, optimizer in ((model, first), (other, second)):
            give_gradients(m, step)
            optimizer.step()
    torch.testing.assert_close(model.a.weight, other.a.weight, rtol=0, atol=1e-7)


# -- dtypes


def test_bfloat16_parameters_keep_float32_momentum():
    model = Weights(dtype=torch.bfloat16, a=(4, 6), b=(5, 5))
    optimizer = muon(model)
    momentum = torch.zeros(4, 6)
    for step in range(4):
        give_gradients(model, step)
        momentum = 0.95 * momentum + 0.05 * model.a.weight.grad.float()
        optimizer.step()
    state = optimizer.state[model.a.weight]
    assert state["exp_avg"].dtype is torch.float32
    torch.testing.assert_close(state["exp_avg"], momentum, rtol=1e-5, atol=1e-7)
    assert not torch.equal(state["exp_avg"], state["exp_avg"].bfloat16().float())
    assert model.a.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loading_keeps_the_states_dtype_and_values(dtype):
    def build():
        return mixed_model(dtype)

    model = build()
    optimizer = muon(model)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    saved = {name: {k: v.clone() for k, v in optimizer.state[p].items()}
             for name, p in model.named_parameters()}  # fmt: skip
    other = build()
    loaded = muon(other)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for name, p in other.named_parameters():
        for key, value in loaded.state[p].items():
            assert value.dtype is (torch.float32 if key == "step" else wide), (name, key)
            assert torch.equal(value, saved[name][key])


def test_bfloat16_weights_are_rounded_once():
    """As the AdamW half does: a decay of 1e-4 alone would be rounded away entirely."""
    for decay in (0.0, 0.5):
        model = Weights(dtype=torch.bfloat16, a=(16, 24))
        before = model.a.weight.detach().float()
        optimizer = muon(model, lr=2e-3, weight_decay=decay)
        give_gradients(model, 0)
        g = model.a.weight.grad.float()
        u = jordan(0.05 * g + 0.95 * 0.05 * g).float()
        optimizer.step()
        exact = (1 - 2e-3 * decay) * before - 2e-3 * moonlight(16, 24) * u
        error = (model.a.weight.detach().float() - exact).abs()
        half_an_ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 8)
        assert (error <= half_an_ulp + 1e-7).all(), decay


def test_bfloat16_scalars_are_rounded_once():
    model = mixed_model(torch.bfloat16)
    optimizer = muon(model, **OPTIONS)
    p = model[2].weight
    reference_p = nn.Parameter(p.detach().float())
    give_gradients(model, 0)
    reference_p.grad = p.grad.float()
    optimizer.step()
    torch.optim.AdamW(
        [reference_p], lr=0.005, weight_decay=0.01, betas=(0.9, 0.95), eps=1e-8
    ).step()
    assert torch.equal(p, reference_p.bfloat16())


@pytest.mark.parametrize(
    "options",
    [
        {"wire_dtype": "bfloat16"},
        {"polar_dtype": "bfloat16"},
        {"polar_dtype": "bfloat16", "wire_dtype": "float32"},
        {"polar_dtype": "float16"},
    ],
)
def test_reduced_precision_stays_near(options):
    model, other = Weights(a=(12, 20)), Weights(a=(12, 20))
    one, two = muon(model, **options), muon(other)
    before = values(model)["a.weight"]
    for m, optimizer in ((model, one), (other, two)):
        give_gradients(m, 0)
        optimizer.step()
    difference = (model.a.weight - other.a.weight).norm() / (other.a.weight - before).norm()
    assert 1e-5 < difference < 0.1


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float64")]
)
def test_a_group_of_several_dtypes_is_each_alone(dtypes):
    """Some layers are often kept in a wider dtype."""
    one, other = (Weights(dtype=getattr(torch, d), seed=i, a=(4, 6)) for i, d in enumerate(dtypes))
    both = nn.ModuleDict({"one": copy.deepcopy(one), "other": copy.deepcopy(other)})
    optimizers = [muon(one), muon(other)]
    together = muon(both)
    for step in range(3):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            give_gradients(model, step)
            optimizer.step()
        both["one"].a.weight.grad = one.a.weight.grad.clone()
        both["other"].a.weight.grad = other.a.weight.grad.clone()
        together.step()
    assert torch.equal(both["one"].a.weight, one.a.weight)
    assert torch.equal(both["other"].a.weight, other.a.weight)

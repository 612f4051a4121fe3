"""spectral_dist.Muon in one process and under replicas, against specs/muon.md written out."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import spectral_dist
from spectral_dist.polar import METHODS
from tests import harness, models
from tests.reference import polar as reference
from tests.reference import training

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}


class Weights(nn.Module):
    """Bias-free Linear weights by name, random."""

    def __init__(self, seed=0, dtype=torch.float32, **shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, (m, n) in shapes.items():
            layer = nn.Linear(n, m, bias=False, dtype=dtype)
            layer.weight.data = (0.3 * torch.randn(m, n, generator=generator)).to(dtype)
            setattr(self, name, layer)


def muon(model, lr=0.02, matrices=(), scalars=(), split=None, **options):
    found = spectral_dist.param_groups(model, matrices=matrices, scalars=scalars, split=split)
    return spectral_dist.Muon(found, lr=lr, **options)


def give_gradients(model, step, skip=()):
    generator = torch.Generator().manual_seed(500 + step)
    for name, p in model.named_parameters():
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if name in skip or not p.requires_grad else g


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def expect(model, count, factor, *, lr, polar, beta=0.95, nesterov=True, decay=0.1):
    """Weights after ``count`` steps of specs/muon.md on give_gradients, in float64."""
    model = copy.deepcopy(model)
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    momenta = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in range(count):
        give_gradients(model, step)
        for name, p in model.named_parameters():
            g = p.grad.double()
            momenta[name] = beta * momenta[name] + (1 - beta) * g
            u = polar((1 - beta) * g + beta * momenta[name] if nesterov else momenta[name])
            w = weights[name]
            weights[name] = (1 - lr * decay) * w - lr * factor(*w.shape) * u
    return weights


def jordan(x):
    return reference.newton_schulz("jordan", 5, x)


def moonlight(m, n):
    return 0.2 * max(m, n) ** 0.5


FACTORS = {
    "match_rms_adamw": moonlight,
    "original": lambda m, n: max(1, m / n) ** 0.5,
    "spectral": lambda m, n: (m / n) ** 0.5,
    "none": lambda m, n: 1,
}
SHAPES = {"wide": (4, 9), "tall": (10, 3), "square": (6, 6), "row": (1, 5), "column": (7, 1)}


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
    exact = method in ("svd", "eigh")

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


def test_a_language_model_against_the_reference():
    wanted = training.train(OPTIONS)
    model = models.build()
    optimizer = muon(model, **OPTIONS)
    for step in range(10):
        model.zero_grad()
        model(models.tokens(step)).backward()
        for p in model.parameters():  # as the reference does
            p.grad = torch.zeros_like(p) if p.grad is None and p.requires_grad else p.grad
        optimizer.step()
    start = values(models.build())
    for name, w in values(model).items():
        bound = 1e-6 if training.is_matrix(name) else 1e-5  # Adam amplifies rounding
        torch.testing.assert_close(w, wanted[name], rtol=0, atol=bound, msg=name)
        assert torch.equal(w, start[name]) == (name == "frozen.weight")


def mixed_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)).to(
        dtype
    )


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


def test_scalar_lr_stays_a_ratio_under_a_scheduler():
    """Schedulers (DeepSpeed's too) write one lr into every group."""
    model, other = mixed_model(), mixed_model()
    optimizer = muon(model, **OPTIONS)
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


# -- gradients that are missing or not finite


def test_a_parameter_without_gradient_is_warned_of_once_and_left_alone():
    model = mixed_model()
    optimizer = muon(model)
    before = values(model)
    skip = ("1.weight", "2.bias")
    for step in range(3):
        give_gradients(model, step, skip)
        if step == 0:
            with pytest.warns(UserWarning, match="has no gradient") as caught:
                optimizer.step()
            said = sorted(str(w.message).split()[0] for w in caught)
            assert said == sorted(skip)
        else:
            optimizer.step()  # a warning would be an error
    for name, w in values(model).items():
        assert torch.equal(w, before[name]) == (name in skip), name
    assert not any(v.any() for v in optimizer.state[model[1].weight].values())
    assert not any(v.any() for v in optimizer.state[model[2].bias].values())


def test_it_starts_fresh_once_it_has_a_gradient():
    model, other = mixed_model(), mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0, skip=("1.weight", "2.bias"))
    with pytest.warns(UserWarning, match="has no gradient"):
        optimizer.step()
    give_gradients(model, 1)
    optimizer.step()
    fresh = muon(other)
    give_gradients(other, 1)
    fresh.step()
    assert torch.equal(model[1].weight, other[1].weight)
    assert torch.equal(model[2].bias, other[2].bias)


def test_no_gradient_at_all():
    model = mixed_model()
    optimizer = muon(model)
    with pytest.raises(ValueError, match=r"no parameter has a gradient; call backward\(\)"):
        optimizer.step()


def everything(model, optimizer):
    """Copies of weights, states (by parameter name), and groups' values."""
    states = {
        f"{name}:{key}": value.clone()
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }
    return {**values(model), **states}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0.weight", "1.weight", "3.weight", "2.bias"])
def test_a_gradient_that_is_not_finite_changes_nothing(name, bad):
    model = mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0)
    optimizer.step()
    before = everything(model, optimizer)
    give_gradients(model, 1)
    dict(model.named_parameters())[name].grad.view(-1)[-1] = bad
    with pytest.raises(ValueError, match=rf"gradient of {re.escape(name)} is NaN or infinite"):
        optimizer.step()
    after = everything(model, optimizer)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert before.keys() == after.keys()


def test_all_bad_gradients_are_named():
    model = mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0)
    for name in ("1.weight", "3.weight"):
        dict(model.named_parameters())[name].grad[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"gradient of 1\.weight, 3\.weight is NaN"):
        optimizer.step()


def test_of_many_bad_gradients_some_are_named():
    model = Weights(**{f"w{i}": (2, 3) for i in range(8)})
    optimizer = muon(model)
    give_gradients(model, 0)
    for p in model.parameters():
        p.grad[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"w0\.weight, .*w4\.weight and 3 more is NaN"):
        optimizer.step()


def test_check_finite_false_lets_it_through():
    model = mixed_model()
    optimizer = muon(model, check_finite=False)
    give_gradients(model, 0)
    model[1].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert model[1].weight.isnan().all()
    assert model[3].weight.isfinite().all()


def test_large_but_finite_gradients_pass():
    model = mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0)
    for p in model.parameters():
        p.grad.mul_(1e30)  # whose square is not finite
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_in_another_memory_order():
    """Users may assign .grad; torch's own optimizers take any strides."""
    model, other = Weights(a=(4, 6)), Weights(a=(4, 6))
    one, two = muon(model), muon(other)
    give_gradients(model, 0)
    other.a.weight.grad = model.a.weight.grad.T.contiguous().T
    assert not other.a.weight.grad.is_contiguous()
    one.step()
    two.step()
    assert torch.equal(model.a.weight, other.a.weight)


# -- step()


def test_closure():
    model, other = mixed_model(), mixed_model()
    optimizer, plain = muon(model), muon(other)
    tokens = torch.tensor([[1, 2, 3]])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    other_loss = other(tokens).square().mean()
    other_loss.backward()
    assert plain.step() is None
    assert loss.item() == other_loss.item()
    assert same(values(model), values(other))


def test_polar_calls_count_matrices():
    model = models.build()
    optimizer = muon(model, split={"qkv": 3})
    give_gradients(model, 0)
    optimizer.step()
    # 2 layers of (3 of qkv, out, up, down), 3 experts, unused
    assert optimizer.polar_calls == 2 * 6 + 3 + 1
    optimizer.step()
    assert optimizer.polar_calls == 2 * 16
    assert optimizer.comm_bytes == 0


def test_steps_are_counted_per_parameter():
    model = mixed_model()
    optimizer = muon(model)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in model.parameters()] == [3.0] * 7


def test_state_is_one_buffer_for_matrices_and_two_for_the_rest():
    model = mixed_model()
    optimizer = muon(model)
    give_gradients(model, 0)
    optimizer.step()
    for name, p in model.named_parameters():
        kept = {"step", "exp_avg"} | (set() if name in ("1.weight", "3.weight") else {"exp_avg_sq"})
        assert set(optimizer.state[p]) == kept
        assert all(optimizer.state[p][k].shape == p.shape for k in kept - {"step"})


def test_parameters_that_something_sharded_are_refused():
    model = mixed_model()
    optimizer = muon(model)
    model[1].weight.data = model[1].weight.data[:4]
    model[1].weight.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"1\.weight is now \(4, 6\) but was \(8, 6\)"):
        optimizer.step()


def test_parameters_out_of_memory_order_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)
    optimizer = muon(model)
    give_gradients(model, 0)
    with pytest.raises(ValueError, match=r"0\.weight is not contiguous"):
        optimizer.step()


# -- a weight that holds several matrices


def run(model, steps, names=None, **options):
    """Weights after ``steps`` with gradients that depend on the step only."""
    optimizer = muon(model, **options)
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    return optimizer


ROWS = {
    3: [slice(0, 8), slice(8, 16), slice(16, 24)],
    (12, 6, 6): [slice(0, 12), slice(12, 18), slice(18, 24)],
    (4, 2, 2): [
        [r for g in (0, 8, 16) for r in range(g, g + 4)],
        [r for g in (4, 12, 20) for r in range(g, g + 2)],
        [r for g in (6, 14, 22) for r in range(g, g + 2)],
    ],
}


@pytest.mark.parametrize("split", ROWS)
def test_a_split_weight_equals_its_parts_bitwise(split):
    whole = Weights(qkv=(24, 10))
    rows = ROWS[split]
    parts = Weights(**{f"part{i}": (1, 1) for i in range(3)})
    for i, part in enumerate(parts.children()):
        part.weight.data = whole.qkv.weight.detach()[rows[i]].clone()
    one = muon(whole, split={"qkv": split if isinstance(split, int) else list(split)})
    two = muon(parts)
    for step in range(3):
        give_gradients(whole, step)
        for i, part in enumerate(parts.children()):
            part.weight.grad = whole.qkv.weight.grad[rows[i]].clone()
        one.step()
        two.step()
    for i, part in enumerate(parts.children()):
        assert torch.equal(whole.qkv.weight[rows[i]], part.weight)
    assert one.polar_calls == two.polar_calls == 9


def test_a_stack_of_experts_equals_its_matrices_bitwise():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(0.1 * torch.randn(4, 6, 5))

    torch.manual_seed(3)
    stack = Experts()
    parts = Weights(**{f"e{i}": (6, 5) for i in range(4)})
    for i, part in enumerate(parts.children()):
        part.weight.data = stack.experts.detach()[i].clone()
    one, two = muon(stack), muon(parts)
    for step in range(3):
        give_gradients(stack, step)
        for i, part in enumerate(parts.children()):
            part.weight.grad = stack.experts.grad[i].clone()
        one.step()
        two.step()
    for i, part in enumerate(parts.children()):
        assert torch.equal(stack.experts[i], part.weight)


def test_a_convolution_is_its_matrix_bitwise():
    torch.manual_seed(4)
    conv = nn.Sequential(nn.Conv2d(3, 8, (2, 5), bias=False))
    flat = Weights(a=(8, 30))
    flat.a.weight.data = conv[0].weight.detach().view(8, 30).clone()
    one, two = muon(conv), muon(flat)
    for step in range(3):
        give_gradients(conv, step)
        flat.a.weight.grad = conv[0].weight.grad.view(8, 30).clone()
        one.step()
        two.step()
    assert torch.equal(conv[0].weight.view(8, 30), flat.a.weight)


@pytest.mark.parametrize("bucket_mb", [1e-9, 0.002, 0.01])
def test_buckets_change_no_bit(bucket_mb):
    one, two = models.build(), models.build()
    first = run(one, 3, split={"qkv": 3})
    second = run(two, 3, split={"qkv": 3}, bucket_mb=bucket_mb)
    assert same(values(one), values(two))
    assert first.polar_calls == second.polar_calls
    (unit,) = (u for u in second._units.values() if u.plan is not None)
    assert len(unit.plan.buckets) > 1


# -- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stopping_and_going_on_changes_no_bit(dtype):
    never = models.build().to(dtype)
    run(never, 6, split={"qkv": 3}, **OPTIONS)
    stopped = models.build().to(dtype)
    optimizer = run(stopped, 3, split={"qkv": 3}, **OPTIONS)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = models.build(seed=1).to(dtype)
    resumed.load_state_dict(saved["model"])
    optimizer = muon(resumed, split={"qkv": 3}, **OPTIONS)
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        give_gradients(resumed, step)
        optimizer.step()
    assert same(values(never), values(resumed))


def test_groups_of_a_state_dict_are_plain():
    """Frameworks write them as JSON or pickle them without our classes."""
    optimizer = run(models.build(), 1)
    json.dumps(optimizer.state_dict()["param_groups"])


# -- replicas


def local_run(model, count, same_batch, group=None, **options):
    """``count`` steps; returns the optimizer."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    optimizer = spectral_dist.Muon(
        spectral_dist.param_groups(inner, split={"qkv": 3}), process_group=group, **options
    )
    for step in range(count):
        batch = models.tokens(step)
        if not same_batch:
            batch = batch.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    return optimizer


def replicas(bucket_mb, odd, **options):
    """Equal gradients on every rank: (differing parameters, polar calls of both, bytes sent)."""
    options = {**OPTIONS, **options, "bucket_mb": bucket_mb}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the unused weight
        alone, shared = models.build(odd=odd), models.build(odd=odd)
        first = local_run(alone, 4, True, **options)
        second = local_run(shared, 4, True, group=dist.group.WORLD, **options)
    a, b = values(alone), values(shared)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    return different, first.polar_calls, second.polar_calls, dict(second.meter.bytes)


@pytest.mark.parametrize(
    ("ranks", "bucket_mb", "odd"),
    [(1, 64, True), (2, 64, True), (2, 0.01, False), (3, 0.01, True)],
)
def test_replicas_equal_one_process_bitwise(ranks, bucket_mb, odd):
    results = harness.run(ranks, replicas, bucket_mb, odd)
    for different, alone, _, _ in results:
        assert different == []
        assert alone == 4 * (16 if odd else 12)
    # each matrix on one rank, not on every one
    assert sum(result[2] for result in results) == results[0][1]
    if ranks == 1:
        assert results[0][3] == {}
    else:
        assert all(result[2] > 0 and result[3]["all_gather"] > 0 for result in results)


def test_the_wire_is_as_wide_as_the_polar_factor():
    """float16 would overflow before it is normalised, so what it computes travels in float32."""
    sent = {}
    for dtype in ("float32", "bfloat16", "float16"):
        results = harness.run(2, replicas, 64, False, polar_dtype=dtype)
        assert [different for different, *_ in results] == [[], []]
        sent[dtype] = results[0][3]["all_gather"]
    assert sent["float32"] == sent["float16"] == 2 * sent["bfloat16"]


def data_parallel():
    """DDP on different data against one process on all of it: largest differences by kind."""
    alone, shared = models.build(odd=False), models.build(odd=False)
    local_run(alone, 10, True, **OPTIONS)
    wrapped = nn.parallel.DistributedDataParallel(shared)
    local_run(wrapped, 10, False, group=dist.group.WORLD, **OPTIONS)
    largest = {True: 0.0, False: 0.0}
    a, b = values(alone), values(shared)
    for name in a:
        kind = training.is_matrix(name)
        largest[kind] = max(largest[kind], (a[name] - b[name]).abs().max().item())
    return largest, {name: w.sum().item() for name, w in b.items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_data_parallel_equals_one_process(ranks):
    results = harness.run(ranks, data_parallel)
    for largest, sums in results:
        assert largest[True] < 1e-6
        assert largest[False] < 1e-5
        assert sums == results[0][1]  # replicas do not drift apart


def fewer_matrices_than_ranks():
    model, alone = Weights(a=(4, 6)), Weights(a=(4, 6))
    shared, single = muon(model, process_group=dist.group.WORLD), muon(alone)
    for step in range(2):
        for m, optimizer in ((model, shared), (alone, single)):
            give_gradients(m, step)
            optimizer.step()
    return torch.equal(model.a.weight, alone.a.weight), shared.polar_calls


def test_fewer_matrices_than_ranks():
    results = harness.run(3, fewer_matrices_than_ranks)
    assert [equal for equal, _ in results] == [True] * 3
    assert sorted(calls for _, calls in results) == [0, 0, 2]


def bad_on_one_rank(name):
    model = mixed_model()
    optimizer = muon(model, process_group=dist.group.WORLD)
    before = values(model)
    give_gradients(model, 0)
    if dist.get_rank() == 1:
        dict(model.named_parameters())[name].grad.view(-1)[0] = math.nan
    try:
        optimizer.step()
    except ValueError as error:
        return str(error), same(before, values(model))
    return "no error", False


@pytest.mark.parametrize("name", ["1.weight", "2.bias"])
def test_nan_on_one_rank_is_an_error_on_all(name, monkeypatch):
    monkeypatch.setattr(harness, "TIMEOUT", 60.0)
    for text, unchanged in harness.run(2, bad_on_one_rank, name):
        assert f"the gradient of {name} is NaN" in text
        assert unchanged

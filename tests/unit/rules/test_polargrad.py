"""spectral_dist.PolarGrad in one process against specs/polargrad.md, and what it obeys."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spectral_dist
from tests.reference import polar as formulas
from tests.reference import rules
from tests.support.weights import SHAPES, Single, Weights, give_gradients, values

quick = settings(max_examples=25, deadline=None, derandomize=True)
sides = st.integers(1, 9)
seeds = st.integers(0, 10_000)
forms = st.booleans()
EXACT = ("qdwh", "zolo", "svd", "eigh")
INEXACT = ("jordan", "polar_express", "gram_jordan", "quintic", "cubic5")


def polargrad(model, lr=0.02, split=None, **options):
    return spectral_dist.PolarGrad(spectral_dist.param_groups(model, split=split), lr=lr, **options)


def conditioned(m, n, seed):
    """Random float64, singular values in [.2, 1]."""
    generator = torch.Generator().manual_seed(seed)
    s = 0.2 + 0.8 * torch.rand(min(m, n), dtype=torch.float64, generator=generator)
    return formulas.with_singular_values(s, m, n, seed)


def after(weight, gradients, optimizer=polargrad, **options):
    """The weight after a step on each of the gradients."""
    model = Single(weight)
    chosen = optimizer(model, **options)
    for g in gradients:
        model.only.weight.grad = g.clone().to(weight.dtype)
        chosen.step()
    return model.only.weight.detach()


def near(a, b, bound=1e-10):
    return bool((a - b).norm() <= bound * (1 + b.norm()))


# -- against the reference


@pytest.mark.parametrize("polar_first", [False, True])
@pytest.mark.parametrize("polar", [*EXACT, *INEXACT])
def test_both_forms_with_each_oracle(polar, polar_first):
    options = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.8, "polar_first": polar_first}
    model = Weights(dtype=torch.float64, **SHAPES)
    wanted = {n: w.double() for n, w in values(model).items()}
    momenta = {n: torch.zeros_like(w) for n, w in wanted.items()}
    optimizer = polargrad(model, polar=polar, **options)
    oracle = rules.oracle(polar)
    for step in range(5):
        give_gradients(model, step)
        for name, p in model.named_parameters():
            rules.polargrad(wanted[name], p.grad, momenta[name], options, oracle)
        optimizer.step()
    for name, w in values(model).items():
        torch.testing.assert_close(w, wanted[name], rtol=1e-9, atol=1e-9)


def test_defaults_are_the_papers():
    """Momentum first at .95 with a converged QDWH, decay .1, and no scale by the shape."""
    model = Weights(dtype=torch.float64, **SHAPES)
    wanted = values(model)
    momenta = {n: torch.zeros_like(w) for n, w in wanted.items()}
    optimizer = polargrad(model)
    for step in range(6):
        give_gradients(model, step)
        for name, p in model.named_parameters():
            rules.polargrad(wanted[name], p.grad, momenta[name], {"lr": 0.02, "weight_decay": 0.1})
        optimizer.step()
    for name, w in values(model).items():
        torch.testing.assert_close(w, wanted[name], rtol=1e-9, atol=1e-9)
    assert optimizer.polar_calls == 6 * len(SHAPES)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("polar_first", [False, True])
def test_powers_of_nu(power, polar_first):
    options = {"lr": 0.01, "weight_decay": 0.1, "polar_first": polar_first, "nu_power": power}
    w, g = conditioned(4, 7, 1), [conditioned(4, 7, seed) for seed in (2, 3)]
    wanted, momentum = w.clone(), torch.zeros_like(w)
    for gradient in g:
        rules.polargrad(wanted, gradient, momentum, options)
    assert near(after(w, g, **options), wanted)


@pytest.mark.parametrize("polar_first", [False, True])
def test_bfloat16_weights_have_a_float32_momentum(polar_first):
    """Computed as for float32 weights, and rounded once."""
    options = {"lr": 0.02, "weight_decay": 0.1, "polar_first": polar_first}
    model = Weights(dtype=torch.bfloat16, **SHAPES)
    optimizer = polargrad(model, **options)
    momenta = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    for step in range(4):
        give_gradients(model, step)
        wanted = values(model)
        for name, p in model.named_parameters():
            rules.polargrad(wanted[name], p.grad, momenta[name], options)
        optimizer.step()
        for name, p in model.named_parameters():
            of_matrix = optimizer.matrix_state().get(name, optimizer.state[p])
            kept = of_matrix["moment" if polar_first else "exp_avg"]
            assert kept.dtype == torch.float32
            torch.testing.assert_close(kept, momenta[name], rtol=1e-4, atol=1e-5)
            # one bfloat16 rounding may fall to either side
            torch.testing.assert_close(p.detach(), wanted[name], rtol=2**-7, atol=1e-5)


def test_the_direction_has_the_gradients_nuclear_norm():
    """W - W' = lr nu U for one step without decay and momentum, nu = ||G||_*."""
    w, g = conditioned(6, 4, 1), conditioned(6, 4, 2)
    moved = w - after(w, [g], lr=0.5, weight_decay=0.0, momentum=0.0)
    nuclear = torch.linalg.svdvals(g).sum()
    assert near(torch.linalg.svdvals(moved), 0.5 * nuclear.expand(4))
    assert near((moved * g).sum(), 0.5 * nuclear**2)


# -- properties


@quick
@given(sides, sides, seeds, forms, st.sampled_from(["qdwh", "jordan", "svd"]))
def test_equivariance_under_orthogonal_transforms(m, n, seed, polar_first, polar):
    w, g = conditioned(m, n, seed), [conditioned(m, n, seed + k) for k in (10, 20, 30)]
    p, q = formulas.random_orthogonal(m, seed + 1), formulas.random_orthogonal(n, seed + 2)
    o = {"polar_first": polar_first, "polar": polar, "momentum": 0.5}
    turned = after(p @ w @ q, [p @ x @ q for x in g], **o)
    assert near(turned, p @ after(w, g, **o) @ q, 1e-7 if polar == "svd" else 1e-9)


@quick
@given(sides, sides, seeds, forms, st.sampled_from([*EXACT, "jordan", "polar_express"]),
       st.integers(-60, 60))  # fmt: skip
def test_homogeneous_in_the_gradient_bitwise_by_powers_of_two(
    m, n, seed, polar_first, polar, exponent
):
    g = [conditioned(m, n, seed + k) for k in (10, 20)]
    zero, c = torch.zeros(m, n, dtype=torch.float64), 2.0**exponent
    o = {"polar_first": polar_first, "polar": polar}
    assert torch.equal(after(zero, [c * x for x in g], **o), c * after(zero, g, **o))


@quick
@given(sides, sides, seeds, forms, st.floats(-6, 6))
def test_homogeneous_in_the_gradient(m, n, seed, polar_first, exponent):
    """update(c G) = c update(G), so averaging over 2 P ranks where P are is half the step."""
    w, g, c = conditioned(m, n, seed), conditioned(m, n, seed + 10), 10**exponent
    o = {"polar_first": polar_first, "weight_decay": 0.0, "lr": 1e-3}
    step, scaled = w - after(w, [g], **o), w - after(w, [c * g], **o)
    assert (scaled - c * step).norm() <= 1e-8 * c * step.norm() + 1e-14


@quick
@given(sides, sides, seeds, forms)
def test_minus_the_gradient_is_minus_the_step(m, n, seed, polar_first):
    zero, g = torch.zeros(m, n, dtype=torch.float64), conditioned(m, n, seed)
    o = {"polar_first": polar_first}
    assert torch.equal(after(zero, [-g], **o), -after(zero, [g], **o))


@quick
@given(sides, sides, seeds, st.sampled_from([*EXACT, "jordan"]))
def test_without_momentum_both_forms_are_one(m, n, seed, polar):
    w, g = conditioned(m, n, seed), [conditioned(m, n, seed + k) for k in (10, 20, 30)]
    o = {"momentum": 0.0, "polar": polar}
    assert near(after(w, g, polar_first=True, **o), after(w, g, polar_first=False, **o), 1e-13)


@quick
@given(sides, sides, seeds, st.sampled_from([*EXACT, "jordan", "polar_express"]))
def test_muon_is_the_case_without_nu(m, n, seed, polar):
    """Bitwise: nu^0 = 1, and Muon with neither Nesterov nor a scale."""
    w, g = conditioned(m, n, seed), [conditioned(m, n, seed + k) for k in (10, 20, 30)]

    def muon(model, **options):
        groups = spectral_dist.param_groups(model)
        return spectral_dist.Muon(groups, scale="none", nesterov=False, **options)

    o = {"lr": 0.02, "polar": polar, "weight_decay": 0.1}
    assert torch.equal(after(w, g, nu_power=0.0, **o), after(w, g, muon, **o))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("polar", [*EXACT, *INEXACT])
@pytest.mark.parametrize("polar_first", [False, True])
def test_zero_gives_zero(polar, polar_first, dtype):
    """Only decay moves a weight whose gradients are zero, and nothing becomes NaN."""
    w = conditioned(5, 3, 1).to(dtype)
    o = {"polar": polar, "polar_first": polar_first, "lr": 0.5}
    zeros = [torch.zeros(5, 3)] * 3
    assert torch.equal(after(w, zeros, weight_decay=0.0, **o), w)
    wanted = w.double() * (1 - 0.5 * 0.1) ** 3
    torch.testing.assert_close(
        after(w, zeros, weight_decay=0.1, **o).double(), wanted, rtol=2e-2, atol=0
    )
    nothing = torch.zeros(5, 3, dtype=dtype)
    assert torch.equal(after(nothing, zeros, nu_power=0.5, **o), nothing)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e15])
@pytest.mark.parametrize("polar_first", [False, True])
def test_tiny_and_huge_gradients_in_float32(scale, polar_first):
    """Their squares leave float32, their nuclear norm does not."""
    g = conditioned(6, 4, 2).float()
    o = {"momentum": 0.0, "polar_first": polar_first, "weight_decay": 0.0, "lr": 1.0}
    zero = torch.zeros(6, 4)
    moved = after(zero, [g * scale], **o).double() / scale
    torch.testing.assert_close(moved, after(zero, [g], **o).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("polar_first", [False, True])
def test_converges_linearly_on_a_quadratic(polar_first):
    """f = 1/2 ||W - A||_F^2, so L = 1: lr 1/(L r) contracts f - f* by 1 - 1/r^2 or more."""
    a = conditioned(6, 4, 3)
    model = Single(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = polargrad(model, lr=1 / 4, momentum=0.0, weight_decay=0.0, polar_first=polar_first)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = 0.5 * (model.only.weight - a).square().sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    for before, now in itertools.pairwise(losses):
        assert now <= before * (1 - 1 / 16) + 1e-28
    assert losses[-1] < 1e-5 * losses[0]  # where Muon with this lr would go round and round


def test_clipping_shrinks_the_step():
    """Unlike Muon's: PolarGrad's step has the gradient's size."""
    w, g = torch.zeros(4, 6), conditioned(4, 6, 2).float()
    parameter = nn.Parameter(w.clone())
    parameter.grad = g.clone()
    norm = nn.utils.clip_grad_norm_([parameter], 0.1)
    ratio = after(w, [parameter.grad]).norm() / after(w, [g]).norm()
    torch.testing.assert_close(ratio, 0.1 / norm, rtol=1e-4, atol=0)


# -- options


@pytest.mark.parametrize(
    ("option", "value"), [("scale", "original"), ("nesterov", False), ("quantile", 0.9)]
)
def test_options_of_others_are_unknown(option, value):
    with pytest.raises(ValueError, match=option):
        polargrad(Weights(a=(3, 4)), **{option: value})


@pytest.mark.parametrize("value", [-1.0, "1", True])
def test_powers_that_are_no_powers(value):
    with pytest.raises(ValueError, match="nu_power"):
        polargrad(Weights(a=(3, 4)), nu_power=value)

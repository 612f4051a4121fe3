"""What spectral_dist.SUMO obeys, and what zero and missing gradients do to it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import polar as formulas
from tests.support.weights import Weights, give_gradients, same, values
from tests.unit.rules.sumo_steps import LONG, after, follow, graded, state_of, sumo

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
bases = st.sampled_from(["randomized", "svd"])

# -- properties


@quick
@given(st.integers(2, 9), st.integers(2, 9), seeds, st.sampled_from([1, LONG]))
def test_equivariance_under_orthogonal_transforms(m, n, seed, period):
    w, g = formulas.gaussian(m, n, seed=seed), [graded(m, n, seed + k) for k in (10, 20, 30)]
    p, q = formulas.random_orthogonal(m, seed + 1), formulas.random_orthogonal(n, seed + 2)
    o = {"basis": "svd", "rank": 1, "perp_scale": 0.5, "period": period}
    turned = after(p @ w @ q, [p @ x @ q for x in g], **o)
    torch.testing.assert_close(turned, p @ after(w, g, **o) @ q, rtol=0, atol=1e-5)


@quick
@given(st.integers(2, 9), st.integers(2, 9), seeds, bases)
def test_a_transposed_matrix_takes_the_transposed_step(m, n, seed, basis):
    """But a square one, whose basis is on the left."""
    w, g = formulas.gaussian(m, n, seed=seed), [graded(m, n, seed + k) for k in (10, 20)]
    o = {"rank": 1, "basis": basis, "period": 1}
    found = after(w.mT.contiguous(), [x.mT.contiguous() for x in g], **o)
    if m != n:
        torch.testing.assert_close(found, after(w, g, **o).mT, rtol=0, atol=1e-6)


@quick
@given(st.integers(3, 9), st.integers(3, 9), seeds, bases, st.integers(-20, 20))
def test_a_loss_scale_changes_nothing_inside_bitwise_by_powers_of_two(m, n, seed, basis, exponent):
    zero, g = torch.zeros(m, n), [graded(m, n, seed + k) for k in (1, 20, 40)]
    o = {"basis": basis, "perp_scale": 0.0, "rank": 2, "period": 2}
    scaled = after(zero, [2.0**exponent * x for x in g], **o)
    assert torch.equal(scaled, after(zero, g, **o))


@quick
@given(st.integers(3, 9), st.integers(3, 9), seeds, bases, st.floats(-6, 6))
def test_a_loss_scale_changes_nothing_inside_and_much_outside(m, n, seed, basis, exponent):
    zero, g, c = torch.zeros(m, n), [graded(m, n, seed + k) for k in (1, 20)], 10**exponent
    o = {"basis": basis, "rank": 2, "lr": 1.0, "weight_decay": 0.0, "limiter": 0}
    inside = [after(zero, [k * x for x in g], perp_scale=0.0, **o) for k in (1.0, c)]
    torch.testing.assert_close(*inside, rtol=0, atol=1e-4)
    whole = [after(zero, [k * x for x in g], perp_scale=1.0, **o) for k in (1.0, c)]
    one, other = (w - inside[0] for w in whole)
    assert (other - c * one).norm() <= 1e-4 * (1 + c)
    assert one.norm() > 0.2


@quick
@given(st.integers(2, 9), st.integers(2, 9), seeds, bases, st.sampled_from([0.0, 0.1]))
def test_zero_gives_zero(m, n, seed, basis, decay):
    w = formulas.gaussian(m, n, seed=seed).float()
    o = {"lr": 0.5, "rank": 1, "basis": basis, "weight_decay": decay, "period": 2}
    found = after(w, [torch.zeros(m, n)] * 3, **o)
    torch.testing.assert_close(found, w * (1 - 0.5 * decay) ** 3, rtol=1e-6, atol=0)
    assert decay or torch.equal(found, w)


@pytest.mark.parametrize("basis", ["svd", "randomized"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e15, 1e25])
def test_gradients_of_extreme_size(size, basis):
    """In float32, the square of most of which it cannot hold."""
    g = [graded(9, 6, k) for k in (1, 20, 40)]
    o = {"basis": basis, "rank": 2, "period": 2, "lr": 1.0, "weight_decay": 0.0, "perp_scale": 0.0}
    found, wanted = (after(torch.zeros(9, 6), [c * x for x in g], **o) for c in (size, 1.0))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# -- gradients that are zero or missing


@pytest.mark.parametrize("period", [1, LONG])
@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize("perp_scale", [0.0, 1.0])
def test_a_zero_gradient_from_the_start_stops_nothing_later(perp_scale, decay, period):
    """The limiter's ratio to an update of zero is no ratio, and zero has no subspace."""
    g = [torch.zeros(8, 5), torch.zeros(8, 5), graded(8, 5, 1), graded(8, 5, 20)]
    start = formulas.gaussian(8, 5).float()
    o = {"rank": 2, "period": period, "lr": 0.1, "perp_scale": perp_scale, "weight_decay": decay}
    seen = follow(start, g, **o)
    torch.testing.assert_close(seen[1][0], start * (1 - 0.1 * decay) ** 2, rtol=1e-6, atol=0)
    assert not seen[1][1]["moment"].any()
    for (before, _), (w, _) in itertools.pairwise(seen[1:]):
        moved = w - (1 - 0.1 * decay) * before
        assert w.isfinite().all()
        assert moved.norm() > 0.05


@pytest.mark.parametrize("basis", ["svd", "randomized"])
@pytest.mark.parametrize("period", [1, LONG])
def test_basis_and_moment_outlive_a_zero_gradient(period, basis):
    g = [graded(8, 5, 1), torch.zeros(8, 5), torch.zeros(8, 5)]
    o = {"rank": 2, "period": period, "basis": basis, "momentum": 0.5, "perp_scale": 0.0}
    o |= {"weight_decay": 0.0, "limiter": 0}
    seen = follow(torch.zeros(8, 5), g, **o)
    moments = [state["moment"] for _, state in seen]
    torch.testing.assert_close(moments[2], 0.25 * moments[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(seen[2][1]["basis"], seen[0][1]["basis"])
    torch.testing.assert_close(seen[2][0], 3 * seen[0][0], rtol=0, atol=1e-6)


def test_a_parameter_without_gradient_keeps_weight_and_state():
    model = Weights(a=(8, 5), b=(8, 5), c=(4, 9))
    optimizer = sumo(model, rank=2, period=1)
    give_gradients(model, 0)
    optimizer.step()
    before, weights = state_of(optimizer), values(model)
    give_gradients(model, 1, skip=("b.weight",))
    with pytest.warns(UserWarning, match=r"b\.weight has no gradient"):
        optimizer.step()
    now = state_of(optimizer)
    for name, w in values(model).items():
        assert torch.equal(w, weights[name]) == (name == "b.weight")
        assert same(now[name], before[name]) == (name == "b.weight")
    give_gradients(model, 2)
    optimizer.step()
    assert [int(state["step"]) for state in state_of(optimizer).values()] == [3, 2, 3]


def test_it_starts_fresh_once_it_has_a_gradient():
    models_ = [Weights(a=(8, 5), b=(8, 5)) for _ in range(2)]
    one, other = (sumo(model, rank=2) for model in models_)
    give_gradients(models_[0], 0, skip=("a.weight",))
    with pytest.warns(UserWarning, match=r"a\.weight has no gradient"):
        one.step()
    for model, optimizer in zip(models_, (one, other), strict=True):
        give_gradients(model, 1)
        model.b.weight.grad = None if optimizer is other else model.b.weight.grad
        if optimizer is other:
            with pytest.warns(UserWarning, match=r"b\.weight has no gradient"):
                optimizer.step()
        else:
            optimizer.step()
    # the sketch may depend on the step, which is the matrix's own
    torch.testing.assert_close(models_[0].a.weight, models_[1].a.weight, rtol=0, atol=1e-6)


def test_frozen_weights_are_nowhere():
    model = Weights(a=(8, 5), b=(8, 5))
    model.b.weight.requires_grad_(False)
    optimizer = sumo(model, rank=2)
    before = values(model)
    give_gradients(model, 0)
    optimizer.step()
    assert list(state_of(optimizer)) == ["a.weight"]
    assert torch.equal(model.b.weight, before["b.weight"])

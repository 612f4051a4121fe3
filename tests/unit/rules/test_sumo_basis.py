"""When spectral_dist.SUMO takes new bases, and how good the randomized ones are."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from tests.reference import polar as formulas
from tests.support.weights import Weights, give_gradients, same
from tests.unit.rules.sumo_steps import (
    LONG,
    equal,
    follow,
    graded,
    refreshed,
    state_of,
    sumo,
    update,
)

# -- when bases are taken


@pytest.mark.slow
def test_refreshes_are_spread_and_once_in_a_period():
    period, count = 10, 200
    model = Weights(**{f"layer{i}": (4, 3) for i in range(count)})

    def refreshes(steps):
        """Of each step, and the states at the end."""
        optimizer = sumo(model, rank=1, period=period)
        states, found = {}, []
        for step in range(steps):
            give_gradients(model, step)
            optimizer.step()
            before, states = states, state_of(optimizer)
            found.append(refreshed(before, states))
        return found, states

    found, _ = refreshes(2 * period + 1)
    assert len(found[0]) == count
    for start in (1, 1 + period):
        times = Counter(itertools.chain(*found[start : start + period]))
        assert len(times) == count
        assert set(times.values()) == {1}
    assert found[1 : 1 + period] == found[1 + period :]
    assert max(map(len, found[1:])) <= 3 * count / period
    again, states = refreshes(3)
    assert again == found[:3]
    assert equal(refreshes(3)[1], states)


def test_a_period_longer_than_the_run_keeps_the_first_basis():
    g = [graded(8, 5, 10 * step) for step in range(6)]
    seen = follow(torch.zeros(8, 5), g, rank=2, period=LONG)
    assert all(torch.equal(state["basis"], seen[0][1]["basis"]) for _, state in seen)


def test_period_one_takes_a_basis_at_every_step():
    g = [graded(8, 5, 10 * step) for step in range(6)]
    for step, (_, state) in enumerate(follow(torch.zeros(8, 5), g, rank=2, period=1, basis="svd")):
        u = torch.linalg.svd(g[step]).U[:, :2].float()
        torch.testing.assert_close(state["basis"] @ state["basis"].mT, u @ u.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
@pytest.mark.parametrize("basis", ["svd", "randomized"])
@pytest.mark.parametrize(("inside", "wanted"), [(0.999, True), (1.001, False), (10.0, False)])
def test_refresh_below_a_norm_inside(inside, wanted, basis, shape):
    """Absolute: of Q^T G with the basis that is there, however much is outside of it."""
    u, v = formulas.random_orthogonal(8, 1), formulas.random_orthogonal(5, 2)
    first = u[:, :2] @ torch.diag(torch.tensor([3.0, 2.0]).double()) @ v[:2]
    factors = torch.tensor([1.2 * inside, 1.6 * inside, 50.0, 40.0]).double()
    g = [first, u[:, :4] @ torch.diag(factors) @ v[:4]]
    g = [x if shape[0] > shape[1] else x.mT.contiguous() for x in g]
    for below, refreshes in ((2.0, wanted), (0.0, False)):
        o = {"rank": 2, "period": LONG, "basis": basis, "refresh_below": below}
        one, two = (state["basis"] for _, state in follow(torch.zeros(shape), g, **o))
        assert torch.equal(one, two) != refreshes
        if refreshes:
            now = (u[:, 2:4] @ u[:, 2:4].mT).float()
            torch.testing.assert_close(two @ two.mT, now, rtol=0, atol=1e-4)


def test_refresh_below_zero_is_off():
    """Even if nothing at all is inside."""
    g = [torch.zeros(6, 4), torch.zeros(6, 4)]
    g[0][:2, :2], g[1][2:, 2:] = torch.eye(2), torch.ones(4, 2)
    one, two = (state["basis"] for _, state in follow(torch.zeros(6, 4), g, rank=2, period=LONG))
    assert torch.equal(one, two)


# -- randomized bases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_a_gap_makes_both_bases_one(shape, dtype):
    """sigma_r / sigma_(r+1) = 100: projectors and updates differ by rounding."""
    s = torch.cat([torch.linspace(1, 0.5, 6), torch.full((34,), 0.005)]).double()
    g = formulas.with_singular_values(s, *shape, seed=3).to(dtype)
    found = [update(g, rank=6, basis=basis, perp_scale=0.5) for basis in ("randomized", "svd")]
    onto = [(state["basis"] @ state["basis"].mT).double() for _, state in found]
    assert torch.linalg.matrix_norm(onto[0] - onto[1], 2) < 1e-5
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_without_a_gap_nearly_the_best_energy_is_inside(decay, r):
    s = torch.arange(1, 81).double() ** -decay
    for seed in range(3):
        g = formulas.with_singular_values(s, 120, 80, seed=10 * seed)
        q = update(g, rank=r, seed=seed)[1]["basis"].double()
        torch.testing.assert_close(q.mT @ q, torch.eye(r).double(), rtol=0, atol=1e-5)
        assert (q.mT @ g).square().sum() > 0.97 * s[:r].square().sum()
        assert (q.mT @ g).square().sum() <= s[:r].square().sum() * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("basis", ["svd", "randomized"])
@pytest.mark.parametrize("decades", [1, 2, 3, 4])
def test_small_singular_values_are_captured_as_well_as_large_ones(decades, basis, dtype):
    """Each direction counts alike in O, so the energy alone says little.

    All of the r singular values are far above the 1.4e-5 at which directions are null.
    """
    s = torch.logspace(0, -decades, 16).double()
    s = torch.cat([s, s[-1:].expand(64) / 100])
    g = formulas.with_singular_values(s, 120, 80, seed=3).to(dtype)
    d, state = update(g, rank=16, basis=basis, perp_scale=0.0)
    found = torch.linalg.svdvals(state["basis"].double().mT @ g.double())
    assert (found > 0.99 * s[:16]).all()
    assert d.norm().item() == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize("basis", ["svd", "randomized"])
@pytest.mark.parametrize(("least", "kept"), [(1e-5, 3), (5e-5, 6)])
def test_directions_are_null_at_eps_times_the_long_side(least, kept, basis):
    """2.4e-5 of the largest singular value here; in the basis, and in the moment's factor."""
    s = torch.tensor([1, 0.8, 0.6, least, least, least, 0, 0], dtype=torch.float64)
    g = formulas.with_singular_values(s, 200, 8, seed=3).float()
    d, state = update(g, rank=6, basis=basis, perp_scale=0.0)
    lengths = state["basis"].norm(dim=0).sort(descending=True).values
    wanted = torch.tensor([1.0] * kept + [0.0] * (6 - kept))
    torch.testing.assert_close(lengths, wanted, rtol=0, atol=1e-5)
    assert d.square().sum().item() == pytest.approx(kept, rel=1e-4)


def test_gradients_of_low_rank_have_no_noise_in_their_exact_basis():
    """In float64: where the rounding of a Gram matrix is larger than what counts as null."""
    model = Weights(dtype=torch.float64, **{f"layer{i}": (12, 9) for i in range(100)})
    optimizer = sumo(model, rank=8, basis="svd")
    for i, p in enumerate(model.parameters()):
        p.grad = graded(12, 9, 10 * i, rank=2)
    optimizer.step()
    lengths = torch.stack([s["basis"].norm(dim=0) for s in state_of(optimizer).values()])
    wanted = torch.tensor([1.0] * 2 + [0.0] * 6).double().expand(100, 8)
    torch.testing.assert_close(lengths.sort(descending=True).values, wanted, rtol=0, atol=1e-5)


def test_another_seed_is_another_sketch_of_the_same_update():
    s = torch.cat([torch.linspace(1, 0.5, 6), torch.full((34,), 0.005)]).double()
    g = [formulas.with_singular_values(s, 60, 40, seed=10 * k) for k in range(3)]
    runs = [follow(torch.zeros(60, 40), g, rank=6, period=1, seed=seed) for seed in (0, 1, 0)]
    for (w, one), (other, two), (again, three) in zip(*runs, strict=True):
        torch.testing.assert_close(w, other, rtol=0, atol=1e-5)
        assert not torch.equal(one["basis"], two["basis"])
        assert torch.equal(w, again)
        assert same(one, three)


def test_torchs_random_numbers_have_no_part_in_it():
    s = torch.arange(1, 41).double() ** -0.5
    g = formulas.with_singular_values(s, 60, 40)
    torch.manual_seed(1)
    first = update(g, rank=4)[0]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(update(g, rank=4)[0], first)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_matrix_and_each_step_has_its_own_sketch():
    s = torch.arange(1, 41).double() ** -0.5
    g = formulas.with_singular_values(s, 60, 40).float()
    model = Weights(a=(60, 40), b=(60, 40))
    optimizer = sumo(model, rank=4, period=1)
    bases = []
    for _ in range(2):
        for p in model.parameters():
            p.grad = g.clone()
        optimizer.step()
        bases += [state["basis"] for state in state_of(optimizer).values()]
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(bases, 2))

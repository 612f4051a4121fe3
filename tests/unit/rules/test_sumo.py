"""spectral_dist.SUMO in one process against specs/sumo.md, and what it obeys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_dist
from spectral_dist.polar import gram_root
from tests.reference import polar as formulas
from tests.reference.sumo import Sumo, number, polar, scale
from tests.support.weights import FACTORS, Weights, values
from tests.unit.rules.sumo_steps import LONG, follow, graded, refreshed, state_of, sumo, update

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
bases = st.sampled_from(["randomized", "svd"])
SHAPES = {"wide": (4, 9), "tall": (10, 3), "square": (6, 6), "big": (24, 17)}


def near(a, b, bound=2e-6):
    return bool((a - b).norm() <= bound * (1 + b.norm()))


# -- against the reference


def check(steps=7, dtype=torch.float32, bound=None, gradient=graded, shapes=SHAPES, **options):
    """Weights and states of both after each step; which steps refresh is read off the package's.

    Returns the reference's matrices.
    """
    bound = bound or (1e-6 if dtype == torch.float32 else 1e-8)
    model = Weights(dtype=dtype, **shapes)
    o = {"lr": 0.02, "weight_decay": 0.1, "basis": "svd", "period": 3, **options}
    optimizer = sumo(model, **o)
    wanted = {n: w.double() for n, w in values(model).items()}
    fresh: set[str] = set()
    theirs = {n: Sumo(o, lambda step, n=n: n in fresh) for n in wanted}
    states = state_of(optimizer)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = gradient(*p.shape, 50 * step + 2 * i).to(dtype)
        optimizer.step()
        before, states = states, state_of(optimizer)
        fresh.clear()
        fresh |= refreshed(before, states)
        for name, p in model.named_parameters():
            theirs[name].step(wanted[name], p.grad.double())
            torch.testing.assert_close(p.double(), wanted[name], rtol=0, atol=bound, msg=name)
            mine, its = states[name], theirs[name]
            q, m = mine["basis"].double(), mine["moment"].double()
            assert near(q @ q.mT, its.basis @ its.basis.mT), name
            assert near(q @ m, its.basis @ its.moment), name
            assert not its.o["limiter"] or mine["norm"].item() == pytest.approx(its.norm, rel=1e-5)
            assert mine["step"] == (step + 1 if step or gram_root.may_wait(p) else 0)
    return theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{"rank": 2}, {"rank": 1, "momentum": 0.0}, {"momentum": 0.0, "rank": 0.5}, {"rank": 0.5},
     {"perp_scale": 0.0}, {"perp_scale": 0.5, "limiter": 0}, {"rank": 2, "perp_scale": 0.0},
     {"rank": 2, "period": 1}, {"rank": 2, "period": LONG, "weight_decay": 0.0},
     {"rank": 0.5, "period": 2, "limiter": 1.001}, {"limiter": 0, "weight_decay": 0.3, "lr": 0.1}],
)  # fmt: skip
def test_follows_the_reference(options, dtype):
    check(dtype=dtype, **options)


@pytest.mark.parametrize("name", FACTORS)
def test_scales(name):
    """match_rms_adamw: 0.2 sqrt(m n / r), the others as Muon's; of the shape out x in."""
    check(rank=2, scale=name, perp_scale=0.5)


def test_bfloat16_weights_have_float32_states():
    """Computed as for float32 weights, and rounded once."""
    o = {"lr": 0.02, "weight_decay": 0.1, "rank": 2, "period": LONG, "basis": "svd"}
    g = [graded(9, 6, 10 * step).bfloat16() for step in range(4)]
    w, its = formulas.gaussian(9, 6).bfloat16(), Sumo(o, lambda step: False)
    for step, (found, state) in enumerate(follow(w, g, **o)):
        exact = w.double()
        its.step(exact, g[step].double())
        half_an_ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 8)
        assert ((found.double() - exact).abs() <= half_an_ulp + 1e-6).all()
        assert (found.dtype, state["basis"].dtype) == (torch.bfloat16, torch.float32)
        assert near(state["basis"].double() @ state["moment"].double(), its.basis @ its.moment)
        w = found


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_update_in_the_subspace_has_rms_a_fifth(r):
    """As AdamW's; by arithmetic of its own. Whichever r."""
    for shape in ((5, 9), (9, 5), (6, 6)):
        found, _ = update(graded(*shape, 1), rank=r, perp_scale=0.0, scale="match_rms_adamw")
        assert found.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-5)


def test_rank_of_a_fraction_rounds_and_is_at_least_one():
    for rank, wanted in ((0.25, 2), (0.1, 1), (0.01, 1), (0.4, 4), (0.9, 8), (1, 1), (7, 7)):
        assert number(rank, 9, 20) == wanted
        _, state = update(graded(9, 20, 1), rank=rank)
        assert state["basis"].shape == (20, wanted)
        assert state["moment"].shape == (wanted, 9)


def test_defaults():
    """A quarter of the short side, .95, everything outside the subspace, a randomized basis."""
    model = Weights(**SHAPES)
    optimizer = spectral_dist.SUMO(spectral_dist.param_groups(model))
    [group] = [g for g in optimizer.param_groups if g["kind"] == "matrix"]
    wanted = {"rank": 0.25, "period": 250, "refresh_below": 0.0, "momentum": 0.95, "limiter": 1.1,
              "perp_scale": 1.0, "scale": "match_rms_adamw", "basis": "randomized", "seed": 0,
              "weight_decay": 0.1, "lr": 1e-3}  # fmt: skip
    assert {name: group.get(name) for name in wanted} == wanted
    check()


def low_rank(m, n, seed):
    return graded(m, n, seed, rank=2)


@pytest.mark.parametrize("basis", ["svd", "randomized"])
@pytest.mark.parametrize("gradient", [low_rank, lambda *a: graded(*a, rank=1)])
def test_gradients_of_lower_rank_than_the_subspace(gradient, basis):
    """The subspaces of both are those of the gradient, with zero columns in the bases."""
    shapes = {"wide": (4, 9), "square": (6, 6), "big": (24, 17)}
    check(rank=3, gradient=gradient, shapes=shapes, basis=basis)


def growing(m, n, seed):
    return 4.0 ** (seed // 50) * graded(m, n, seed)


def shrinking(m, n, seed):
    return 0.25 ** (seed // 50) * graded(m, n, seed)


@pytest.mark.parametrize("limiter", [1.0, 1.1, 2.0])
def test_the_limiter_holds_back_the_whole_update(limiter):
    """Q O alone never grows: what does is the gradient beside it."""
    theirs = check(gradient=growing, rank=2, limiter=limiter, scale="none", bound=1e-5, steps=5)
    assert all(matrix.limited >= 3 for matrix in theirs.values())
    theirs = check(gradient=growing, rank=2, limiter=limiter, scale="none", perp_scale=0.0)
    assert limiter == 1.0 or not any(matrix.limited for matrix in theirs.values())
    theirs = check(gradient=shrinking, rank=2, limiter=limiter, scale="none")
    assert limiter == 1.0 or not any(matrix.limited for matrix in theirs.values())


def test_updates_grow_by_the_limiters_ratio_at_most():
    o = {"weight_decay": 0.0, "lr": 1.0, "rank": 2, "limiter": 1.1, "period": LONG}
    g = [growing(8, 5, 50 * step) for step in range(6)]
    w = [torch.zeros(8, 5).double(), *(w for w, _ in follow(torch.zeros(8, 5).double(), g, **o))]
    norms = [(a - b).norm().item() for a, b in itertools.pairwise(w)]
    for one, next_ in itertools.pairwise(norms[2:]):
        assert next_ == pytest.approx(1.1 * one, rel=1e-5)
    free = follow(torch.zeros(8, 5).double(), g, **{**o, "limiter": 0})
    assert (free[-1][0] - free[-2][0]).norm() > 100 * norms[-1]


# -- identities of the spec


@pytest.mark.parametrize("scaling", FACTORS)
@pytest.mark.parametrize("rank", [1.0, 99])
def test_of_full_rank_it_is_muon_with_an_exact_polar_factor(rank, scaling):
    """M has no factor 1 - mu, which its polar factor does not see."""
    runs = [Weights(**SHAPES, row=(1, 5), column=(7, 1)) for _ in range(2)]
    before = values(runs[0])
    o = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.2, "scale": scaling}

    def train(model, optimizer):
        for step in range(5):
            for i, p in enumerate(model.parameters()):
                p.grad = graded(*p.shape, 50 * step + 2 * i).float()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"6 of 6 matrices \(wide\.weight, tall"):
        train(runs[0], sumo(runs[0], rank=rank, period=2, perp_scale=0.7, **o))
    groups = spectral_dist.param_groups(runs[1])
    train(runs[1], spectral_dist.Muon(groups, polar="svd", nesterov=False, **o))
    for name, w in values(runs[0]).items():
        other = values(runs[1])[name]
        assert (w - other).norm() <= 2e-6 * (other - before[name]).norm(), name


def test_only_matrices_that_are_too_small_are_named():
    with pytest.warns(UserWarning, match=r"1 of 2 matrices \(small\.weight\)"):
        sumo(Weights(large=(9, 7), small=(3, 8)), rank=3)


@quick
@given(st.integers(3, 9), st.integers(3, 9), seeds, bases, st.sampled_from([0.0, 0.5, 1.0]))
def test_inside_an_orthogonal_factor_and_outside_the_gradient(m, n, seed, basis, perp):
    """Q^T D = s O with ||O||_F = sqrt(r), and (1 - Q Q^T) D = perp_scale (1 - Q Q^T) G."""
    g = graded(m, n, seed)
    d, state = update(g, rank=2, basis=basis, perp_scale=perp, scale="match_rms_adamw")
    q, g = state["basis"].double(), g if m >= n else g.mT
    s = scale({}, m, n, 2)
    torch.testing.assert_close(q.mT @ q, torch.eye(2).double(), rtol=0, atol=1e-5)
    ones = torch.full((2,), s, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(q.mT @ d)[:2], ones, rtol=1e-5, atol=0)
    outside = g - q @ (q.mT @ g)
    torch.testing.assert_close(d - q @ (q.mT @ d), perp * outside, rtol=0, atol=1e-5)
    assert (q.mT @ outside).norm() < 1e-5


@quick
@given(st.integers(5, 12), st.integers(5, 12), seeds, bases, st.integers(1, 4))
def test_null_directions_are_dropped(m, n, seed, basis, rank):
    """No noise fills them: ||O||_F = sqrt(rank), all of it where the gradient is."""
    g = graded(m, n, seed, rank=rank)
    d, state = update(g.float(), rank=4, basis=basis, perp_scale=0.0)
    d, g = d.double(), g if m >= n else g.mT
    wanted = torch.tensor([1.0] * rank + [0.0] * (min(m, n) - rank)).double()
    torch.testing.assert_close(torch.linalg.svdvals(d), wanted, rtol=0, atol=1e-5)
    assert d.norm().item() == pytest.approx(math.sqrt(rank), rel=1e-5)
    torch.testing.assert_close(d, polar(g), rtol=0, atol=1e-5)
    lengths = state["basis"].double().norm(dim=0)
    assert sorted(lengths.round(decimals=4).tolist()) == [0.0] * (4 - rank) + [1.0] * rank


@quick
@given(st.integers(5, 12), st.integers(5, 12), seeds, bases, st.integers(0, 3))
def test_null_directions_of_the_moment_are_dropped(m, n, seed, basis, rank):
    """In a subspace of four directions, of which the gradients that follow have fewer."""
    first = graded(m, n, seed)
    u, _, _ = torch.linalg.svd(first if m >= n else first.mT, full_matrices=False)
    x = u[:, :rank] @ formulas.gaussian(rank, min(m, n), seed=seed + 1)
    o = {"rank": 4, "basis": basis, "momentum": 0.0, "perp_scale": 0.0, "limiter": 0}
    o |= {"lr": 1.0, "weight_decay": 0.0, "scale": "none", "period": LONG}
    seen = follow(torch.zeros(m, n), [first, x if m >= n else x.mT.contiguous()], **o)
    d = (seen[0][0] - seen[1][0]).double()
    assert d.norm().item() == pytest.approx(math.sqrt(rank), rel=1e-4, abs=1e-6)
    assert (d - u[:, :rank] @ (u[:, :rank].mT @ d)).norm() < 1e-4


@pytest.mark.parametrize("basis", ["svd", "randomized"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_a_refresh_onto_the_same_subspace_changes_nothing(shape, basis):
    """All gradients have one column space (row space, if wide); only the bases differ."""
    long, short = max(shape), min(shape)
    shared = formulas.random_orthogonal(long, 1)[:, :3]
    g = [shared @ graded(3, short, 10 * step) for step in range(1, 6)]
    g = [x if shape[0] >= shape[1] else x.mT.contiguous() for x in g]
    runs = [
        follow(torch.zeros(shape), g, rank=3, basis=basis, period=period) for period in (1, LONG)
    ]
    bases = [state["basis"] for _, state in runs[0]]
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in itertools.pairwise(bases))
    for (w, state), (other, kept) in zip(*runs, strict=True):
        both = [s["basis"] @ s["moment"] for s in (state, kept)]
        torch.testing.assert_close(*both, rtol=0, atol=2e-6)
        torch.testing.assert_close(w, other, rtol=0, atol=2e-6)


@quick
@given(st.integers(4, 9), st.integers(4, 9), seeds, bases)
def test_the_moment_is_transported(m, n, seed, basis):
    """Q_new M_new = Q_new Q_new^T (mu Q_old M_old + G), of what the states say."""
    g = [graded(m, n, seed + k) for k in (1, 20, 40)]
    seen = follow(torch.zeros(m, n), g, rank=2, period=1, momentum=0.7, basis=basis)
    for step in (1, 2):
        x = g[step] if m >= n else g[step].mT
        old, new = ({k: v.double() for k, v in seen[i][1].items()} for i in (step - 1, step))
        onto = new["basis"] @ new["basis"].mT
        whole = 0.7 * old["basis"] @ old["moment"] + x
        torch.testing.assert_close(new["basis"] @ new["moment"], onto @ whole, rtol=0, atol=1e-5)
        assert (old["basis"] @ old["basis"].mT - onto).norm() > 1e-3

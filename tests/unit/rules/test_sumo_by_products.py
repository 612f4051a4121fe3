"""SUMO as accelerators step it, by products and without eigenvectors, on a CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from spectral_dist.polar import gram_root
from spectral_dist.rules import sumo_bases, sumo_starts
from tests.reference import polar as formulas
from tests.support.weights import Weights, give_gradients, same, values
from tests.unit.rules import test_sumo, test_sumo_basis, test_sumo_properties
from tests.unit.rules.sumo_steps import LONG, equal, follow, graded, state_of, sumo, update


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """Take the form that GPUs take."""
    monkeypatch.setattr(gram_root, "may_wait", lambda x: False)


# -- the reference, and tests of the other form


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{"rank": 2}, {"rank": 0.5, "period": 7}, {"perp_scale": 0.0},
     {"perp_scale": 0.5, "limiter": 0}, {"rank": 2, "period": 1, "momentum": 0.0}],
)  # fmt: skip
def test_sixty_steps_follow_the_reference(options, dtype):
    """With exact bases: those of both differ by rounding."""
    test_sumo.check(
        steps=60, dtype=dtype, bound=4e-6 if dtype == torch.float32 else 1e-7, **options
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_sixty_steps_of_low_rank_follow_the_reference_with_randomized_bases(rank):
    """Gradients have fewer directions than the subspace, so that they determine it."""
    shapes = {"wide": (4, 9), "square": (6, 6), "big": (24, 17)}

    def gradient(m, n, seed):
        return graded(m, n, seed, rank=rank)

    o = {"gradient": gradient, "shapes": shapes, "basis": "randomized", "rank": 3}
    test_sumo.check(steps=60, bound=1e-5, **o)


@pytest.mark.parametrize("limiter", [1.0, 1.1])
def test_the_limiter(limiter):
    test_sumo.test_the_limiter_holds_back_the_whole_update(limiter)


@pytest.mark.parametrize("name", ["match_rms_adamw", "none"])
def test_scales(name):
    test_sumo.test_scales(name)


def test_of_full_rank_it_is_muon_with_an_exact_polar_factor():
    test_sumo.test_of_full_rank_it_is_muon_with_an_exact_polar_factor(1.0, "none")


@pytest.mark.parametrize("basis", ["svd", "randomized"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_a_refresh_onto_the_same_subspace_changes_nothing(shape, basis):
    test_sumo.test_a_refresh_onto_the_same_subspace_changes_nothing(shape, basis)


def test_the_moment_is_transported():
    test_sumo.test_the_moment_is_transported()


@pytest.mark.parametrize("period", [1, LONG])
@pytest.mark.parametrize("perp_scale", [0.0, 1.0])
def test_a_zero_gradient_from_the_start_stops_nothing_later(perp_scale, period):
    both = test_sumo_properties
    both.test_a_zero_gradient_from_the_start_stops_nothing_later(perp_scale, 0.25, period)


@pytest.mark.parametrize("period", [1, LONG])
def test_basis_and_moment_outlive_a_zero_gradient(period):
    test_sumo_properties.test_basis_and_moment_outlive_a_zero_gradient(period, "randomized")


def test_zero_gives_zero():
    test_sumo_properties.test_zero_gives_zero()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e15, 1e25])
def test_gradients_of_extreme_size(size):
    test_sumo_properties.test_gradients_of_extreme_size(size, "randomized")


def test_a_parameter_without_gradient_keeps_weight_and_state():
    test_sumo_properties.test_a_parameter_without_gradient_keeps_weight_and_state()


def test_torchs_random_numbers_have_no_part_in_it():
    test_sumo_basis.test_torchs_random_numbers_have_no_part_in_it()


def test_each_matrix_and_each_step_has_its_own_sketch():
    test_sumo_basis.test_each_matrix_and_each_step_has_its_own_sketch()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [1, 2, 3, 4])
def test_small_singular_values_are_captured_as_well_as_large_ones(decades, dtype):
    both = test_sumo_basis
    both.test_small_singular_values_are_captured_as_well_as_large_ones(decades, "randomized", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gap_makes_both_bases_one(dtype):
    test_sumo_basis.test_a_gap_makes_both_bases_one((60, 40), dtype)


# -- bases without eigenvectors


@pytest.mark.parametrize("r", [1, 4, 16, 50])
@pytest.mark.parametrize("spectrum", ["random", "1/i", "1/sqrt(i)", "exponential"])
@pytest.mark.fast_cases("1/i-1", "exponential-1")
def test_as_much_of_the_gradient_is_inside(monkeypatch, spectrum, r):
    """Both bases capture as much: |Q^T G| differs by 1.5% at most, by .5% on average."""
    i = torch.arange(1, 101).double()
    s = {"1/i": 1 / i, "1/sqrt(i)": i**-0.5, "exponential": torch.logspace(0, -5, 100).double()}
    ratios = []
    for seed in range(4):
        g = formulas.gaussian(150, 100, seed=seed)
        if spectrum in s:
            g = formulas.with_singular_values(s[spectrum], 150, 100, seed=10 * seed)
        found = []
        for waits in (False, True):
            monkeypatch.setattr(gram_root, "may_wait", lambda x, waits=waits: waits)
            q = update(g, rank=r, seed=seed)[1]["basis"].double()
            torch.testing.assert_close(q.mT @ q, torch.eye(r).double(), rtol=0, atol=1e-6)
            found.append((q.mT @ g).norm().item())
        ratios.append(found[0] / found[1])
    assert min(ratios) > 0.985
    assert sum(ratios) / 4 > 0.995


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (200, 200)])
@pytest.mark.parametrize("rank", [1, 3, 10])
def test_null_directions_are_dropped(shape, rank):
    """The basis is a partial isometry of the gradient's rank; D has that many ones, and zeros."""
    d, state = update(graded(*shape, 7, rank=rank).float(), rank=10, perp_scale=0.0)
    wanted = torch.tensor([1.0] * rank + [0.0] * (10 - rank))
    for x in (state["basis"], d):
        torch.testing.assert_close(torch.linalg.svdvals(x)[:10], wanted, rtol=0, atol=1e-5)


def test_sketches_are_uniform_and_the_same_everywhere():
    """splitmix64, computed by numpy's unsigned integers."""
    seed = sumo_bases.hash_of("3 layer 7")
    with np.errstate(over="ignore"):
        x = np.arange(40 * 30, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    wanted = torch.from_numpy((x.view(np.int64) >> 40) / 2**23).view(40, 30)
    found = sumo_bases._uniform(40, 30, "3 layer 7", torch.device("cpu"))
    assert torch.equal(found.double(), wanted)
    large = sumo_bases._uniform(500, 400, "a", torch.device("cpu")).double()
    assert large.abs().max() <= 1
    assert abs(large.mean()) < 0.01
    assert large.square().mean() == pytest.approx(1 / 3, rel=0.01)
    neighbours = (large[:, :-1] * large[:, 1:]).mean(), (large[:-1] * large[1:]).mean()
    assert max(map(abs, neighbours)) < 0.005


# -- when a matrix begins


def steps_of(optimizer):
    return {name: int(state["step"]) for name, state in state_of(optimizer).items()}


def zeroed(model, step, unused):
    give_gradients(model, step)
    for name in unused:
        model.get_parameter(name).grad.zero_()


def test_first_steps_are_counted_one_step_later():
    model = Weights(a=(12, 5), b=(12, 5))
    optimizer = sumo(model, rank=2, period=LONG)
    bases = []
    for step, (a, b) in enumerate([(0, 0), (2, 0), (3, 0), (4, 0), (5, 2)]):
        zeroed(model, step, ["b.weight"] * (step < 3))
        optimizer.step()
        assert steps_of(optimizer) == {"a.weight": a, "b.weight": b}
        bases.append({name: state["basis"] for name, state in state_of(optimizer).items()})
    assert [bool(x["b.weight"].any()) for x in bases] == [False, False, False, True, True]
    assert torch.equal(bases[0]["a.weight"], bases[4]["a.weight"])
    assert torch.equal(bases[3]["b.weight"], bases[4]["b.weight"])


@pytest.mark.parametrize("saved", [1, 2, 3])
def test_a_run_goes_on_bitwise_from_any_step(saved):
    """A resumed run sees from the saved basis which matrices have begun, counted later or not."""
    one = Weights(a=(12, 5), b=(12, 5))
    optimizer = sumo(one, rank=2, period=3)

    def go(model, optimizer, steps):
        for step in steps:
            zeroed(model, step, ["b.weight"] * (step < 2))
            optimizer.step()

    go(one, optimizer, range(saved))
    state, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(one)
    loaded = sumo(other, rank=2, period=3)
    loaded.load_state_dict(state)
    for model, each in ((one, optimizer), (other, loaded)):
        go(model, each, range(saved, 7))
    assert same(values(one), values(other))
    assert equal(state_of(loaded), state_of(optimizer))


def test_a_checkpoint_of_no_steps_begins_anew():
    """Loaded where it has been known that the matrix has begun."""
    model = Weights(a=(12, 5))
    optimizer = sumo(model, rank=2, period=LONG)
    optimizer.initialize_state()
    fresh = copy.deepcopy(optimizer.state_dict())
    bases = []
    for _ in range(2):
        optimizer.load_state_dict(fresh)
        give_gradients(model, len(bases))
        optimizer.step()
        bases.append(state_of(optimizer)["a.weight"]["basis"])
    assert bases[1].any()
    assert not torch.equal(*bases)


def test_reads_of_the_device_end_with_the_first_steps(monkeypatch):
    """A matrix that never begins is asked for in each step, but of the step before.

    Each matrix is a batch of its own here; the first step asks at its beginning as well.
    """
    copies = []
    original = sumo_starts._copy
    monkeypatch.setattr(sumo_starts, "_copy", lambda ops: copies.append(1) or original(ops))
    for unused, wanted in (([], [4, 0, 0, 0]), (["b.weight"], [4, 1, 1, 1])):
        model = Weights(a=(12, 5), b=(12, 5))
        optimizer, counts = sumo(model, rank=2, period=LONG), []
        for step in range(4):
            copies.clear()
            zeroed(model, step, unused)
            optimizer.step()
            counts.append(len(copies))
        assert counts == wanted


def test_a_step_of_a_wide_matrix_is_that_of_its_transpose():
    g = [graded(9, 5, 10 * k) for k in range(3)]
    one = follow(torch.zeros(9, 5), g, rank=2, period=2)
    other = follow(torch.zeros(5, 9), [x.mT.contiguous() for x in g], rank=2, period=2)
    for (w, _), (v, _) in zip(one, other, strict=True):
        torch.testing.assert_close(w, v, rtol=0, atol=1e-6)

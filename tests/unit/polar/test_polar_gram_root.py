"""Inverse square roots of Gram matrices by products alone, against numpy's SVD and against eigh."""

from __future__ import annotations

import math

import pytest
import torch

from spectral_dist.polar import gram_root, null_cutoff, polar
from tests.reference import polar as reference

SHAPES = [(4, 9), (16, 60), (64, 256), (96, 1500)]


def by_products(x, cutoff=0.0):
    wide = x.double()
    return gram_root.inverse_root(wide @ wide.mT, cutoff, by_products=True) @ wide


def spectra(s, cutoff):
    """By name, singular values of s directions of which the last are 0 or above the cutoff."""
    zeros = torch.zeros(s // 2).double()
    graded = {f"1e{d}": torch.logspace(0, -d, s).double() for d in (0, 1, 2, 3)}
    graded["cutoff"] = torch.logspace(0, math.log10(1.02 * cutoff), s).double()
    half = {f"half {d}": torch.cat([torch.logspace(0, -d, s - s // 2), zeros]) for d in (0, 1, 3)}
    one = torch.zeros(s).double()
    one[0] = 1.0
    return {**graded, **{name: values.double() for name, values in half.items()}, "one": one}


@pytest.mark.parametrize(("s", "n"), SHAPES)
def test_float32_matrices_of_all_spectra(s, n):
    """Matrices are of full rank or not, and rounded to float32, which moves what is null."""
    cutoff = max(null_cutoff((s, n), torch.float32), gram_root.LEAST_CUTOFF)
    for name, values in spectra(s, cutoff).items():
        x = reference.with_singular_values(values, s, n, seed=3).float()
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        kept = int((values >= cutoff).sum())
        o = by_products(x[None], cutoff)[0]
        found = torch.linalg.svdvals(o)
        # the roundings of R, as eigh has them, too: some eps kappa^2
        bound = 1e-7 + 20 * 2**-52 * (values[:kept].min().item()) ** -2
        assert (found[:kept] - 1).abs().max() < bound, name
        assert kept == s or found[kept:].max() < 1e-5, name
        wanted = u[:, :kept] @ vh[:kept]
        assert torch.linalg.matrix_norm(o - wanted, 2) < bound + 1e-5 * (kept < s), name


@pytest.mark.parametrize(("s", "n"), SHAPES)
def test_it_is_what_eigh_gives(s, n):
    cutoff = null_cutoff((s, n), torch.float32)
    x = reference.gaussian(s, n, seed=1).float().double()[None]
    r = x @ x.mT
    eigh, mine = (gram_root.inverse_root(r, cutoff, by_products=b) for b in (False, True))
    torch.testing.assert_close(mine @ x, eigh @ x, rtol=0, atol=1e-8)
    right = gram_root.inverse_root(r, cutoff, by_products=True, right=True)
    torch.testing.assert_close(x.mT @ right, x.mT @ eigh, rtol=0, atol=1e-8)


@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_the_scale_is_no_matter_bitwise_by_powers_of_two(exponent):
    x = reference.gaussian(24, 90, seed=1).float()[None]
    assert torch.equal(by_products(2.0**exponent * x, 1e-5), by_products(x, 1e-5))


def test_zero_gives_zero_and_nan_gives_nan_to_itself_alone():
    x = reference.gaussian(12, 30, seed=1).expand(5, 12, 30).clone()
    x[1], x[2, 3, 4], x[4, 0, 0] = 0.0, math.nan, math.inf
    o = by_products(x, 1e-5)
    assert torch.equal(o[1], torch.zeros(12, 30).double())
    assert o[2].isnan().all()
    assert o[4].isnan().all()
    alone = by_products(x[:1], 1e-5)[0]
    for k in (0, 3):
        torch.testing.assert_close(o[k], alone, rtol=0, atol=1e-12)
    assert gram_root.inverse_root(x[:0] @ x[:0].mT, 1e-5, by_products=True).shape == (0, 12, 12)


@pytest.mark.parametrize("cutoff", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("s", [8, 64])
def test_what_is_between_noise_and_cutoff_stays_between_zero_and_one(s, cutoff):
    """It rises with the singular value, and no direction turns round."""
    small = torch.logspace(-7, math.log10(cutoff), s - 1).double()
    values = torch.cat([torch.ones(1).double(), small.flip(0)])
    u, v = reference.random_orthogonal(s, 1), reference.random_orthogonal(2 * s, 2)[:s]
    o = by_products((u * values @ v)[None], cutoff)[0]
    found = (u.mT @ o @ v.mT).diagonal()
    assert found[0] == pytest.approx(1, abs=1e-8)
    assert (found > -1e-9).all()
    rounding = 1e-8 + 20 * 2**-52 / cutoff**2
    assert (found < 1 + rounding).all()
    assert (found.diff() < rounding).all()


@pytest.mark.parametrize("s", [1, 8, 128])
def test_without_a_cutoff_nothing_is_dropped_above_the_least(s):
    values = torch.logspace(0, math.log10(1.02 * gram_root.LEAST_CUTOFF), s).double()
    x = reference.with_singular_values(values, s, 2 * s, seed=2)[None]
    found = torch.linalg.svdvals(by_products(x))[0]
    assert (found - 1).abs().max() < 1e-4  # 20 eps kappa^2 is 4e-5


def test_polishing_squares_the_error_and_keeps_zero():
    values = torch.tensor([1.001, 1.0, 0.999, 0.0]).double()
    x = reference.with_singular_values(values, 4, 9, seed=2)[None]
    found = torch.linalg.svdvals(gram_root.polish(x @ x.mT) @ x)[0]
    wanted = torch.tensor([1.0, 1.0, 1.0, 0.0]).double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1.6e-6)


@pytest.mark.parametrize("side", [1, 2, 64, 512, 1024, 8192])
@pytest.mark.parametrize("cutoff", [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.1, 1.0])
def test_the_schedule_converges_from_every_cutoff(cutoff, side):
    """Singular values on a grid all come out as 1, and noise as small as the module says."""
    rows = gram_root.rows_from(cutoff, side)
    lower = max(cutoff, gram_root.LEAST_CUTOFF) / side**0.125
    x = torch.logspace(math.log10(min(lower, 1.0)), 0, 20_001).double() / gram_root.SAFETY
    noise = torch.linspace(0, 2.0**-21, 1001).double()
    for a, b, c in rows:
        x, noise = (y * (a + y * y * (b + y * y * c)) for y in (x, noise))
    assert (x - 1).abs().max() < 1e-8
    assert not cutoff or noise.abs().max() < 1e-5


@pytest.mark.parametrize(("m", "n", "steps"), [(2048, 2048, 9), (5461, 2048, 9), (1024, 4096, 9)])
def test_how_many_steps_large_matrices_take(m, n, steps):
    """Each of four s^3 multiply-adds, at r = 1/4."""
    cutoff = null_cutoff((m, n), torch.float32)
    assert len(gram_root.rows_from(cutoff, min(m, n) // 4)) <= steps


def test_a_cpu_decomposes_and_nothing_else_does():
    assert gram_root.may_wait(torch.zeros(1))
    assert not gram_root.may_wait(torch.zeros(1, device="meta"))
    r = torch.eye(3).double()[None] * 4
    assert torch.equal(gram_root.inverse_root(r), gram_root.inverse_root(r, by_products=False))


@pytest.mark.parametrize(("m", "n"), [(24, 60), (60, 24), (32, 32)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polar_factors_by_products(m, n, scale, dtype):
    """What qdwh is on a GPU: against the SVD in float64, alone and beside NaN and zero."""
    s = min(m, n)
    for last in (0, 2):  # the smallest singular value is 10^-last of the largest
        if dtype == torch.bfloat16 and last:
            continue  # rounding to it is above its cutoff
        x = reference.with_singular_values(torch.logspace(0, -last, s).double(), m, n, seed=last)
        given = (x * scale).to(dtype)
        bad = given.clone()
        bad[0, 0] = math.nan
        found = gram_root.polar_by_products(torch.stack([given, bad, torch.zeros_like(given)]))
        assert found.dtype == torch.float32
        error = (found[0].double() - reference.exact(given.double())).abs().max()
        assert error < 2e-6 * 10**last
        assert found[1].isnan().all()
        assert not found[2].any()


@pytest.mark.parametrize(("m", "n"), [(24, 60), (60, 24), (32, 32)])
def test_null_directions_stay_null_by_products(m, n):
    s = min(m, n) // 2
    values = torch.cat([torch.logspace(0, -1, s), torch.zeros(s)]).double()
    x = reference.with_singular_values(values, m, n, seed=3).float()
    x[1] = 0.0
    found = gram_root.polar_by_products(x[None])[0].double()
    sigma = torch.linalg.svdvals(found)
    assert (sigma[:s] - 1).abs().max() < 1e-5
    assert sigma[s:].max() < 1e-4
    assert not found[1].any()


def test_qdwh_is_products_off_cpus(monkeypatch):
    x = reference.gaussian(3, 16, 40, seed=1).float()
    on_cpu = polar(x, method="qdwh")
    monkeypatch.setattr(gram_root, "may_wait", lambda x: False)
    by_products_alone = torch.stack([gram_root.polar_by_products(y[None])[0] for y in x])
    monkeypatch.setattr("spectral_dist.polar.api._rounds_alike", lambda *arguments: False)
    assert torch.equal(polar(x, method="qdwh"), by_products_alone)
    torch.testing.assert_close(by_products_alone, on_cpu, rtol=0, atol=1e-5)
    wide = x.double()
    assert torch.equal(polar(wide, method="qdwh"), polar(wide.clone(), method="qdwh"))
    assert polar(wide, method="qdwh").dtype == torch.float64

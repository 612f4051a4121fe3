"""QDWH: its weights, its scalar function, and what ZOLO-PD shares with it.

Accuracy and null directions of both are in test_polar_exact.py.
"""

import math
from functools import partial

import pytest
import torch

from spectral_dist.polar import polar
from spectral_dist.polar.qdwh import (
    QR_ABOVE,
    can_sharpen,
    on_short_side,
    polar_by_qdwh,
    qr_term,
    sharpen,
    solve,
    unit_spectral,
    weights,
)
from spectral_dist.polar.zolo import polar_by_zolo
from tests.reference import polar as reference
from tests.reference import qdwh

EPS32, EPS64 = 2.0**-23, 2.0**-52


def test_weights_of_the_specification():
    """For eps of float32 and for 1e-3; and which of them are QR steps."""
    wanted = [(1.04e5, 2.706e9, 2.706e9), (47.074, 530.70, 576.78), (4.18470, 2.53558, 5.72028)]
    rows = weights(EPS32, EPS32)
    for row, want in zip(rows, wanted, strict=True):
        assert row == pytest.approx(want, rel=1e-3 if want[0] > 1e5 else 2e-5)
    assert [c > QR_ABOVE for _, _, c in rows] == [True, True, False]
    wanted = [(251.99, 15749, 16000), (6.63684, 7.94348, 13.5803), (3.05752, 1.05834, 3.11586)]
    for row, want in zip(weights(1e-3, EPS32), wanted, strict=True):
        assert row == pytest.approx(want, rel=2e-5)


def test_weights_to_60_digits_and_as_many_as_needed():
    for lower, eps, steps in ((EPS32, EPS32, 3), (EPS64, EPS64, 4), (1e-3, EPS32, 3),
                              (1e-3, EPS64, 3), (0.99, EPS32, 0), (1.0, EPS64, 0)):  # fmt: skip
        rows = weights(lower, eps)
        assert len(rows) == steps
        for row, want in zip(rows, qdwh.halley_weights(lower, steps), strict=True):
            assert row == pytest.approx(want, rel=1e-9)
        grid = torch.logspace(math.log10(lower), 0, 20_001, dtype=torch.float64).clamp(lower, 1)
        assert (1 - qdwh.sharpen(qdwh.halley(grid, rows))).abs().max() <= max(eps, 4 * EPS64)
        if steps:
            assert (1 - qdwh.sharpen(qdwh.halley(grid, rows[:-1]))).abs().max() > 10 * eps


def test_sharpened():
    assert can_sharpen(1.0, EPS64)
    for eps in (EPS32, EPS64):
        # 7.5 (7.5 (7.5 e^2)^2)^2 = eps / 2
        edge = 1 - (0.5 * eps / 7.5**7) ** (1 / 8)
        assert can_sharpen(edge + 1e-9, eps)
        assert not can_sharpen(edge - 1e-9, eps)
        x = torch.tensor([edge, 1 + (1 - edge)], dtype=torch.float64)
        assert (1 - qdwh.sharpen(x)).abs().max() <= 0.8 * eps + 2 * EPS64
        assert (1 - qdwh.sharpen(x)).abs().max() >= 0.2 * eps


def test_sharpen_is_its_polynomial():
    s = torch.tensor([1.02, 1, 0.99, 0.9, 0.82, 0.8, 0.5, 0.1, 1e-3, 0], dtype=torch.float64)
    for shape in ((10, 10), (10, 14)):
        x = reference.with_singular_values(s, *shape)
        expected = reference.with_singular_values(qdwh.sharpen(s), *shape)
        torch.testing.assert_close(sharpen(x[None])[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("lower", [0.9, 0.3, 1e-2, 1e-5])
def test_singular_values_are_halleys_function_of_them(lower):
    """Below ``lower`` too, where it has not converged: what it is there tells the weights."""
    s = torch.cat(
        [torch.logspace(0, math.log10(lower), 6), lower / torch.arange(3, 21, 3)]
    ).double()
    rows = qdwh.halley_weights(lower, len(weights(lower, EPS64)))
    for shape in ((12, 17), (17, 12), (12, 40), (40, 12), (12, 12)):
        x = reference.with_singular_values(s, *shape)
        mapped = qdwh.sharpen(qdwh.halley(s / qdwh.norm_bound(x), rows))
        assert ((mapped > 0.01) & (mapped < 0.99)).any()
        u = polar_by_qdwh(x[None], torch.float64, lower)[0]
        expected = reference.with_singular_values(mapped, *shape)
        assert (u - expected).norm() <= 3e-14 / lower * expected.norm(), shape


def test_rows_that_are_qr_and_rows_that_are_cholesky_agree():
    w = unit_spectral(reference.gaussian(2, 20, 33))
    for c in (0.5, 9.0, 99.0):
        gram = c * w @ w.mT + torch.eye(20, dtype=torch.float64)
        direct = torch.linalg.inv(gram) @ w
        torch.testing.assert_close(
            qr_term(w, math.sqrt(c)) / math.sqrt(c), direct, rtol=0, atol=1e-13
        )
        torch.testing.assert_close(solve(gram, w), direct, rtol=0, atol=1e-13)


def test_unit_spectral_bounds_the_norm_from_above():
    for shape in ((12, 20), (12, 12), (5, 30), (1, 4), (64, 64)):
        for x in (reference.gaussian(*shape), torch.ones(*shape).double(),
                  torch.eye(*shape).double(), 1e3 * reference.gaussian(*shape)):  # fmt: skip
            for dtype, tight in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
                y = unit_spectral(x.to(dtype)[None].clone())
                assert y.dtype == dtype
                expected = x / qdwh.norm_bound(x)
                torch.testing.assert_close(y[0].double(), expected, rtol=0, atol=tight)
                largest = torch.linalg.matrix_norm(y.double(), 2).item()
                assert shape[0] ** (-1 / 16) - tight <= largest <= 1 + tight
    y = unit_spectral(torch.stack([torch.zeros(3, 4), torch.full((3, 4), math.nan)]))
    assert torch.equal(y[0], torch.zeros(3, 4))
    assert y[1].isnan().all()


@pytest.mark.parametrize("method", ["qdwh", "zolo"])
def test_transpose_and_rotation(method):
    for shape in ((24, 40), (40, 24), (24, 24), (10, 60), (60, 10)):
        x = reference.gaussian(*shape)
        u = polar(x, method=method)
        assert qdwh.direction_error(polar(x.mT, method=method), u.mT) <= 1e-13
        p, q = reference.random_orthogonal(shape[0], 5), reference.random_orthogonal(shape[1], 6)
        assert qdwh.direction_error(polar(p @ x @ q, method=method), p @ u @ q) <= 1e-13


@pytest.mark.parametrize("factor", [partial(polar_by_qdwh, dtype=torch.float64), polar_by_zolo])
def test_a_real_batch_as_devices_compute_it(factor):
    """polar() goes one by one on CPUs; on other devices the batch goes through as one."""
    for shape in ((4, 12, 17), (4, 17, 12), (4, 40, 12), (4, 12, 40)):
        x = reference.gaussian(*shape)
        x[1] = 0
        x[3, 0, 0] = math.nan
        u = factor(x)
        assert u.is_contiguous()
        assert torch.equal(u[1], torch.zeros(shape[1:]).double())
        assert u[3].isnan().all()
        for k in (0, 2):
            assert qdwh.direction_error(u[k], reference.exact(x[k])) <= 1e-14


def test_long_matrices_are_reduced_to_their_short_side():
    seen = []

    def factor(w):
        seen.append(tuple(w.shape))
        return w.clone()

    for shape, work in (((2, 9, 30), (2, 9, 9)), ((2, 30, 9), (2, 9, 9)),
                        ((2, 9, 10), (2, 9, 10)), ((2, 10, 9), (2, 9, 10))):  # fmt: skip
        x = reference.gaussian(*shape)
        u = on_short_side(x.clone(), factor)
        assert seen.pop() == work
        assert u.is_contiguous()
        torch.testing.assert_close(u, x, rtol=0, atol=1e-13)

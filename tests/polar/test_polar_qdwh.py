"""QDWH: its weights, its scalar function, its accuracy against the SVD, and its edges."""

import math

import pytest
import torch

from spectral_dist.polar import polar
from spectral_dist.polar.qdwh import (
    QR_ABOVE,
    by_qdwh,
    on_short_side,
    sharpened,
    qr_term,
    solve,
    unit_spectral,
    weights,
)
from tests.reference import polar as reference
from tests.reference import qdwh

EPS32, EPS64 = 2.0**-23, 2.0**-52
SHAPES = [(48, 80), (80, 48), (64, 64), (64, 256), (256, 64), (1, 7), (7, 1), (1, 1), (2, 3)]


def test_weights_of_the_specification():
    """For eps of float32 and for 1e-3; and which of them are QR steps."""
    wanted = [(1.04e5, 2.706e9, 2.706e9), (47.074, 530.70, 576.78), (4.18470, 2.53558, 5.72028),
              (3.00550, 1.00551, 3.01101)]  # fmt: skip
    rows = weights(EPS32, EPS32)
    assert len(rows) == 4
    for row, want in zip(rows, wanted, strict=True):
        assert row == pytest.approx(want, rel=1e-3 if want[0] > 1e5 else 2e-5)
    assert [c > QR_ABOVE for _, _, c in rows] == [True, True, False, False]
    wanted = [(251.99, 15749, 16000), (6.63684, 7.94348, 13.5803), (3.05752, 1.05834, 3.11586)]
    for row, want in zip(weights(1e-3, EPS32), wanted, strict=True):
        assert row == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize(
    ("lower", "eps", "steps"),
    [(EPS32, EPS32, 4), (EPS64, EPS64, 5), (1e-3, EPS32, 3), (1e-3, EPS64, 4), (1.0, EPS64, 0)],
)
def test_weights_to_60_digits_and_as_many_as_needed(lower, eps, steps):
    rows = weights(lower, eps)
    assert len(rows) == steps
    for row, want in zip(rows, qdwh.halley_weights(lower, steps), strict=True):
        assert row == pytest.approx(want, rel=1e-9)
    grid = torch.logspace(math.log10(lower), 0, 20_001, dtype=torch.float64).clamp(lower, 1)
    assert (1 - qdwh.halley(grid, list(rows))).abs().max() <= eps
    if steps:
        assert (1 - qdwh.halley(grid, list(rows[:-1]))).abs().max() > 10 * eps


def test_polished():
    assert sharpened(1.0, EPS64)
    for eps in (EPS32, EPS64):
        edge = 1 - math.sqrt(eps / 3)
        assert sharpened(edge + 1e-12, eps)
        assert not sharpened(edge - 1e-9, eps)


@pytest.mark.parametrize("lower", [0.9, 0.3, 1e-2, 1e-5])
@pytest.mark.parametrize("shape", [(12, 17), (17, 12), (12, 40), (40, 12), (12, 12)])
def test_singular_values_are_halleys_function_of_them(lower, shape):
    """Below ``lower`` too, where it has not converged: what it is there tells the weights."""
    s = torch.logspace(0, math.log10(lower) - 2, 12, dtype=torch.float64)
    x = reference.with_singular_values(s, *shape)
    inner = s / qdwh.norm_bound(x)
    rows = qdwh.halley_weights(lower, len(weights(lower, EPS64)))
    mapped = qdwh.halley(inner, rows)
    assert mapped.min() < 0.9
    u = by_qdwh(x[None], torch.float64, lower)[0]
    expected = reference.with_singular_values(mapped, *shape)
    assert (u - expected).norm() <= 1e-14 / lower * expected.norm()


def test_rows_that_are_qr_and_rows_that_are_cholesky_agree():
    w = unit_spectral(reference.gaussian(2, 20, 33), torch.float64)
    for c in (0.5, 9.0, 99.0):
        gram = c * w @ w.mT + torch.eye(20, dtype=torch.float64)
        direct = torch.linalg.inv(gram) @ w
        torch.testing.assert_close(
            qr_term(w, math.sqrt(c)) / math.sqrt(c), direct, rtol=0, atol=1e-13
        )
        torch.testing.assert_close(solve(gram, w), direct, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tight", "dual"), [
    (torch.float64, 1e-14, 1e-12), (torch.float32, 1e-6, 1e-6)])  # fmt: skip
def test_gaussian(shape, dtype, tight, dual):
    x = reference.gaussian(*shape).to(dtype)
    u = polar(x, method="qdwh")
    assert u.dtype == dtype
    assert qdwh.direction_error(u, reference.exact(x)) <= tight
    assert qdwh.orthogonality_error(u) <= tight
    assert abs((x.double() * u.double()).sum() / torch.linalg.svdvals(x.double()).sum() - 1) <= dual


@pytest.mark.parametrize(("kappa", "bound"), [(1e3, 1e-12), (1e6, 1e-10), (1e13, 1e-3)])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (48, 48), (48, 200), (200, 48)])
def test_ill_conditioned_in_float64(kappa, bound, shape):
    s = torch.logspace(0, -math.log10(kappa), 48, dtype=torch.float64)
    u = polar(reference.with_singular_values(s, *shape), method="qdwh")
    expected = reference.with_singular_values(torch.ones_like(s), *shape)
    assert qdwh.direction_error(u, expected) <= bound
    assert qdwh.orthogonality_error(u) <= 1e-14


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (48, 48)])
def test_ill_conditioned_in_float32_is_orthogonal_all_the_same(shape):
    """Two steps, a default seen elsewhere, leave singular values of .83."""
    s = torch.logspace(0, -6, 48, dtype=torch.float64)
    x = reference.with_singular_values(s, *shape).float()
    assert qdwh.orthogonality_error(polar(x, method="qdwh")) <= 1e-6


def test_compute_dtypes():
    x = reference.gaussian(24, 40)
    expected = reference.exact(x)
    narrow = polar(x, method="qdwh", compute_dtype="float32")
    assert narrow.dtype == torch.float64
    assert 1e-9 < qdwh.direction_error(narrow, expected) < 1e-6
    wide = polar(x.float(), method="qdwh", compute_dtype=torch.float64)
    assert torch.equal(wide, polar(x.float().double(), method="qdwh").float())
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        u = polar(half, method="qdwh")
        assert torch.equal(u, polar(half.float(), method="qdwh").to(dtype))
        assert qdwh.direction_error(u, reference.exact(half)) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12), (5, 30)])
def test_unit_spectral_bounds_the_norm_from_above_at_every_scale(dtype, shape):
    tiny = {torch.float32: 1e-36, torch.float64: 1e-300}[dtype]
    for x in (reference.gaussian(*shape), torch.ones(*shape).double(), torch.eye(*shape).double()):
        for scale in (tiny, 1e-8, 1.0, 1e8, 1 / tiny):
            y = unit_spectral((x * scale).to(dtype)[None], dtype)
            assert y.dtype == dtype
            torch.testing.assert_close(y[0].double(), x / qdwh.norm_bound(x), rtol=1e-5, atol=1e-7)
            largest = torch.linalg.matrix_norm(y.double(), 2).item()
            assert 1 / math.sqrt(min(shape)) - 1e-6 <= largest <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale(dtype):
    x = reference.gaussian(24, 40).to(dtype)
    u = polar(x, method="qdwh")
    bound = 40 * torch.finfo(dtype).eps
    for scale in (1e-30, 1e-8, 1e8, 1e30):
        torch.testing.assert_close(polar(x * scale, method="qdwh"), u, rtol=0, atol=bound)


@pytest.mark.parametrize("method", ["qdwh", "zolo"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24), (10, 60), (60, 10)])
def test_transpose_and_rotation(method, shape):
    x = reference.gaussian(*shape)
    u = polar(x, method=method)
    assert qdwh.direction_error(polar(x.mT, method=method), u.mT) <= 1e-13
    p, q = reference.random_orthogonal(shape[0], 5), reference.random_orthogonal(shape[1], 6)
    assert qdwh.direction_error(polar(p @ x @ q, method=method), p @ u @ q) <= 1e-13


@pytest.mark.parametrize("method", ["qdwh", "zolo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 12, 17), (2, 2, 40, 12), (4, 9, 9)])
def test_a_batch_is_bitwise_its_matrices(method, dtype, shape):
    x = reference.gaussian(*shape).to(dtype)
    u = polar(x, method=method).reshape(-1, *shape[-2:])
    for mine, matrix in zip(u, x.reshape(-1, *shape[-2:]), strict=True):
        assert torch.equal(mine, polar(matrix, method=method))


@pytest.mark.parametrize("shape", [(3, 12, 17), (3, 17, 12), (3, 40, 12), (3, 12, 40)])
def test_a_real_batch_as_devices_compute_it(shape):
    """polar() goes one by one on CPUs; on other devices the batch goes through as one."""
    x = reference.gaussian(*shape)
    x[1] = 0
    u = by_qdwh(x, torch.float64)
    assert u.is_contiguous()
    assert torch.equal(u[1], torch.zeros(shape[1:]).double())
    for k in (0, 2):
        assert qdwh.direction_error(u[k], reference.exact(x[k])) <= 1e-14


@pytest.mark.parametrize("method", ["qdwh", "zolo"])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16), (8, 40), (40, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_gives_zero_and_zero_rows_and_columns_stay(method, shape, dtype):
    assert not polar(torch.zeros(shape, dtype=dtype), method=method).any()
    x = reference.gaussian(*shape).to(dtype)
    x[-2:], x[:, -1:] = 0, 0
    u = polar(x, method=method)
    assert u[-2:].abs().max() <= torch.finfo(u.dtype).tiny
    assert u[:, -1:].abs().max() <= torch.finfo(u.dtype).tiny
    bound = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    assert qdwh.direction_error(u[:-2, :-1], reference.exact(x[:-2, :-1])) <= bound


@pytest.mark.parametrize("method", ["qdwh", "zolo"])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16), (8, 40), (40, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_missing_rank(method, shape, dtype, rank):
    """Exact on the range of x; anything up to norm 1 on what is left, and finite."""
    x = (reference.gaussian(shape[0], rank) @ reference.gaussian(rank, shape[1], seed=1)).to(dtype)
    u = polar(x, method=method).double()
    assert u.isfinite().all()
    assert torch.linalg.matrix_norm(u, 2) <= 1 + 1e-6
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    bound = 1e-4 if dtype == torch.float32 else 1e-12
    assert (left.T @ u @ right.T - torch.eye(rank).double()).norm() <= bound
    assert abs((x.double() * u).sum() / torch.linalg.svdvals(x.double()).sum() - 1) <= 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["qdwh", "zolo"])
@pytest.mark.parametrize("shape", [(8, 9), (30, 8)])
def test_not_finite_is_nan_everywhere(method, shape, bad):
    x = reference.gaussian(*shape)
    x[3, 2] = bad
    assert polar(x, method=method).isnan().all()


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

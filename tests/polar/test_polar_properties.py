"""What every polar factor obeys, on random matrices: scale, transpose, rotation, zero, batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.polar import METHODS, polar
from tests.reference import polar as reference

SCHEDULES = [m for m in METHODS if m not in ("svd", "eigh")]
quick = settings(max_examples=40, deadline=None, derandomize=True)

sides = st.integers(1, 14)
seeds = st.integers(0, 10_000)
methods = st.sampled_from(METHODS)


def conditioned(m, n, seed):
    """A random float64 matrix with singular values in [.1, 1]: even eigh is exact to 1e-13."""
    generator = torch.Generator().manual_seed(seed)
    s = 0.1 + 0.9 * torch.rand(min(m, n), dtype=torch.float64, generator=generator)
    return reference.with_singular_values(s, m, n, seed)


def near(a, b, bound=1e-11):
    return (a - b).norm() <= bound * (1 + b.norm())


@quick
@given(sides, sides, seeds, methods)
def test_transpose(m, n, seed, method):
    x = conditioned(m, n, seed)
    assert near(polar(x.mT, method=method), polar(x, method=method).mT)


@quick
@given(sides, sides, seeds, methods)
def test_orthogonal_equivariance(m, n, seed, method):
    x = conditioned(m, n, seed)
    p, q = reference.random_orthogonal(m, seed + 2), reference.random_orthogonal(n, seed + 3)
    assert near(polar(p @ x @ q, method=method), p @ polar(x, method=method) @ q)


@quick
@given(sides, sides, seeds, methods, st.floats(-8, 8), st.sampled_from([1.0, -1.0]))
def test_scale_and_sign(m, n, seed, method, exponent, sign):
    x = conditioned(m, n, seed)
    assert near(polar(sign * 10**exponent * x, method=method), sign * polar(x, method=method))


@quick
@given(sides, sides, seeds, methods, st.integers(-100, 100), st.sampled_from(["32", "64"]))
def test_scale_by_a_power_of_two_changes_no_bit(m, n, seed, method, exponent, bits):
    x = conditioned(m, n, seed).to(getattr(torch, "float" + bits))
    assert torch.equal(polar(x * 2.0**exponent, method=method), polar(x, method=method))


@quick
@given(st.lists(st.integers(1, 3), max_size=3), sides, sides, seeds, methods)
def test_leading_dimensions_are_a_batch(lead, m, n, seed, method):
    x = reference.gaussian(*lead, m, n, seed=seed)
    u = polar(x, method=method)
    assert u.shape == x.shape
    for mine, matrix in zip(u.reshape(-1, m, n), x.reshape(-1, m, n), strict=True):
        assert torch.equal(mine, polar(matrix, method=method))


@quick
@given(sides, sides, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_zero_gives_zero(m, n, dtype):
    for method in METHODS:
        assert torch.equal(polar(torch.zeros(m, n, dtype=dtype), method=method),
                           torch.zeros(m, n, dtype=dtype))  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30, 1e37])
def test_scale_in_float32(method, scale):
    """Squares of 1e-30 and 1e30 leave float32, and an absolute eps would win over 1e-8."""
    x = conditioned(12, 20, 5).float()
    u = polar(x, method=method)
    torch.testing.assert_close(polar(x * scale, method=method), u, rtol=0, atol=2e-4)
    assert u.norm() > 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_half_precision_is_entered_after_normalising(dtype, exponent):
    x = conditioned(12, 20, 5).float()
    assert torch.equal(polar(x * 2.0**exponent, compute_dtype=dtype), polar(x, compute_dtype=dtype))


@pytest.mark.parametrize("method", SCHEDULES)
@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e-40), ("float64", 1e-300)])
def test_scale_where_numbers_are_subnormal_or_squares_vanish(method, dtype, scale):
    x = (conditioned(12, 20, 5) * scale).to(getattr(torch, dtype))
    expected = polar(x.double() / scale, method=method)
    torch.testing.assert_close(polar(x, method=method).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "method", [m for m in SCHEDULES if m[:4] not in ("cans", "gram", "qdwh", "zolo")]
)
def test_half_precision_inputs_keep_their_scale(method, dtype):
    """Normalised in float32: in float16 the squares of these overflow, or vanish."""
    x = conditioned(12, 20, 5)
    expected = polar(x, method=method)
    for scale in (1e4, 1e-3):
        u = polar((x * scale).to(dtype), method=method, compute_dtype=dtype)
        assert (u.double() - expected).norm() < 0.1 * expected.norm()


def test_a_zero_matrix_leaves_its_neighbours_alone():
    x = reference.gaussian(3, 5, 8).float()
    x[1] = 0
    for method in METHODS:
        u = polar(x, method=method)
        assert torch.equal(u[1], torch.zeros(5, 8))
        assert torch.equal(u[::2], polar(x[::2], method=method))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_stays_visible_and_stays_inside_its_matrix(bad):
    x = reference.gaussian(3, 5, 8).float()
    x[1, 2, 3] = bad
    for method in SCHEDULES:
        u = polar(x, method=method)
        assert u[1].isnan().all()
        assert u[::2].isfinite().all()


def test_long_sums_do_not_lose_the_norm():
    """torch's float32 norm of 2^25 equal numbers is 1% off; Polar Express survives just 1%."""
    x = torch.full((1 << 10, 1 << 13), 0.1)
    u = polar(x, method="polar_express", steps=1)
    a, b, c = reference.coefficients("polar_express", 0)
    start = 1 / 1.01
    expected = (a * start + b * start**3 + c * start**5) / (x.numel() ** 0.5)
    torch.testing.assert_close(u.mean().item(), expected, rtol=2e-4, atol=0)

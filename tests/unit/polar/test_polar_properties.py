"""What every polar factor obeys: scale, transpose, rotation, zero, batches, what is not finite."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.polar import METHODS, polar
from tests.reference import polar as reference

OWN = [[3.4445, -4.7750, 2.0315], [2, -1.5, 0.5]]
EVERY = [*METHODS, OWN]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
quick = settings(max_examples=40, deadline=None, derandomize=True)
every_method = pytest.mark.parametrize("method", EVERY, ids=lambda m: m if m != OWN else "own")

sides = st.integers(1, 14)
seeds = st.integers(0, 10_000)
methods = st.sampled_from(EVERY)


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
@given(sides, sides, seeds, methods, st.integers(-100, 100), st.sampled_from(DTYPES[2:]))
def test_scale_by_a_power_of_two_changes_no_bit(m, n, seed, method, exponent, dtype):
    x = conditioned(m, n, seed).to(dtype)
    assert torch.equal(polar(x * 2.0**exponent, method=method), polar(x, method=method))


@quick
@given(st.lists(st.integers(1, 3), max_size=3), sides, sides, seeds, methods,
       st.sampled_from(DTYPES))  # fmt: skip
def test_leading_dimensions_are_a_batch(lead, m, n, seed, method, dtype):
    x = reference.gaussian(*lead, m, n, seed=seed).to(dtype)
    u = polar(x, method=method)
    assert u.shape == x.shape
    assert u.dtype == dtype
    for factor, matrix in zip(u.reshape(-1, m, n), x.reshape(-1, m, n), strict=True):
        assert torch.equal(factor, polar(matrix.clone(), method=method))


@every_method
def test_batch_is_bitwise_each_matrix_alone(method):
    """Sizes at which a CPU's GEMM rounds by how a matrix is aligned and how many there are."""
    for shape in ((3, 64, 128), (2, 128, 64), (7, 5, 32), (6, 6, 55), (5, 33, 65), (2, 127, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            x = reference.gaussian(*shape).to(dtype)
            half = method in ("jordan", "polar_express", "cubic5")
            options = {"method": method, "compute_dtype": dtype if half else None}
            alone = [polar(matrix.clone(), **options) for matrix in x]
            together = polar(x, **options)
            assert together.dtype == dtype
            assert torch.equal(together, torch.stack(alone)), (shape, dtype)


def test_batch_is_bitwise_each_matrix_alone_with_threads_too():
    torch.set_num_threads(2)
    x = reference.gaussian(7, 6, 48).float()
    assert torch.equal(polar(x), torch.stack([polar(matrix.clone()) for matrix in x]))


@every_method
def test_result_is_new_and_contiguous_with_shape_and_dtype_of_x(method):
    for dtype in DTYPES:
        wide = torch.arange(60, dtype=torch.float64).cos().to(dtype)
        for x in (wide.view(6, 10), wide.view(6, 10).mT, wide.view(2, 5, 6)[:, ::2],
                  wide.view(1, 60), wide.view(3, 4, 5)[:0], wide.view(6, 10)[:, :0],
                  wide.view(6, 10)[:0], wide.view(2, 3, 10)[..., :0]):  # fmt: skip
            before = x.clone()
            u = polar(x, method=method)
            assert (u.shape, u.dtype) == (x.shape, dtype)
            assert u.is_contiguous()
            assert torch.equal(x, before)
            assert not x.numel() or u.data_ptr() != x.data_ptr()
            assert torch.equal(u, polar(x.contiguous(), method=method))
    assert not polar(torch.nn.Parameter(wide.view(6, 10)), method=method).requires_grad


@every_method
def test_autocast_changes_nothing(method):
    x = reference.gaussian(4, 6).float()
    compute_dtype = "float32" if method == "svd" else None
    expected = polar(x, method=method, compute_dtype=compute_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(polar(x, method=method, compute_dtype=compute_dtype), expected)


@every_method
def test_zero_gives_zero_and_leaves_its_neighbours_alone(method):
    for dtype in DTYPES:
        for shape in ((5, 8), (8, 5), (1, 1), (1, 12), (4, 40), (40, 4), (6, 6)):
            x = reference.gaussian(3, *shape).to(dtype)
            x[1] = 0
            u = polar(x, method=method)
            assert torch.equal(u[1], torch.zeros_like(x[1]))
            assert torch.equal(u[::2], polar(x[::2], method=method))


@every_method
def test_what_is_not_finite_is_nan_everywhere_and_stays_inside_its_matrix(method):
    """Never an error: in a collective one rank would raise alone, and the others would wait."""
    for dtype in DTYPES:
        for shape in ((5, 8), (8, 5), (30, 8), (8, 30), (1, 6), (6, 6)):
            x = reference.gaussian(3, *shape).to(dtype)
            expected = polar(x[::2], method=method)
            for bad in (math.nan, math.inf, -math.inf):
                x[1] = reference.gaussian(*shape)
                x[1, 0, 4 % shape[1]] = bad
                u = polar(x, method=method)
                assert u[1].isnan().all(), (dtype, shape, bad)
                assert torch.equal(u[::2], expected)
    x[1] = math.inf
    assert polar(x, method=method)[1].isnan().all()


@every_method
def test_scale_in_float32(method):
    """Squares of 1e-30 and 1e30 leave float32, and an absolute eps would win over 1e-8."""
    x = conditioned(12, 20, 5).float()
    u = polar(x, method=method)
    assert u.norm() > 2
    for scale in (1e-30, 1e-8, 1e8, 1e30, 1e37):
        torch.testing.assert_close(polar(x * scale, method=method), u, rtol=0, atol=2e-4)


@every_method
def test_scale_where_numbers_are_subnormal_or_squares_vanish(method):
    x = conditioned(12, 20, 5)
    for dtype, scale in ((torch.float32, 1e-40), (torch.float64, 1e-300), (torch.float64, 1e300)):
        scaled = (x * scale).to(dtype)
        expected = polar(scaled.double() / scale, method=method)
        u = polar(scaled, method=method).double()
        torch.testing.assert_close(u, expected, rtol=0, atol=2e-4 if scale == 1e-40 else 1e-11)


@pytest.mark.parametrize("method", [m for m in METHODS if m in reference.NAMES and m != "cans"])
def test_half_precision_keeps_its_scale(method):
    """Normalised in float32: in float16 the squares of these overflow, or vanish."""
    x = conditioned(12, 20, 5)
    expected = polar(x, method=method)
    for dtype in DTYPES[:2]:
        for scale in (1e4, 1e-3):
            u = polar((x * scale).to(dtype), method=method, compute_dtype=dtype)
            assert (u.double() - expected).norm() < 0.1 * expected.norm()
        for exponent in (-60, -20, 20, 60):
            scaled = polar(x.float() * 2.0**exponent, method=method, compute_dtype=dtype)
            assert torch.equal(scaled, polar(x.float(), method=method, compute_dtype=dtype))


def test_long_sums_do_not_lose_the_norm():
    """torch's float32 norm of 2^25 equal numbers is 1% off; Polar Express survives just 1%."""
    x = torch.full((1 << 10, 1 << 13), 0.1)
    u = polar(x, method="polar_express", steps=1)
    a, b, c = reference.coefficients("polar_express", 0)
    start = 1 / 1.01
    expected = (a * start + b * start**3 + c * start**5) / (x.numel() ** 0.5)
    torch.testing.assert_close(u.mean().item(), expected, rtol=2e-4, atol=0)

"""The methods that end at the polar factor itself, against numpy's SVD: accuracy, null directions.

How qdwh and zolo get there is in test_polar_qdwh.py and test_polar_zolo.py.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.polar import exact, null_cutoff, of_gram, polar
from tests.reference import polar as reference
from tests.reference.qdwh import direction_error, orthogonality_error

METHODS = ["svd", "eigh", "qdwh", "zolo"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(48, 80), (80, 48), (64, 256), (256, 64), (1, 7), (7, 1), (1, 1), (2, 3)]


def by_numpy(x):
    u, s, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    return torch.from_numpy(u @ vh), torch.from_numpy(s)


@pytest.mark.parametrize("method", METHODS)
def test_gaussian(method):
    for shape in SHAPES + [(64, 64)] * (method != "eigh"):
        for dtype, tight, dual in ((torch.float64, 1e-14, 1e-12), (torch.float32, 1e-6, 1e-6)):
            x = reference.gaussian(*shape).to(dtype)
            expected, s = by_numpy(x)
            u = polar(x, method=method)
            assert u.dtype == dtype
            assert direction_error(u, expected) <= tight, (shape, dtype)
            assert orthogonality_error(u) <= tight, (shape, dtype)
            assert abs((x.double() * u.double()).sum() / s.sum() - 1) <= dual, (shape, dtype)


@pytest.mark.parametrize(
    ("method", "bounds"),
    [
        ("svd", {1e3: 1e-12, 1e6: 1e-10, 1e13: 1e-3}),
        ("eigh", {1e3: 1e-10, 1e5: 1e-6}),  # it squares the condition number
        ("qdwh", {1e3: 1e-12, 1e6: 1e-10, 1e13: 1e-3}),
        ("zolo", {1e3: 1e-12, 1e6: 1e-10, 1e13: 1e-3}),
    ],
)
def test_ill_conditioned_in_float64(method, bounds):
    for kappa, bound in bounds.items():
        s = torch.logspace(0, -math.log10(kappa), 48, dtype=torch.float64)
        for shape in ((48, 80), (80, 48), (48, 48), (48, 200), (200, 48)):
            u = polar(reference.with_singular_values(s, *shape), method=method)
            expected = reference.with_singular_values(torch.ones_like(s), *shape)
            assert direction_error(u, expected) <= bound, (kappa, shape)
            if method != "eigh":
                assert orthogonality_error(u) <= 1e-13, (kappa, shape)


@pytest.mark.parametrize("method", METHODS)
def test_ill_conditioned_in_float32_is_orthogonal_all_the_same(method):
    """Down to the cutoff, here 9.5e-6 of the largest."""
    for shape in ((48, 80), (80, 48), (48, 48)):
        s = torch.logspace(0, math.log10(2.4 * null_cutoff(shape, torch.float32)), 48)
        x = reference.with_singular_values(s, *shape).float()
        assert orthogonality_error(polar(x, method=method)) <= 1e-6


@pytest.mark.parametrize("method", ["svd", "qdwh"])
def test_float32_is_computed_on_request(method):
    x = reference.gaussian(48, 80)
    u = polar(x, method=method, compute_dtype="float32")
    assert u.dtype == torch.float64
    assert 1e-9 < direction_error(u, by_numpy(x)[0]) < 1e-6
    wide = polar(x.float(), method=method, compute_dtype=torch.float64)
    assert torch.equal(wide, polar(x.float().double(), method=method).float())


@pytest.mark.parametrize("method", METHODS)
def test_narrower_inputs_are_computed_wide(method):
    wide = torch.float32 if method == "qdwh" else torch.float64
    for dtype in DTYPES[1:]:
        x = reference.gaussian(12, 20).to(dtype)
        u = polar(x, method=method)
        assert direction_error(u, by_numpy(x)[0]) < torch.finfo(dtype).eps * (
            1 + 3 * (dtype == wide)
        )
        if dtype != wide:
            # of full rank, so that the cutoff of the wider dtype says the same
            near = (u.double() - polar(x.to(wide), method=method).double()).abs().max()
            assert near <= torch.finfo(dtype).eps / 4


# Null directions


def ranks(u, one=1e-5, zero=1e-6):
    """(count of singular values at 1, count at 0) within these."""
    s = torch.linalg.svdvals(u.double())
    return int(((s - 1).abs() <= one).sum()), int((s <= zero).sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_gradient_behind_a_layer_norm_has_null_directions(method, seed):
    torch.manual_seed(seed)
    x = torch.randn(18, 40)
    x = x - x.mean(1, keepdim=True)
    g = torch.randn(57, 18) @ x
    assert 0 < torch.linalg.svdvals(g.double())[18] < 1e-4  # rounding, and nothing else
    for gradient in (g, g.T, 1e-9 * g):
        assert ranks(polar(gradient, method=method)) == (18, 22)
    # taken for float64 the same numbers mean what they say
    assert ranks(polar(g.double(), method="svd")) == (40, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cutoff_is_that_of_the_dtype_of_the_input(method, dtype):
    """Singular values about the cutoff: svd and eigh know which side, the others a band."""
    for shape in ((64, 16), (16, 64), (40, 40)):
        cutoff = null_cutoff(shape, dtype)
        low, high = (0.5, 1.6) if method in ("svd", "eigh") else (0.1, 2.4)
        s = torch.ones(min(shape), dtype=torch.float64)
        s[-2:] = cutoff * high
        near = reference.with_singular_values(s, *shape, seed=3).to(dtype)
        s[-2:] = cutoff * low
        below = reference.with_singular_values(s, *shape, seed=3).to(dtype)
        if method == "eigh" and dtype == torch.float64:
            # the Gram matrix knows singular values to about the root of eps
            assert ranks(polar(below, method=method)) == (min(shape) - 2, 2)
            continue
        rounding = 8 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
        assert ranks(polar(near, method=method), one=rounding)[0] == min(shape), shape
        expected = (min(shape) - 2, 2)
        # half precision rounds by a part of its cutoff, and rounds what comes out
        if dtype.itemsize > 2 or method in ("svd", "eigh"):
            assert ranks(polar(below, method=method), rounding, rounding) == expected, shape


def test_the_cutoff_is_also_that_of_the_dtype_computed_in():
    s = torch.logspace(0, -6, 48, dtype=torch.float64)
    x = reference.with_singular_values(s, 48, 80)
    kept = int((s > 80 * 2.0**-23).sum())
    assert ranks(polar(x, method="svd", compute_dtype="float32"), zero=1e-5) == (kept, 48 - kept)
    assert ranks(polar(x, method="svd")) == (48, 0)


def test_cutoffs():
    assert null_cutoff((57, 40), torch.float32) == 57 * 2.0**-23
    assert null_cutoff((3, 40, 57), torch.float64) == 57 * 2.0**-52
    assert null_cutoff((40, 57), torch.float64, torch.float32) == 57 * 2.0**-23
    assert null_cutoff((1 << 12, 9), torch.bfloat16) == 2.0**-7
    assert null_cutoff((64, 64), torch.float16) == 2.0**-10
    assert null_cutoff((1 << 14, 9), torch.float16) == 2.0**-9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(1, 39),
    st.integers(0, 999),
    st.sampled_from(DTYPES[1:]),
    st.sampled_from(["plain", "decaying", "one large row"]),
)
def test_what_rounding_leaves_of_a_missing_rank_is_below_the_cutoff(m, n, rank, seed, dtype, kind):
    rank = min(rank, m - 1, n - 1)
    left, right = reference.gaussian(m, rank, seed=seed), reference.gaussian(rank, n, seed=seed + 1)
    if kind == "decaying":
        left *= torch.logspace(0, -2, rank)
    if kind == "one large row":
        left[0] *= 30
    x = (left.float() @ right.float()).to(dtype)
    s = torch.linalg.svdvals(x.double())
    assert s[rank] <= 0.5 * null_cutoff((m, n), dtype) * s[0]
    u = polar(x, method="svd")
    assert ranks(u, 1.0, 8 * torch.finfo(dtype).eps)[1] >= min(m, n) - rank


@pytest.mark.parametrize("method", METHODS)
def test_missing_rank_gives_a_partial_isometry(method):
    """Small integers, so that the rank is exact in every dtype, and what comes out, too."""
    wide = {"svd": 1e-12, "eigh": 1e-7, "qdwh": 1e-12, "zolo": 1e-7}[method]
    for dtype, bound in ((torch.float64, wide), (torch.float32, 1e-4)):
        for shape in ((5, 7), (7, 5), (2, 200), (200, 2), (32, 100), (64, 64)):
            for rank in (0, 1, 2):
                left = reference.gaussian(shape[0], rank).mul(3).round()
                x = left @ reference.gaussian(rank, shape[1], seed=1).mul(3).round()
                left, s, right = torch.linalg.svd(x, full_matrices=False)
                count = int((s > 1e-9 * s[0]).sum())
                expected = left[:, :count] @ right[:count]  # over the kept directions only
                u = polar(x.to(dtype), method=method).double()
                assert (u - expected).norm() <= bound * (1 + expected.norm()), (shape, rank)


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows_and_columns_stay(method):
    for shape in ((16, 24), (24, 16), (16, 16), (8, 40), (40, 8)):
        for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)):
            x = reference.gaussian(*shape).to(dtype)
            x[-2:], x[:, -1:] = 0, 0
            u = polar(x, method=method)
            tiny = torch.finfo(dtype).tiny if method in ("qdwh", "zolo") else bound / 1e4
            assert max(u[-2:].abs().max(), u[:, -1:].abs().max()) <= tiny
            assert direction_error(u[:-2, :-1], by_numpy(x[:-2, :-1])[0]) <= bound


# What a decomposition cannot do


@pytest.mark.parametrize("function", ["svd", "eigh"])
def test_a_decomposition_that_does_not_converge_gives_nan_and_leaves_the_others(
    monkeypatch, function
):
    decompose = getattr(torch.linalg, function)

    def fail(x, **options):
        if (x == torch.eye(6)).all(-1).all(-1).any():
            raise torch.linalg.LinAlgError("did not converge")
        return decompose(x, **options)

    x = reference.gaussian(3, 6, 6)
    x[1] = torch.eye(6)
    expected = polar(x, method=function)
    by = (
        exact.polar_by_eigh
        if function == "eigh"
        else lambda x: exact.polar_by_svd(x, torch.float64)
    )
    assert torch.equal(by(x)[1], torch.eye(6).double())
    monkeypatch.setattr(torch.linalg, function, fail)
    # one by one, as on CPUs, and the batch at once, as on other devices
    for u in (polar(x, method=function), by(x)):
        assert u[1].isnan().all()
        for k in (0, 2):
            torch.testing.assert_close(u[k], expected[k], rtol=0, atol=1e-12)


def test_an_inverse_root_drops_null_directions_where_asked():
    """What strategy gram passes on: the Gram matrix alone does not know the dtype of its slabs."""
    cutoff = null_cutoff((57, 40), torch.float32)
    s = torch.ones(40, dtype=torch.float64)
    for size, kept in ((0.5, 38), (1.6, 40)):
        s[-2:] = size * cutoff
        x = reference.with_singular_values(s, 57, 40)
        for method in ("eigh", "qdwh"):
            q = of_gram.multiplier(x.T[None] @ x[None], method, None, cutoff)[0]
            assert ranks(x @ q) == (kept, 40 - kept)
            assert direction_error(x @ q, polar(x.float(), method="svd").double()) < 2e-2
            q = of_gram.multiplier(x.T[None] @ x[None], method, None)[0]
            assert ranks(x @ q, one=1e-2) == (40, 0)
    assert torch.equal(of_gram.inverse_root(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))
    for bad in (math.nan, math.inf):
        r = torch.stack([torch.eye(3), torch.full((3, 3), bad)])
        root = of_gram.inverse_root(r)
        assert torch.equal(root[0], torch.eye(3))
        assert root[1].isnan().all()

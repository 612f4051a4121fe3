"""The exact methods against numpy's SVD, at the tolerances that float64 and float32 allow."""

import numpy as np
import pytest
import torch

from spectral_dist.polar import polar
from tests.reference import polar as reference

EXACT = ["svd", "eigh"]
SHAPES = [(48, 80), (80, 48), (64, 256), (1, 7), (7, 1), (1, 1)]


def by_numpy(x):
    u, s, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    return torch.from_numpy(u @ vh), torch.from_numpy(s)


def direction_error(u, expected):
    return ((u.double() - expected).norm() / expected.norm()).item()


def orthogonality_error(u):
    u = u.double()
    gram = u @ u.T if u.shape[0] <= u.shape[1] else u.T @ u
    return ((gram - torch.eye(len(gram), dtype=torch.float64)).norm() / len(gram) ** 0.5).item()


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tight", "dual"), [
    (torch.float64, 1e-14, 1e-12), (torch.float32, 1e-6, 1e-6)])  # fmt: skip
def test_gaussian(method, shape, dtype, tight, dual):
    x = reference.gaussian(*shape).to(dtype)
    expected, s = by_numpy(x)
    u = polar(x, method=method)
    assert u.dtype == dtype
    assert direction_error(u, expected) <= tight
    assert orthogonality_error(u) <= tight
    assert abs((x.double() * u.double()).sum() / s.sum() - 1) <= dual


def test_square_gaussian_by_svd():
    x = reference.gaussian(64, 64)
    u = polar(x, method="svd")
    assert direction_error(u, by_numpy(x)[0]) <= 1e-14
    assert orthogonality_error(u) <= 1e-14


@pytest.mark.parametrize(
    ("method", "kappa", "bound"),
    [("svd", 1e6, 1e-10), ("svd", 1e3, 1e-12), ("eigh", 1e3, 1e-10), ("eigh", 1e5, 1e-6)],
)
def test_ill_conditioned_in_float64(method, kappa, bound):
    """eigh squares the condition number: eps kappa^2, where the SVD has eps kappa."""
    s = torch.logspace(0, -np.log10(kappa), 48, dtype=torch.float64)
    for shape in ((48, 80), (80, 48)):
        x = reference.with_singular_values(s, *shape)
        expected = reference.with_singular_values(torch.ones_like(s), *shape)
        assert direction_error(polar(x, method=method), expected) <= bound


def test_svd_in_float32_is_float32():
    x = reference.gaussian(48, 80)
    u = polar(x, method="svd", compute_dtype="float32")
    assert u.dtype == torch.float64
    assert 1e-9 < direction_error(u, by_numpy(x)[0]) < 1e-6


@pytest.mark.parametrize(("method", "compute_dtype", "bound"), [
    ("svd", "float64", 1e-12), ("eigh", "float64", 1e-7), ("svd", "float32", 1e-4)])  # fmt: skip
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (2, 1000), (1000, 2), (32, 1000), (64, 64)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_missing_rank_gives_a_partial_isometry(method, compute_dtype, bound, shape, rank):
    # small integers: the rank is exact in every dtype
    left = reference.gaussian(shape[0], rank).mul(3).round()
    right = reference.gaussian(rank, shape[1], seed=1).mul(3).round()
    x = left @ right
    u = polar(x, method=method, compute_dtype=compute_dtype)
    rank = torch.linalg.matrix_rank(x) if rank else 0
    # X = U S V^T over the kept directions only
    left, s, right = torch.linalg.svd(x, full_matrices=False)
    expected = left[:, :rank] @ right[:rank]
    assert s[rank:].max() < 1e-9 * s[0] if rank < min(shape) and rank else True
    assert (u - expected).norm() <= bound * (1 + expected.norm())


@pytest.mark.parametrize("method", EXACT)
def test_float16_and_bfloat16_inputs_are_computed_in_float64(method):
    for dtype in (torch.float16, torch.bfloat16):
        x = reference.gaussian(12, 20).to(dtype)
        assert torch.equal(polar(x, method=method), polar(x.double(), method=method).to(dtype))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_an_error(method, bad):
    x = reference.gaussian(4, 6)
    x[1, 2] = bad
    with pytest.raises(torch.linalg.LinAlgError):
        polar(x, method=method)

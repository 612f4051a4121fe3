"""Polar factors on the device against float64 on the CPU: every method, in every dtype it takes."""

from __future__ import annotations

import pytest
import torch

from spectral_dist.polar import METHODS, check, polar
from spectral_dist.polar.scaling import near_one, unit_frobenius

pytestmark = pytest.mark.gpu
DTYPES = ("bfloat16", "float16", "float32", "float64")
BOUND = {"bfloat16": 0.1, "float16": 0.02, "float32": 2e-4, "float64": 1e-9}
"""Bounds of |U - U64| / |U64|: schedules raise rounding by the product of their slopes at 0, 485 of
jordan's, of directions that are nearly null; matrices here have condition numbers below 100."""
SHAPES = ((3, 96, 96), (2, 64, 200), (2, 200, 64))


def matrices(shape: tuple[int, ...]) -> torch.Tensor:
    """Random, with singular values from 1 to 100."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u * torch.logspace(0, 2, min(shape[1:]), dtype=torch.float64) @ vh


def takes(method: str, dtype: str) -> bool:
    """Whether the method computes in this dtype."""
    try:
        check(method, None, dtype)
    except ValueError:
        return False
    return True


PAIRS = [(method, dtype) for method in METHODS for dtype in DTYPES if takes(method, dtype)]


@pytest.mark.parametrize(("method", "dtype"), PAIRS)
def test_every_method_is_that_of_float64_on_the_cpu(method, dtype, device):
    for shape in SHAPES:
        x = matrices(shape)
        wanted = polar(x, method=method, compute_dtype="float64")
        given = x.to(device, torch.float64 if dtype == "float64" else torch.float32)
        found = polar(given, method=method, compute_dtype=dtype)
        assert found.device == given.device
        error = (found.double().cpu() - wanted).norm() / wanted.norm()
        assert float(error) <= BOUND[dtype], (shape, float(error))


@pytest.mark.parametrize("method", METHODS)
def test_zero_is_zero_and_nan_stays_in_its_own_matrix(method, device):
    x = torch.randn(3, 40, 56, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 3, 5] = 0.0, float("nan")
    wanted = polar(x[2].to(device), method=method)
    found = polar(x.to(device), method=method)
    assert not found[0].any()
    assert found[1].isnan().all()
    error = (found[2] - wanted).norm() / wanted.norm()
    assert float(error) <= 0.06  # a batch may be multiplied by other kernels


@pytest.mark.parametrize("method", ["jordan", "gram_jordan", "qdwh"])
def test_the_same_bits_twice(method, device):
    x = matrices(SHAPES[0]).float().to(device)
    assert torch.equal(polar(x, method=method), polar(x, method=method))


@pytest.mark.parametrize("scale", [2.0**-120, 1.0, 2.0**124])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scaling_is_that_of_the_cpu_and_rounds_once(dtype, scale, device):
    x = (matrices((3, 24, 40)) * (scale / 128)).to(dtype)
    x[1] = 0.0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(near_one(x.to(device), wide).cpu(), near_one(x, wide))
    wanted = unit_frobenius(x, torch.float64, 1.0)
    for multiple in (1, 16):
        found = unit_frobenius(x.to(device), torch.bfloat16, 1.0, multiple)[:, :24, :40].cpu()
        error = (found.double() - wanted).abs()
        assert (error <= (2.0**-8 + 1e-5) * wanted.abs() + 1e-38).all()

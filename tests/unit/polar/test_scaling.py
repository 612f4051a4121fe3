"""What scaling does to a matrix before its polar factor is computed, against float64."""

import math

import pytest
import torch

from spectral_dist.polar.scaling import near_one, unit_frobenius

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def matrices(dtype, scale, shape=(3, 5, 7)):
    x = torch.randn(shape, dtype=FP64, generator=torch.Generator().manual_seed(1))
    return (x * scale).to(dtype)


@pytest.mark.parametrize("scale", [2.0**-120, 1e-20, 0.3, 1.0, 7e19, 2.0**124])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
def test_scaling_near_one_divides_by_a_power_of_two(dtype, scale):
    x = matrices(dtype, scale)
    y = near_one(x, dtype)
    largest = y.abs().amax((-2, -1)).double()
    assert ((largest >= 1) & (largest < 2)).all()
    ratios = x.double() / y.double()
    powers = ratios[:, :1, :1]
    assert torch.equal(ratios, powers.expand_as(ratios))
    assert (torch.frexp(powers).mantissa == 0.5).all()


@pytest.mark.parametrize(
    ("dtype", "smallest"), [(BF16, 2.0**-133), (FP16, 2.0**-24), (FP32, 2.0**-149)]
)
def test_the_smallest_number_can_be_squared_after_it(dtype, smallest):
    x = torch.zeros(2, 3, 4, dtype=dtype)
    x[0, 1, 2] = -smallest
    y = near_one(x, FP32)
    assert y[0, 1, 2].square() > torch.finfo(FP32).tiny
    assert y[0, 1, 2] < 0
    assert not y[1].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_own_matrix_alone(bad):
    x = matrices(FP32, 1.0)
    x[1, 2, 3] = bad
    for y in (near_one(x, FP32), unit_frobenius(x, BF16, 1.0)):
        assert y.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [2.0**-120, 1.0, 2.0**124])
@pytest.mark.parametrize("given", [BF16, FP32, FP64])
@pytest.mark.parametrize("wanted", [BF16, FP16, FP32, FP64])
def test_unit_frobenius_rounds_once(given, wanted, scale):
    x = matrices(given, scale)
    y = unit_frobenius(x, wanted, 1.1)
    exact = x.double() * 2.0 ** -math.log2(scale) if scale != 1.0 else x.double()
    exact = exact / (1.1 * torch.linalg.matrix_norm(exact))[:, None, None]
    assert y.dtype == wanted
    assert y.is_contiguous()
    wide = FP64 if FP64 in (given, wanted) else FP32
    relative = torch.finfo(wanted).eps / 2 + 4 * torch.finfo(wide).eps
    absolute = torch.finfo(wanted).smallest_normal * torch.finfo(wanted).eps
    assert ((y.double() - exact).abs() <= relative * exact.abs() + absolute).all()


def test_nothing_is_written_to_what_is_given():
    x = matrices(FP32, 3.0)
    given = x.clone()
    assert unit_frobenius(x, FP32, 1.0).data_ptr() != x.data_ptr()
    near_one(x, FP32).zero_()
    assert torch.equal(x, given)

"""The symmetric products by Triton against float64: run by test_polar_products.py in a process of
its own, under Triton's interpreter. Without TRITON_INTERPRET it needs a GPU, and takes that.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from spectral_dist.polar import newton_schulz, polar, products, set_products
from spectral_dist.polar import triton_gemm as kernels
from spectral_dist.polar.products import TORCH, Products
from spectral_dist.polar.scaling import unit_frobenius
from spectral_dist.polar.schedules import rows
from spectral_dist.polar.triton_gemm import Tiling
from tests.reference import polar as reference

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
TRITON = Products(kernels.gram, kernels.odd_part, kernels.update)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
SLOW = pytest.mark.slow


def random(*shape, dtype=torch.float16, seed=0):
    return reference.gaussian(*shape, seed=seed).to(DEVICE, dtype)


def symmetric(batch, side, dtype, seed=0):
    x = random(batch, side, side, dtype=torch.float32, seed=seed)
    return ((x + x.mT) / math.sqrt(side)).to(dtype)


def unwritten(batch, side, dtype):
    """NaN, so that what is not written shows."""
    return torch.full((batch, side, side), float("nan"), dtype=dtype, device=DEVICE)


def once_rounded(result, expected, magnitudes):
    """Exactly symmetric, and a float32 sum of terms of these magnitudes that was rounded once."""
    assert torch.equal(result, result.mT)
    info = torch.finfo(result.dtype)
    bound = 0.501 * info.eps * expected.abs() + 4e-7 * magnitudes + info.smallest_normal
    wrong = (result.double() - expected).abs() > bound
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}"
    assert torch.isfinite(result).all()


def check_gram(x):
    before = x.clone()
    out = unwritten(len(x), min(x.shape[-2:]), x.dtype)
    assert kernels.gram(x, out) is out
    assert torch.equal(x, before)
    y = x.double()
    y = y.mT if x.shape[-2] > x.shape[-1] else y
    once_rounded(out, y @ y.mT, y.abs() @ y.abs().mT)


def check_odd_part(r, b, c):
    before = r.clone()
    out = unwritten(len(r), r.shape[-1], r.dtype)
    assert kernels.odd_part(r, b, c, out) is out
    s = r.double()
    once_rounded(out, b * s + c * s @ s, (b * s).abs() + abs(c) * s.abs() @ s.abs())
    assert torch.equal(r, before)


@HALF
def test_gram_of_any_shape(dtype):
    for shape in ((64, 128), (1, 9), (97, 40)):
        check_gram(random(2, *shape, dtype=dtype))
    check_gram(random(1, 1, 1, dtype=dtype))


@HALF
def test_odd_part(dtype):
    for batch, side in ((1, 1), (2, 33), (1, 130)):
        check_odd_part(symmetric(batch, side, dtype), -4.775, 2.0315)
    check_odd_part(symmetric(1, 64, dtype), 0.0, 1.0)


@pytest.mark.parametrize("by_tma", [False, True])
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(16, 32, 32, 4, 2, 1),
        pytest.param(Tiling(16, 16, 16, 4, 2, 2), marks=SLOW),
        pytest.param(Tiling(64, 16, 16, 4, 2, 3), marks=SLOW),
        *(pytest.param(tiling, marks=SLOW) for tiling in kernels.TILINGS.values()),
    ],
    ids=str,
)
def test_any_tiling(tiling, by_tma, monkeypatch):
    """TMA wants rows of 16 bytes, and of a batch of tall matrices a length of whole steps."""
    made = []
    make = kernels._descriptor

    def descriptor(*arguments):
        made.append(make(*arguments) if by_tma else None)
        return made[-1]

    monkeypatch.setattr(kernels, "_descriptor", descriptor)
    monkeypatch.setattr(kernels, "tiling_for", lambda side: tiling)
    for side in (31, 48):
        check_gram(random(2, side, 40))
        check_gram(random(2, 64, side - 16))
        check_odd_part(symmetric(1, side, torch.float16), -0.5, 2.0)
    assert any(made) == by_tma


def test_tilings_by_side(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    sizes = {side: kernels.tiling_for(side)[:2] for side in (1, 1024, 1025, 4096, 6144, 8192)}
    assert sizes == {1: (64, 64), 1024: (64, 64), 1025: (128, 128), 4096: (128, 128),
                     6144: (128, 256), 8192: (128, 256)}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=SLOW)])
def test_gram_of_any_strides(dtype):
    x = random(2, 90, 140, dtype=dtype)
    check_gram(x.mT)
    check_gram(x[:, ::2, ::3])
    check_gram(x[:, :, 5:])
    check_gram(x[:, :60, 8:72])
    check_gram(x[:1, :75, 8:72])
    check_gram(x[:, 3:50, 7:31].mT)
    check_gram(x[:1].expand(3, -1, -1))
    check_gram(x.transpose(0, 1)[:, :, :50].transpose(0, 1))
    check_gram(x[0, 0, :64].as_strided((2, 20, 30), (0, 1, 1)))  # elements that overlap


@HALF
def test_update_of_what_commutes(dtype):
    """Whole numbers of few bits: R and Z = 2 R - R^2 are exact, so that they commute exactly."""
    for batch, side in ((2, 33), (1, 130)):
        generator = torch.Generator().manual_seed(side)
        x = torch.randint(0, 2, (batch, side, 2), generator=generator).double()
        r = (x * torch.tensor([1.0, -1.0]).double()) @ x.mT
        r = r * (torch.rand(batch, side, generator=generator) < 0.1).double()[:, :, None]
        r = torch.minimum(r, r.mT)
        z = 2 * r - r @ r
        r, z = r.to(DEVICE), z.to(DEVICE)
        assert torch.equal(z.to(dtype).double(), z)
        out = unwritten(batch, side, dtype)
        kernels.update(r.to(dtype), z.to(dtype), 0.75, out)
        once_rounded(out, 0.75 * r + z @ r, r.abs() + z.abs() @ r.abs())


def test_update_takes_the_half_below_the_diagonal():
    r, z = (symmetric(2, 70, torch.float16, seed) for seed in (0, 1))
    expected = (0.5 * r.double() + z.double() @ r.double()).tril()
    expected = expected + expected.tril(-1).mT
    result = kernels.update(r, z, 0.5, unwritten(2, 70, r.dtype))
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(result, result.mT)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what NaN it computes
def test_nan_stays_in_its_matrix():
    x = random(3, 70, 90)
    before, after = unwritten(3, 70, x.dtype), unwritten(3, 70, x.dtype)
    kernels.gram(x, before)
    odd = kernels.odd_part(before, 1.0, -0.25, unwritten(3, 70, x.dtype))
    x[1, 3, 4] = float("nan")
    kernels.gram(x, after)
    assert after[1, 3].isnan().all()
    assert after[1, :, 3].isnan().all()
    assert after[1].isnan().sum() == 2 * 70 - 1
    spoiled = kernels.odd_part(after, 1.0, -0.25, unwritten(3, 70, x.dtype))
    for which in (0, 2):
        assert torch.equal(after[which], before[which])
        assert torch.equal(spoiled[which], odd[which])


@triton.jit
def rows_of(out, begin, SIZE: tl.constexpr):
    index = begin + tl.arange(0, SIZE)
    tl.store(out + tl.arange(0, SIZE), kernels._row_of(index))


def test_row_of_an_element_of_a_triangle():
    """Rounding of the root must not show: 4096 rows of tiles are a side of half a million."""
    size = 1 << 16
    for begin in (0, size, 15 * size, 4096 * 4095 // 2 - size):
        out = torch.empty(size, dtype=torch.int32, device=DEVICE)
        rows_of[(1,)](out, begin, size)
        index = torch.arange(begin, begin + size, device=DEVICE)
        row = out.long()
        assert (row * (row + 1) // 2 <= index).all()
        assert (index < (row + 1) * (row + 2) // 2).all()


# the iterations


def spectra(m, n, seed):
    yield reference.gaussian(m, n, seed=seed)
    for decades in (3.0, 8.0):
        s = torch.logspace(0, -decades, min(m, n), dtype=torch.float64)
        yield reference.with_singular_values(s, m, n, seed=seed)


def error(u, expected):
    return ((u[0].double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("form", "name", "dtype"),
    [
        pytest.param("standard", "jordan", torch.bfloat16, marks=SLOW),
        pytest.param("standard", "jordan", torch.float16, marks=SLOW),
        pytest.param("standard", "polar_express", torch.bfloat16, marks=SLOW),
        pytest.param("standard", "polar_express", torch.float16, marks=SLOW),
        pytest.param("gram", "jordan", torch.float16, marks=SLOW),
        ("gram", "polar_express", torch.float16),
    ],
)
def test_errors_are_no_larger_than_torchs(form, name, dtype):
    """On the whole, over random and decaying spectra: no form is right in each last bit."""
    logs = []
    for shape, seed in (((60, 120), 0), ((120, 60), 1)):
        for x in spectra(*shape, seed):
            expected = reference.newton_schulz(name, reference.NATURAL_STEPS[name], x)
            y = unit_frobenius(x[None].to(DEVICE), dtype, reference.start_norm(name))
            by_torch = getattr(newton_schulz, form)(y.clone(), rows(name), TORCH)
            by_triton = getattr(newton_schulz, form)(y, rows(name), TRITON)
            assert by_triton.shape == by_torch.shape
            assert by_triton.dtype == dtype
            logs.append(math.log(error(by_triton, expected) / error(by_torch, expected)))
            assert logs[-1] < math.log(1.5), (dtype, x.shape)
    assert sum(logs) / len(logs) < math.log(1.1), (dtype, logs)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="float32 has no kernel on a GPU")
@SLOW
def test_half_mirrored_q_would_be_worse():
    """Why the Gram form leaves Q's own product to torch."""
    s = torch.logspace(0, -3.0, 72, dtype=torch.float64)
    name, x = "polar_express", reference.with_singular_values(s, 72, 150, seed=0)
    expected = reference.newton_schulz(name, 5, x)
    y = unit_frobenius(x[None].to(DEVICE), torch.float32, reference.start_norm(name))
    right = error(newton_schulz.gram(y.clone(), rows(name), TRITON), expected)
    baddbmm = torch.baddbmm

    def mirrored(c, a, b, **options):
        result = baddbmm(c, a, b, **options)
        if a.shape == b.shape == c.shape:
            result.copy_(result.tril() + result.tril(-1).mT)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "baddbmm", mirrored)
        wrong = error(newton_schulz.gram(y.clone(), rows(name), TRITON), expected)
    assert wrong > 2 * right


@pytest.mark.parametrize("method", ["jordan", "gram_jordan"])
def test_polar_takes_the_kernels_where_they_are_asked_for(method, monkeypatch):
    calls = []
    counted = Products(*(lambda *a, f=f: calls.append(f) or f(*a) for f in TRITON))
    monkeypatch.setattr(products, "_triton", lambda: counted)
    monkeypatch.setattr(products, "_chosen", None)
    x = random(2, 24, 40, dtype=torch.float32)
    set_products("torch")
    by_torch = polar(x, method=method, compute_dtype="float16")
    assert not calls
    set_products("triton")
    by_triton = polar(x, method=method, compute_dtype="float16")
    assert set(calls) == {kernels.gram, kernels.odd_part} | (
        {kernels.update} if method.startswith("gram") else set()
    )
    torch.testing.assert_close(by_triton, by_torch, rtol=0, atol=0.01)
    calls.clear()
    exact = polar(x, method=method, compute_dtype="float32")
    assert not calls
    torch.testing.assert_close(by_triton, exact, rtol=0, atol=0.02)

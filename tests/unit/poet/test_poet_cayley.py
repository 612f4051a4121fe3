"""The Cayley-Neumann map, its backward and what is said of it, against explicit powers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_dist.poet import cayley
from spectral_dist.poet.cayley import EXACT, ORDERS, CayleyNeumann
from tests.reference import poet as reference

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
orders = st.sampled_from(ORDERS)
sizes = st.sampled_from([2, 3, 5, 16])


def skews(b, seed, norm=0.5, count=2, dtype=torch.float64):
    """Random packed blocks, the largest ||Q|| of which is ``norm``."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(count, b * (b - 1) // 2, dtype=torch.float64, generator=generator)
    return (v * (norm / reference.thetas(v, b).max())).to(dtype)


def dense(v, b, order):
    return torch.stack([reference.cayley(reference.skew_matrix(row, b), order) for row in v])


def gaussian(*shape, seed=7, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mapped(v, b, order, dtype=torch.float64):
    return CayleyNeumann.apply((b,), order, dtype, v)[0]


def test_a_packed_row_is_the_strict_upper_triangle_row_by_row():
    q = cayley.unpack(torch.tensor([[1.0, 2.0, 3.0]]), 3)
    expected = torch.tensor([[[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]])
    assert torch.equal(q, expected)
    assert [cayley.packed_size(b) for b in (2, 3, 256)] == [1, 3, 32640]


@quick
@given(sizes, seeds, orders, st.floats(-6, -0.05))
def test_delta_and_its_gradient(b, seed, order, exponent):
    """dL/dQ packed, by autograd through the powers; relative to its size."""
    v, weight = skews(b, seed, 10**exponent), gaussian(2, b, b, seed=seed + 1)
    mine, theirs = (v.clone().requires_grad_() for _ in range(2))
    found, expected = mapped(mine, b, order), dense(theirs, b, order)
    torch.testing.assert_close(found + torch.eye(b), expected, rtol=0, atol=1e-13)
    for x in (found, expected):
        (x * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(order):
    v = skews(4, 3, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mapped(x, 4, order), (v,), atol=1e-8)


@quick
@given(sizes, seeds, orders, st.floats(0.01, 0.95))
def test_singular_values(b, seed, order, norm):
    v = skews(b, seed, norm)
    found = torch.linalg.svdvals(cayley.delta(v, b, order) + torch.eye(b))
    for row, theta in zip(found, reference.thetas(v, b), strict=True):
        factors = sorted((reference.shrink(t, order) for t in theta.tolist()), reverse=True)
        expected = torch.tensor(factors, dtype=torch.float64)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


def test_orders_shrink_or_grow_as_the_specification_says():
    """One plane, theta = .3: so that the reference's own formulas are held to numbers."""
    v = torch.tensor([[0.3]], dtype=torch.float64)
    found = {k: torch.linalg.det(cayley.delta(v, 2, k)[0] + torch.eye(2)).sqrt() for k in ORDERS}
    expected = {1: 1.09, 2: math.sqrt(1.000729), 3: 0.9919, 4: math.sqrt(1.0000059049), EXACT: 1.0}
    assert {k: float(x) for k, x in found.items()} == pytest.approx(expected, abs=1e-13)


@quick
@given(sizes, seeds, st.floats(-3, 0.9))
def test_exact_is_orthogonal_at_any_size(b, seed, exponent):
    g = cayley.delta(skews(b, seed, 10**exponent), b, EXACT) + torch.eye(b)
    error = torch.linalg.matrix_norm(g @ g.mT - torch.eye(b, dtype=g.dtype)).max()
    assert error <= 1e-12


# -- precision


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", [1e-4, 1e-7])
def test_small_rotations_keep_their_digits_in_float32(order, norm):
    """G itself would keep 1e-7 / norm of them."""
    v = skews(16, 0, norm, dtype=torch.float32)
    exact = dense(v.double(), 16, order) - torch.eye(16)
    found = mapped(v, 16, order, torch.float32).double()
    relative = torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact)
    assert relative.max() <= 3e-7


@pytest.mark.parametrize("order", ORDERS)
def test_sixteen_bit_skews_compute_in_float32_and_round_once(order):
    v = skews(16, 1, 0.4, dtype=torch.bfloat16)
    wide = v.float().requires_grad_()
    narrow = v.clone().requires_grad_()
    whole = mapped(wide, 16, order, torch.float32)
    assert torch.equal(mapped(narrow, 16, order, torch.float32), whole)
    assert torch.equal(mapped(narrow, 16, order, torch.bfloat16), whole.bfloat16())
    weight = gaussian(2, 16, 16, dtype=torch.float32).bfloat16()
    (mapped(narrow, 16, order, torch.bfloat16) * weight).sum().backward()
    (whole * weight.float()).sum().backward()
    assert narrow.grad.dtype == torch.bfloat16
    assert torch.equal(narrow.grad, wide.grad.bfloat16())


@pytest.mark.parametrize("order", ORDERS)
def test_autocast_lowers_nothing(order):
    v, weight = skews(16, 2, 0.4, dtype=torch.float32), gaussian(2, 16, 16, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        leaf = v.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = mapped(leaf, 16, order, torch.float32)
            (found * weight).sum().backward()
        results.append((found.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


class Operations(TorchDispatchMode):
    """Names of all that torch was asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


WAITS = {"_linalg_check_errors", "_local_scalar_dense", "nonzero"}
"""What makes the CPU wait for the device that has the tensors."""


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_waits_for_the_device(order):
    v = skews(16, 3, 0.4).requires_grad_()
    with Operations() as asked:
        mapped(v, 16, order).sum().backward()
    assert not asked.names & WAITS
    with Operations() as checked:  # so that the name is right
        torch.linalg.solve(torch.eye(2), torch.eye(2))
    assert "_linalg_check_errors" in checked.names


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(order, bad):
    """In its own block alone, and no error: the checks of gradients are made for it."""
    v = skews(5, 3, 0.4)
    v[0, 2] = bad
    change = mapped(v, 5, order)
    assert not change[0].isfinite().all()
    assert torch.equal(change[1], mapped(v[1:], 5, order)[0])


# -- what is reported


@quick
@given(sizes, seeds, st.floats(-8, 0))
def test_norms_are_close_and_never_above(b, seed, exponent):
    v = skews(b, seed, 10**exponent, count=3)
    found, true = cayley.norms(v, b), reference.thetas(v, b).amax(1)
    assert (found <= true * (1 + 1e-12)).all()
    assert (found >= true * 0.98).all()


def test_norms_of_zero_and_of_a_wide_spectrum():
    assert torch.equal(cayley.norms(torch.zeros(2, 10), 5), torch.zeros(2))
    v = skews(64, 0, 0.5, count=1)
    found, true = cayley.norms(v, 64), reference.thetas(v, 64).amax(1)
    assert true * 0.98 <= found <= true * (1 + 1e-12)


@quick
@given(sizes, seeds, orders, st.floats(0.01, 0.9))
def test_orthogonality_errors(b, seed, order, norm):
    v = skews(b, seed, norm)
    g = dense(v, b, order)
    expected = [torch.linalg.norm(x @ x.T - torch.eye(b)) / math.sqrt(b) for x in g]
    found = cayley.orthogonality_errors(cayley.delta(v, b, order))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-13)

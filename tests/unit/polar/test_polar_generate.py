"""Optimal schedules: the published table, optimality, convergence and stability."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_dist.polar.generate import CUSHION, best_cubic, best_quintic, optimal
from spectral_dist.polar.schedules import rows
from spectral_dist.polar.stability import check_rows
from tests.reference import polar as reference


def through(table, x):
    for a, b, c in table:
        x = a * x + b * x**3 + c * x**5
    return x


def inputs(lower):
    start = torch.logspace(math.log10(lower), 0, 20_001, dtype=torch.float64).clamp(lower, 1)
    return torch.cat([start, torch.linspace(lower, 1, 20_001, dtype=torch.float64)])


def test_the_published_polar_express_table():
    table = optimal(1e-3, 10, cushion=0.02407327424182761)
    for step, row in enumerate(table):
        expected = reference.POLAR_EXPRESS[min(step, 7)]
        assert row == pytest.approx(expected, rel=1e-14 if step < 6 else 1e-8, abs=0)


def test_our_polar_express_schedule_is_one_of_these():
    # the schedule widens all of its 8 rows but the last
    table = optimal(1e-3, 8, safety=1.01)
    for row, expected in zip(table, rows("polar_express", 8), strict=True):
        assert row == pytest.approx(expected, rel=1e-7)


def test_quintics_against_the_reference():
    for lower in (1e-4, 1e-2, 0.3, 0.9):
        for cushion in (0.0, CUSHION, 0.2):
            expected = reference.optimal_quintics(lower, 3, cushion)
            for row, other in zip(optimal(lower, 3, cushion=cushion), expected, strict=True):
                assert row == pytest.approx(other, rel=1e-9 if lower < 0.9 else 1e-7)


@pytest.mark.parametrize("best", [best_quintic, best_cubic])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(low=st.floats(1e-3, 0.95), high=st.floats(1.0, 1.7))
def test_no_neighbour_is_closer_to_one(best, low, high):
    x = torch.linspace(low, high, 2_001, dtype=torch.float64)
    row = best(low, high)
    error = (through([row], x) - 1).abs().max().item()
    count = 3 if best is best_quintic else 2
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-4):
        for _ in range(50):
            noise = torch.randn(3, generator=generator).tolist()
            other = tuple(
                k * (1 + size * n) if i < count else k
                for i, (k, n) in enumerate(zip(row, noise, strict=True))
            )
            assert (through([other], x) - 1).abs().max().item() > error - 1e-6 * (high / low) ** 0.5
    # what alternation says: |p - 1| is largest, and equal, at both ends
    ends = through([row], torch.tensor([low, high], dtype=torch.float64)) - 1
    assert ends.abs().tolist() == pytest.approx([error, error], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("lower", "degree", "steps"), [(1e-3, 5, 8), (1e-5, 5, 11), (1e-3, 3, 10), (0.5, 5, 3)]
)
def test_converges_on_its_interval(lower, degree, steps):
    for safety, bound in ((1.0, 1e-4), (1.01, 0.03)):
        # safety shrinks what the last row was made for
        reached = through(
            optimal(lower, steps, degree=degree, safety=safety), inputs(lower) / safety
        )
        assert (reached - 1).abs().max() < bound
    one_less = through(optimal(lower, steps - 2, degree=degree), inputs(lower))
    assert (one_less - 1).abs().max() > 1e-4


def test_cubics_have_no_fifth_power_and_no_cushion_is_the_composition_itself():
    table = optimal(1e-3, 4, degree=3, cushion=0.0)
    low, high = 1e-3, 1.0
    for row in table:
        assert row == pytest.approx(best_cubic(low, high), rel=1e-12)
        assert row[2] == 0.0
        low, high = through([row], low), through([row], (row[0] / (-3 * row[1])) ** 0.5)
        assert low + high == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("degree", [3, 5])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([1e-5, 1e-3, 1e-2, 0.99, 1.0]) | st.floats(1e-3, 1.0),
    st.sampled_from([0.0, CUSHION, 0.2]),
    st.sampled_from([1.001, 1.01, 1.2]),
    st.sampled_from([2, 3, 5, 10, 25]),
)
def test_with_safety_they_are_stable(degree, lower, cushion, safety, steps):
    if lower < 1e-3 and steps < 5:
        return  # see below
    table = optimal(lower, steps, degree=degree, cushion=cushion, safety=safety)
    check_rows(table, safety)
    check_rows(table)


def test_which_are_not_stable():
    """As the docstring says: with nothing to spare, or with too few steps for the last to bear."""
    for table in (
        optimal(1e-4, 5),
        optimal(1e-7, 5, degree=3, cushion=0.0),
        optimal(1e-3, 1, safety=1.01),
        optimal(1e-7, 3, safety=1.01),
    ):
        with pytest.raises(ValueError, match="unstable"):
            check_rows(table)
    check_rows(optimal(1e-7, 5, safety=1.01), 1.01)


def test_long_runs_end_at_the_limit():
    for lower in (0.5, 0.9, 0.999999, 1.0):
        assert optimal(lower, 30)[-1] == pytest.approx((1.875, -1.25, 0.375), rel=1e-12)
        assert optimal(lower, 30, degree=3)[-1] == pytest.approx((1.5, -0.5, 0.0), rel=1e-12)


REFUSED = (
    [({"lower": bad}, "lower is .* at most 1, as in 1e-3") for bad in (0, -1, 1.1, math.nan, "1")]
    + [({"steps": bad}, "steps is .* whole number") for bad in (0, 2.0, True, None)]
    + [({"degree": bad}, "degree is .*; write 5 or 3") for bad in (7, None, "5")]
    + [({"cushion": bad}, "cushion is .*; write a number in") for bad in (-0.1, 1.0, math.nan)]
    + [({"safety": bad}, "safety is .* at least 1") for bad in (0.5, math.inf, math.nan, None)]
)


def test_refusals():
    for change, match in REFUSED:
        with pytest.raises(ValueError, match=match):
            optimal(**{"lower": 1e-3, "steps": 5, **change})

import itertools

import pytest
import torch

from spectral_dist.polar import polar
from spectral_dist.polar.schedules import SCHEDULES, restarts, rows
from tests.reference import polar as reference

EXTRA_STEPS = 7

# lowest and highest singular value after so many steps, for inputs (normalised) from lower to 1
BANDS = [
    ("jordan", 5, 1e-3, 0.470, 1.202),
    ("jordan", 5, 5e-3, 0.682, 1.154),
    ("jordan", 5, 5e-2, 0.682, 1.134),
    ("quintic", 5, 1e-3, 0.475, 1.145),
    ("quintic", 5, 5e-3, 0.978, 1.111),
    ("quintic", 5, 5e-2, 0.978, 1.032),
    ("polar_express", 5, 1e-3, 0.846, 1.124),
    ("polar_express", 5, 5e-3, 0.870, 1.124),
    ("polar_express", 5, 5e-2, 0.870, 1.124),
    ("polar_express", 8, 1e-3, 1.0000, 1.0000),
    ("cans", 5, 1e-3, 0.884, 1.120),
    ("cans", 5, 5e-3, 0.884, 1.120),
    ("deepseekv4", 10, 1e-3, 1.0000, 1.0005),
    ("cubic5", 5, 1e-3, 0.119, 1.300),
    ("cubic5", 5, 5e-3, 0.574, 1.300),
    ("cubic5", 5, 5e-2, 0.774, 1.300),
]


def published_to(name, steps):
    return 6e-5 if (name, steps) in (("polar_express", 8), ("deepseekv4", 10)) else 6e-4


def inputs(lower):
    logarithmic = torch.logspace(torch.tensor(lower).log10().item(), 0, 20_001).double()
    return torch.cat([logarithmic, torch.linspace(lower, 1, 20_001).double()]).clamp(lower, 1)


def bands(name):
    return [band[1:] for band in BANDS if band[0] == name]


@pytest.mark.parametrize("name", reference.NAMES)
def test_bands_of_our_rows_on_scalars(name):
    assert bands(name)
    for steps, lower, lowest, highest in bands(name):
        s = inputs(lower)
        for a, b, c in rows(name, steps):
            s = a * s + b * s**3 + c * s**5
        assert s.min().item() == pytest.approx(lowest, abs=published_to(name, steps))
        assert s.max().item() == pytest.approx(highest, abs=published_to(name, steps))


@pytest.mark.parametrize("name", reference.NAMES)
def test_bands_on_matrices(name):
    """A matrix whose largest normalised singular value is where the band is lowest (or highest)."""
    norm = reference.start_norm(name)
    for steps, lower, lowest, highest in bands(name):
        s = inputs(lower)
        s = s[s <= 1 / norm]
        mapped = reference.scalar_map(name, steps, s)
        for edge, where in ((lowest, s[mapped.argmin()]), (highest, s[mapped.argmax()])):
            # the other eleven share what is left of the Frobenius norm that normalisation makes 1
            others = ((1 / norm**2 - where**2).clamp_min(0) / 11).sqrt()
            values = torch.cat([where[None], others.expand(11)])
            x = reference.with_singular_values(1e3 * values, 12, 20)
            for form in ("", "gram_"):
                reached = torch.linalg.svdvals(polar(x, method=form + name, steps=steps))
                assert (reached - edge).abs().min() < published_to(name, steps)


@pytest.mark.parametrize("name", reference.NAMES)
def test_rows_are_those_of_the_reference_past_the_end_too(name):
    steps = reference.NATURAL_STEPS[name]
    lengths = [None, steps] if name == "cubic5" else [None, 1, 2, steps, steps + EXTRA_STEPS]
    for length in lengths:
        expected = [reference.coefficients(name, i) for i in range(length or steps)]
        assert list(rows(name, length)) == expected


def test_every_schedule_is_in_the_reference():
    assert sorted(SCHEDULES) == sorted(reference.NAMES)


def test_quintic_cycles_and_the_others_repeat():
    assert rows("quintic", 12)[5:10] == rows("quintic", 5)
    assert rows("cans", 9)[4:] == (rows("cans")[-1],) * 5
    assert rows("deepseekv4", 12)[8:] == ((2.0, -1.5, 0.5),) * 4
    assert rows("polar_express", 11)[7:] == ((1.875, -1.25, 0.375),) * 4


def test_refusals():
    for steps in (1, 4, 6, 10):
        with pytest.raises(ValueError, match=f"steps is {steps}; cubic5 has exactly 5 steps"):
            rows("cubic5", steps)
    for steps in (0, -1, 2.0, "5", True):
        with pytest.raises(ValueError, match="must be a whole number, at least 1"):
            rows("jordan", steps)


def test_polar_express_table_comes_out_of_its_generator():
    table = reference.optimal_quintics(lower=1e-3, steps=10, cushion=0.02407327424182761)
    scaled = rows("polar_express", 8)
    for step, (a, b, c) in enumerate(table[:8]):
        s = 1.01 if step < 7 else 1.0
        expected = (a / s, b / s**3, c / s**5)
        assert scaled[step] == pytest.approx(expected, rel=1e-12 if step < 6 else 1e-7)


def test_polar_express_survives_what_its_safety_promises():
    start = torch.tensor([1.0, 1.005, 1.01], dtype=torch.float64)
    s, unsafe = start, start
    for step, (a, b, c) in enumerate(rows("polar_express", 20)):
        s = a * s + b * s**3 + c * s**5
        a, b, c = reference.POLAR_EXPRESS[min(step, 7)]
        unsafe = a * unsafe + b * unsafe**3 + c * unsafe**5
    torch.testing.assert_close(s, torch.ones_like(s), rtol=0, atol=1e-12)
    assert not (unsafe[1:].abs() < 1e3).any()


def test_restarts_at_natural_step_counts_are_the_measured_best():
    assert restarts(rows("polar_express")) == (2,)
    assert restarts(rows("quintic")) == (2,)
    assert restarts(rows("jordan")) == (3,)


@pytest.mark.parametrize("name", reference.NAMES)
def test_growth_between_restarts_is_bounded(name):
    steps = rows(name, None if name == "cubic5" else 14)
    points = (0, *restarts(steps), len(steps))
    assert list(points) == sorted(set(points))
    for begin, end in itertools.pairwise(points):
        growth = 1.0
        for i in range(begin, end):
            growth *= reference.coefficients(name, i)[0]
        assert growth <= 50

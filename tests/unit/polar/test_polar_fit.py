"""AdaNewton's calibration: better than jordan and the published rows, stable, deterministic."""

import math
import time

import pytest
import torch

from spectral_dist.polar import newton_schulz
from spectral_dist.polar.fit import (
    FALLBACK,
    MARGIN,
    PUBLISHED,
    evaluate,
    fit,
    random_spectrum,
    relative_error,
)
from spectral_dist.polar.stability import check_fixed
from tests.reference import polar as reference

SHAPES = [(64, 64), (64, 1024), (192, 512), (512, 1376), (2048, 5461), (4096, 16384)]


def decaying():
    ramp = torch.arange(1, 513, dtype=torch.float64)
    found = {f"power {k}": ramp**-k for k in (0.5, 1.0, 2.0)}
    found |= {f"{k} decades": torch.logspace(0, -k, 512, dtype=torch.float64) for k in (1, 2, 3, 5)}
    found["one large"] = torch.cat([torch.ones(1), torch.full((511,), 0.01)]).double()
    return {name: s / s.norm() for name, s in found.items()}


def test_better_than_jordan_and_published_on_random_matrices():
    for shape in SHAPES + list(PUBLISHED):
        s = random_spectrum(shape)
        row = fit(s)
        check_fixed(row, margin=MARGIN)
        error = relative_error(s, row, 5)
        assert error < 0.95 * relative_error(s, FALLBACK, 5), shape
        if shape in PUBLISHED:
            assert error < 0.95 * relative_error(s, PUBLISHED[shape], 5), shape


def test_published_errors_are_those_of_the_spec():
    for shape, published, jordan in (((2048, 3072), 0.128, 0.184), ((2048, 8192), 0.039, 0.184)):
        s = random_spectrum(shape)
        assert relative_error(s, PUBLISHED[shape], 5) == pytest.approx(published, abs=5e-4)
        assert relative_error(s, FALLBACK, 5) == pytest.approx(jordan, abs=5e-4)


def test_better_than_jordan_on_decaying_spectra():
    for name, s in decaying().items():
        row = fit(s)
        check_fixed(row, margin=MARGIN)
        assert relative_error(s, row, 5) < 0.99 * relative_error(s, FALLBACK, 5), name


def test_no_stable_row_nearby_or_anywhere_is_better():
    generator = torch.Generator().manual_seed(0)
    for s in (random_spectrum((512, 512)), decaying()["2 decades"], random_spectrum((2048, 8192))):
        row = fit(s)
        error = relative_error(s, row, 5)
        for size in (1e-3, 0.02, 0.2):
            for _ in range(150):
                noise = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
                other = tuple(k * (1 + size * n) for k, n in zip(row, noise, strict=True))
                try:
                    check_fixed(other, margin=MARGIN)
                except ValueError:
                    continue
                assert relative_error(s, other, 5) > error * 0.999


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_other_numbers_of_steps(steps):
    s = random_spectrum((256, 384))
    row = fit(s, steps=steps)
    check_fixed(row, margin=MARGIN)
    assert relative_error(s, row, steps) < relative_error(s, FALLBACK, steps)
    # fitted to this number of steps, not to another
    if steps < 10:
        assert relative_error(s, row, steps) < relative_error(s, fit(s, steps=steps + 1), steps)


def test_the_singular_values_of_real_matrices():
    """random_spectrum is what Gaussian matrices have, and the fit holds on them."""
    for shape in ((64, 64), (64, 256), (160, 192), (256, 64)):
        x = reference.gaussian(*shape, seed=3)
        s = (torch.linalg.svdvals(x) / x.norm()).sort().values
        expected = random_spectrum(shape, count=min(shape))
        assert len(expected) == min(shape)
        assert (s - expected).norm() < 0.03 * s.norm()
        assert expected.square().sum().item() == pytest.approx(1.0, abs=1e-12)
        row = fit(random_spectrum(shape))
        y = newton_schulz.standard((x / x.norm())[None], [row] * 5)[0]
        exact = reference.exact(x)
        measured = ((y - exact).norm() / exact.norm()).item()
        assert measured == pytest.approx(relative_error(s, row, 5), abs=1e-9)
        predicted = relative_error(random_spectrum(shape), row, 5)
        assert measured == pytest.approx(predicted, rel=0.5, abs=0.005)


def test_random_spectrum_quantiles():
    # a square matrix: the law's distribution function in closed form (quarter circle)
    s = random_spectrum((1000, 1000), count=400)
    half = (s * 1000**0.5 / 2).clamp(max=1)
    below = 2 / math.pi * (half.asin() + half * (1 - half.square()).sqrt())
    wanted = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    assert (below - wanted).abs().max() < 2e-4
    # a long one: its edges
    wide = random_spectrum((100, 900), count=2000) * 10
    assert wide.min() == pytest.approx(1 - 1 / 3, abs=0.01)
    assert wide.max() == pytest.approx(1 + 1 / 3, abs=0.01)
    assert torch.equal(random_spectrum((7, 3)), random_spectrum((3, 7)))
    assert torch.equal(random_spectrum((1, 9), count=3), torch.ones(3, dtype=torch.float64))
    assert s.dtype == torch.float64
    assert torch.equal(s, s.sort().values)


def test_survives_bfloat16():
    """The row that random squares get lies at the limit of stability; so do these matrices."""
    for shape in ((64, 64), (4096, 4096)):
        row = fit(random_spectrum(shape))
        for values in (torch.linspace(0.05, 1.0, 64), torch.full((64,), 0.55), torch.ones(64)):
            x = reference.with_singular_values(values, 64, 64)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                y = newton_schulz.standard(x.to(dtype)[None], [row] * 30)[0].double()
                assert torch.linalg.svdvals(y).max() < 1.3


def test_weights():
    s = random_spectrum((64, 64), count=200)
    heavy = torch.cat([s, s[:50]])
    weights = torch.ones(200)
    weights[:50] = 2.0
    row = fit(heavy)
    assert fit(s, weights) == pytest.approx(row, rel=1e-3)
    assert relative_error(s, row, 5, weights) == pytest.approx(relative_error(heavy, row, 5))
    assert fit(s, 7.0 * weights) == pytest.approx(fit(s, weights), rel=1e-3)
    # a value without weight is not there
    ignored = torch.cat([s, torch.ones(1, dtype=torch.float64)])
    none = torch.cat([torch.ones(200), torch.zeros(1)])
    assert relative_error(ignored, row, 5, none) == pytest.approx(relative_error(s, row, 5))


def test_never_worse_than_start():
    for s in (random_spectrum((512, 512)), decaying()["power 1.0"]):
        best = fit(s)
        for start in (best, (3.1943, -3.8221, 1.5322), (2.0, -1.5, 0.5), (1.5, -0.5, 0.0)):
            error = relative_error(s, fit(s, start=start), 5)
            assert error <= relative_error(s, start, 5)
            assert error <= relative_error(s, best, 5) * 1.0001
    with pytest.raises(ValueError, match="unstable"):
        fit(s, start=PUBLISHED[2048, 2048])


def test_odd_data_still_gives_a_stable_row():
    for values in ([0.0, 0.0], [1.0], [1e-5, 1e-5], [0.3], [0.0, 1.0], [1.0] * 9):
        s = torch.tensor(values, dtype=torch.float64)
        row = fit(s)
        check_fixed(row)
        assert relative_error(s, row, 5) <= relative_error(s, FALLBACK, 5), values


def test_deterministic_and_whatever_the_dtype_and_shape():
    s = random_spectrum((64, 128), count=300)
    row = fit(s)
    assert fit(s) == row == fit(s.view(3, 100))
    assert fit(s.flip(0)) == pytest.approx(row, rel=1e-3)
    assert fit(s.float()) == pytest.approx(row, rel=1e-3)
    assert all(round(k, 5) == k for k in row)


def test_fast():
    s = torch.cat([random_spectrum((512, 512), 3000), decaying()["2 decades"]])
    begin = time.perf_counter()
    fit(s)
    assert time.perf_counter() - begin < 3.0  # .5 on an idle core


def test_evaluate_is_the_polynomial():
    s = random_spectrum((64, 64))
    torch.testing.assert_close(
        evaluate(s, FALLBACK, 5), reference.scalar_map("jordan", 5, s), rtol=1e-12, atol=0
    )


def test_refusals():
    s = random_spectrum((8, 8))
    for bad in (
        torch.empty(0),
        torch.tensor([1.5]),
        torch.tensor([-0.1]),
        torch.tensor([math.nan]),
    ):
        with pytest.raises(ValueError, match="sigmas"):
            fit(bad)
    for bad in (torch.ones(3), -torch.ones(len(s)), torch.zeros(len(s)), s * math.nan):
        with pytest.raises(ValueError, match="weights"):
            fit(s, bad)
    for bad in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match=r"steps is .* whole number"):
            fit(s, steps=bad)
    for bad in ((0, 4), (4,), (4.0, 4), (-1, 3)):
        with pytest.raises(ValueError, match="shape is"):
            random_spectrum(bad)
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="count is"):
            random_spectrum((4, 4), count=bad)

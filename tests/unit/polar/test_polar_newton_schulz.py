"""Newton-Schulz against the scalar polynomial and the reference loops; precision; bits; memory."""

import pytest
import torch

from spectral_dist.polar import newton_schulz, polar
from spectral_dist.polar.schedules import restarts, rows
from tests.reference import polar as reference

HALF = [name for name in reference.NAMES if name != "cans"]
FORMS = [form + name for form in ("", "gram_") for name in reference.NAMES]
SHAPES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1), (3, 200)]


def steps_to_try(name):
    return (5,) if name == "cubic5" else (1, reference.NATURAL_STEPS[name], 12)


def decaying(m, n, decades=6.0):
    """Exponentially decaying spectrum: half precision that fails does not fail on Gaussians."""
    s = torch.logspace(0, -decades, min(m, n), dtype=torch.float64)
    return reference.with_singular_values(s, m, n, seed=1)


def error(u, name, x):
    expected = reference.newton_schulz(name, reference.NATURAL_STEPS[name], x)
    return ((u.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("method", FORMS)
def test_float64_is_the_polynomial_of_the_singular_values_and_the_reference_loops(method):
    name = method.removeprefix("gram_")
    for x in (make(*shape) for shape in SHAPES for make in (reference.gaussian, decaying)):
        s = torch.linalg.svdvals(x)
        s = s / (s.norm() * reference.start_norm(name))
        for steps in steps_to_try(name):
            reached = polar(x, method=method, steps=steps)
            mapped = reference.scalar_map(name, steps, s).abs().sort(descending=True).values
            torch.testing.assert_close(torch.linalg.svdvals(reached), mapped, rtol=0, atol=1e-10)
            expected = reference.newton_schulz(name, steps, x)
            # the polynomial's own slope carries eps this far
            bound = 2e-11 if steps <= reference.NATURAL_STEPS[name] else 1e-10
            assert (reached - expected).norm() <= bound * expected.norm(), (x.shape, steps)


def test_steps_default_to_the_schedules_own_number():
    x = reference.gaussian(16, 24)
    for name, steps in reference.NATURAL_STEPS.items():
        assert torch.equal(polar(x, method=name), polar(x, method=name, steps=steps))


# error against float64, measured on 128 x 512 and on its transpose, with half as much again
GAUSSIAN_ERRORS = {
    "float32": {"": 1e-5, "gram_": 1.2e-5},
    "bfloat16": {"": 0.025},
    "float16": {"": 0.003, "gram_": 0.01},
}


@pytest.mark.parametrize("name", reference.NAMES)
def test_low_precision_on_gaussians(name):
    for dtype in GAUSSIAN_ERRORS if name in HALF else ["float32"]:
        for x in (reference.gaussian(128, 512), reference.gaussian(512, 128)):
            for form, bound in GAUSSIAN_ERRORS[dtype].items():
                reached = error(polar(x, method=form + name, compute_dtype=dtype), name, x)
                # and that dtype was really computed in
                assert bound / 100 < reached < bound, (dtype, form)


@pytest.mark.parametrize(
    ("name", "float32", "bfloat16", "float16"),
    [
        ("jordan", 1e-5, 0.18, 0.023),
        ("quintic", 1e-5, 0.17, 0.021),
        ("cubic5", 3e-6, 0.053, 0.0066),
        ("deepseekv4", 7e-4, 1.3, 0.9),
        ("polar_express", 2e-5, 0.29, 0.036),
    ],
)
def test_low_precision_on_decaying_spectra(name, float32, bfloat16, float16):
    x = decaying(128, 512)
    errors = {
        dtype: error(polar(x, method=name, compute_dtype=dtype), name, x)
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert errors["float32"] < float32
    assert errors["bfloat16"] < bfloat16
    assert errors["float16"] < float16


@pytest.mark.parametrize("name", reference.NAMES)
def test_gram_with_restarts_is_as_good_as_standard(name):
    for dtype in ("float32", "float16") if name in HALF else ("float32",):
        for decades in (3.0, 6.0):
            x = decaying(128, 512, decades)
            standard = error(polar(x, method=name, compute_dtype=dtype), name, x)
            gram = error(polar(x, method="gram_" + name, compute_dtype=dtype), name, x)
            assert gram < 6 * standard, (dtype, decades)


@pytest.mark.parametrize("name", ["jordan", "quintic", "polar_express", "deepseekv4"])
def test_gram_without_restarts_is_not(name, monkeypatch):
    """The test above can fail: it needs the restarts."""
    monkeypatch.setattr(newton_schulz, "restarts", lambda rows: ())
    x = decaying(128, 512)
    standard = error(polar(x, method=name, compute_dtype="float16"), name, x)
    gram = error(polar(x, method="gram_" + name, compute_dtype="float16"), name, x)
    assert not gram < 6 * standard


@pytest.mark.parametrize("name", HALF)
def test_half_precision_stays_bounded_whatever_the_spectrum(name):
    """Rounding must not push a singular value out of the range that the next row is made for."""
    for seed in range(12):
        m, n = ((12, 20), (32, 32), (64, 128))[seed % 3]
        spread = torch.rand(m, generator=torch.Generator().manual_seed(seed))
        for x in (reference.gaussian(m, n, seed=seed),
                  reference.with_singular_values(0.1 + 0.9 * spread, m, n, seed)):  # fmt: skip
            for dtype in ("float16", "bfloat16"):
                u = polar(x, method=name, compute_dtype=dtype)
                assert error(u, name, x) < 0.1
                assert torch.linalg.matrix_norm(u, 2) < 1.35


def test_gram_polynomial_is_what_multiplies_x():
    x = reference.gaussian(3, 12, 40)
    x /= x.norm(dim=(1, 2), keepdim=True)
    steps = rows("quintic")
    for begin, end in ((0, restarts(steps)[0]), (0, 1), (2, 5)):
        q = newton_schulz.gram_polynomial(x @ x.mT, steps[begin:end])
        expected = torch.stack([quintic_steps(matrix, begin, end) for matrix in x])
        torch.testing.assert_close(q @ x, expected, rtol=0, atol=1e-13)


def quintic_steps(x, begin, end):
    for step in range(begin, end):
        a, b, c = reference.coefficients("quintic", step)
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def peak_bytes(compute):
    """Most memory that a computation held at once, its result included."""
    compute()  # what the GEMM library keeps, it takes now
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        compute()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def product_scratch(x):
    """What torch's product of x (m, n) with an (m, m) takes beside its result.

    It is nothing, but wide copies on CPUs without products in bfloat16.
    """
    square = x.new_zeros(1, len(x), len(x))
    batch = x[None]
    return peak_bytes(lambda: torch.bmm(square, batch)) - x.numel() * x.itemsize


@pytest.mark.parametrize(
    ("method", "dtype", "grams"),
    [
        ("jordan", "float32", 2),
        ("cubic5", "float32", 1),
        ("gram_jordan", "float32", 2),
        ("jordan", "bfloat16", 2),
    ],
)
def test_memory_is_two_of_x_and_two_grams(method, dtype, grams):
    m, n = 128, 2048
    size = 2 if dtype == "bfloat16" else 4
    most = max(2 * m * n + grams * m * m, 3 * m * n if size == 2 else 0)  # 3: float32 beside bf16
    x = torch.randn(m, n)
    used = peak_bytes(lambda: polar(x, method=method, compute_dtype=dtype))
    assert m * n * size < used <= most * size + 1024 + product_scratch(x.to(getattr(torch, dtype)))


def test_meta_tensors_go_through_so_nothing_waits_for_the_device():
    """A meta tensor has no data: .item(), or a branch on a value, raises."""
    x = torch.empty(2, 8, 12, device="meta")
    for method in FORMS:
        u = polar(x, method=method)
        assert (u.shape, u.dtype, u.device.type) == (x.shape, x.dtype, "meta")

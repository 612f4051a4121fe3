"""ZOLO-PD: its coefficients to many digits, its scalar function, its accuracy, and its edges.

What it shares with QDWH (transposes, batches, zeros, missing rank) is in test_polar_qdwh.py.
"""

import math

import mpmath
import pytest
import scipy.special
import torch

from spectral_dist.polar import polar, zolo
from spectral_dist.polar.qdwh import QR_ABOVE, by_qdwh, sharpened
from tests.reference import polar as reference
from tests.reference import qdwh

EPS = 2.0**-52
CONS = [
    1 + 1e-7,
    1.0005,
    1.009,
    1.09,
    1.19,
    1.49,
    1.99,
    6.4,
    179.0,
    1.49e4,
    1.99e6,
    9.9e8,
    2.9e12,
    1 / EPS,
]
SHAPES = [(48, 80), (80, 48), (64, 64), (64, 256), (256, 64), (1, 7), (7, 1), (1, 1), (2, 3)]


@pytest.mark.parametrize("con", CONS)
def test_coefficients_to_60_digits(con):
    """Ours are on [1 / con, 1], those of the specification on [1, con]."""
    r = qdwh.degree(con)
    assert zolo.degree(con) == r
    f = zolo.zolotarev(1 / con, r)
    c = qdwh.zolotarev_coefficients(con, r)
    with mpmath.workdps(60):
        weights = qdwh.zolotarev_weights(c)
        square = mpmath.mpf(con) ** 2
        assert f.poles == pytest.approx([float(x / square) for x in c[0::2]], rel=1e-12)
        assert f.weights == pytest.approx([float(x / square) for x in weights], rel=1e-11)
        (_, reached) = qdwh.zolotarev([], con, 1)
        assert f.reached == pytest.approx(float(1 / reached), rel=1e-12)
        # at its top: f(con) in the specification's scale, over con
        top = 1 + sum(w / (square + p) for w, p in zip(weights, c[0::2], strict=True))
        assert f.gain == pytest.approx(float(top), rel=1e-12)


@pytest.mark.parametrize("lower", [0.999, 0.9, 0.4, 0.1])
@pytest.mark.parametrize("r", [2, 8])
def test_coefficients_are_scipys_where_that_is_accurate(lower, r):
    m = 1 - lower**2
    k = scipy.special.ellipk(m)
    sn, cn, _, _ = scipy.special.ellipj([i * k / (2 * r + 1) for i in range(1, 2 * r + 1, 2)], m)
    wanted = (lower * sn / cn) ** 2
    assert zolo.zolotarev(lower, r).poles == pytest.approx(wanted.tolist(), rel=1e-10)


@pytest.mark.parametrize("con", CONS)
def test_degrees_of_the_table_converge_in_the_iterations_it_states(con):
    steps = zolo.functions(1 / con)
    assert len(steps) == (1 if con <= 2 else 2)
    assert {len(f.poles) for f in steps} == {qdwh.degree(con)}
    assert sharpened(steps[-1].reached, EPS)
    # and the reference says so, too
    _, reached = qdwh.zolotarev([], con, len(steps))
    assert reached - 1 <= 2e-15
    if len(steps) == 2:
        assert not sharpened(steps[0].reached, EPS)


def test_never_more_than_two_functions_and_none_for_the_identity():
    assert len(zolo.functions(1e-30)) == 2
    assert zolo.functions(1.0) == ()


def test_near_one_the_series_is_long_but_ends():
    f = zolo.zolotarev(1 - 1e-15, 8)
    assert f.reached == 1.0
    angles = [math.tan(i * math.pi / 34) ** 2 for i in range(1, 17, 2)]
    assert f.poles == pytest.approx(angles, rel=1e-11)


def test_polar_takes_zolo_and_qdwh_for_what_they_are():
    x = reference.gaussian(9, 11)
    by_zolo = zolo.by_zolo(x[None])[0]
    assert torch.equal(polar(x, method="zolo"), by_zolo)
    assert torch.equal(polar(x, method="qdwh"), by_qdwh(x[None], torch.float64)[0])
    assert not torch.equal(by_zolo, polar(x, method="qdwh"))


@pytest.mark.parametrize(("method", "dtype", "qrs", "choleskys"), [
    ("qdwh", torch.float32, 2, 2), ("qdwh", torch.float64, 2, 3),
    ("zolo", torch.float64, 8, 8)])  # fmt: skip
def test_which_steps_are_qr(monkeypatch, method, dtype, qrs, choleskys):
    calls = []
    qr, cholesky = torch.linalg.qr, torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "qr", lambda x: (calls.append("qr"), qr(x))[1])
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x: (calls.append("ch"), cholesky(x))[1])
    polar(reference.gaussian(9, 11).to(dtype), method=method)
    assert calls == ["qr"] * qrs + ["ch"] * choleskys


def test_the_default_takes_qr_first_and_cholesky_then():
    first, second = zolo.functions(EPS)
    assert first.condition > 1e20
    assert second.condition < 10 < QR_ABOVE
    for f, low in ((first, EPS), (second, first.reached)):
        assert f.condition == pytest.approx((1 + f.poles[0]) / (low**2 + f.poles[0]))


@pytest.mark.parametrize("con", [1.5, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(12, 17), (17, 12), (12, 40), (40, 12), (12, 12)])
def test_singular_values_are_zolotarevs_function_of_them(con, shape):
    """Below 1 / con too, where it has not converged: what it is there tells the terms."""
    s = torch.logspace(0, -math.log10(con) - 2, 12, dtype=torch.float64)
    x = reference.with_singular_values(s, *shape)
    inner = [value * con / qdwh.norm_bound(x) for value in s.tolist()]
    mapped, _ = qdwh.zolotarev(inner, con, len(zolo.functions(1 / con)))
    mapped = torch.tensor([float(1.5 * y - 0.5 * y**3) for y in mapped], dtype=torch.float64)
    assert mapped.min() < 0.9
    u = zolo.by_zolo(x[None], 1 / con)[0]
    expected = reference.with_singular_values(mapped, *shape)
    assert (u - expected).norm() <= 1e-14 * con * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian(shape):
    x = reference.gaussian(*shape)
    u = polar(x, method="zolo")
    assert u.dtype == torch.float64
    assert qdwh.direction_error(u, reference.exact(x)) <= 1e-14
    assert qdwh.orthogonality_error(u) <= 1e-14
    assert abs((x * u).sum() / torch.linalg.svdvals(x).sum() - 1) <= 1e-12


@pytest.mark.parametrize(("kappa", "bound"), [(1e3, 1e-12), (1e6, 1e-10), (1e13, 1e-3)])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (48, 48), (48, 200), (200, 48)])
def test_ill_conditioned(kappa, bound, shape):
    s = torch.logspace(0, -math.log10(kappa), 48, dtype=torch.float64)
    u = polar(reference.with_singular_values(s, *shape), method="zolo")
    expected = reference.with_singular_values(torch.ones_like(s), *shape)
    assert qdwh.direction_error(u, expected) <= bound
    assert qdwh.orthogonality_error(u) <= 1e-14


@pytest.mark.parametrize("scale", [1e-300, 1e-8, 1e8, 1e300])
def test_scale(scale):
    x = reference.gaussian(24, 40)
    u = polar(x, method="zolo")
    torch.testing.assert_close(polar(x * scale, method="zolo"), u, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrower_inputs_are_computed_in_float64(dtype):
    x = reference.gaussian(12, 20).to(dtype)
    u = polar(x, method="zolo")
    assert torch.equal(u, polar(x.double(), method="zolo").to(dtype))
    assert qdwh.direction_error(u, reference.exact(x)) < torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(3, 12, 17), (3, 17, 12), (3, 40, 12), (3, 12, 40)])
def test_a_real_batch_as_devices_compute_it(shape):
    x = reference.gaussian(*shape)
    x[1] = 0
    u = zolo.by_zolo(x)
    assert u.is_contiguous()
    assert torch.equal(u[1], torch.zeros(shape[1:]).double())
    for k in (0, 2):
        assert qdwh.direction_error(u[k], reference.exact(x[k])) <= 1e-14

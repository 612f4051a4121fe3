"""ZOLO-PD: its elliptic integrals, its coefficients to many digits, and its scalar function.

What it shares with QDWH is in test_polar_qdwh.py, accuracy in test_polar_exact.py.
"""

import math
import subprocess
import sys
from pathlib import Path

import mpmath
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_dist
from spectral_dist.polar import polar, zolo
from spectral_dist.polar.qdwh import QR_ABOVE, can_sharpen, polar_by_qdwh
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


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-16, 0).map(lambda decades: 10**decades) | st.sampled_from([1.0, 1e-300, 1 - EPS]))
def test_elliptic_integrals_are_scipys(complement):
    assert zolo.elliptic_k(complement) == pytest.approx(
        float(scipy.special.ellipkm1(complement * complement))
        if complement > 1e-150
        else math.log(4) - math.log(complement),
        rel=1e-14,
        abs=0,
    )
    if complement > 0.7:  # nearer to 0 the parameter 1 - complement^2 is rounded
        parameter = (1 - complement) * (1 + complement)
        assert zolo.elliptic_k(complement) == pytest.approx(
            float(scipy.special.ellipk(parameter)), rel=1e-14, abs=0
        )


def test_nothing_imports_scipy():
    code = "import sys, spectral_dist, spectral_dist.polar.zolo; print('scipy' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(spectral_dist.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "False"


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
        assert f.lower_image == pytest.approx(float(1 / reached), rel=1e-12)
        # at its top: f(con) in the specification's scale, over con
        top = 1 + sum(w / (square + p) for w, p in zip(weights, c[0::2], strict=True))
        assert f.gain == pytest.approx(float(top), rel=1e-12)


def test_coefficients_are_scipys_where_that_is_accurate():
    for lower in (0.999, 0.9, 0.4, 0.1):
        m = 1 - lower**2
        k = scipy.special.ellipk(m)
        for r in (2, 8):
            u = [i * k / (2 * r + 1) for i in range(1, 2 * r + 1, 2)]
            sn, cn, _, _ = scipy.special.ellipj(u, m)
            wanted = (lower * sn / cn) ** 2
            assert zolo.zolotarev(lower, r).poles == pytest.approx(wanted.tolist(), rel=1e-10)


@pytest.mark.parametrize("con", CONS)
def test_degrees_of_the_table_converge_in_the_iterations_it_states(con):
    steps = zolo.zolotarev_functions(1 / con)
    assert len(steps) == (0 if con <= 1.001 else 1 if con <= 2 else 2)
    if not steps:
        assert can_sharpen(1 / con, EPS)
        return
    assert {len(f.poles) for f in steps} == {qdwh.degree(con)}
    assert can_sharpen(steps[-1].lower_image, EPS)
    # and the reference says so, too
    _, reached = qdwh.zolotarev([], con, len(steps))
    assert reached - 1 <= 2e-15
    if len(steps) == 2:
        assert not can_sharpen(steps[0].lower_image, EPS)


def test_never_more_than_two_functions_and_none_for_the_identity():
    assert len(zolo.zolotarev_functions(1e-30)) == 2
    assert zolo.zolotarev_functions(1.0) == ()


def test_near_one_the_series_is_long_but_ends():
    f = zolo.zolotarev(1 - 1e-15, 8)
    assert f.lower_image == pytest.approx(1.0, abs=2 * EPS)
    angles = [math.tan(i * math.pi / 34) ** 2 for i in range(1, 17, 2)]
    assert f.poles == pytest.approx(angles, rel=1e-11)


def test_polar_takes_zolo_and_qdwh_for_what_they_are():
    x = reference.gaussian(9, 11)
    polar_by_zolo = zolo.polar_by_zolo(x[None])[0]
    assert torch.equal(polar(x, method="zolo"), polar_by_zolo)
    assert torch.equal(polar(x, method="qdwh"), polar_by_qdwh(x[None], torch.float64)[0])
    assert not torch.equal(polar_by_zolo, polar(x, method="qdwh"))


@pytest.mark.parametrize(("method", "dtype", "qrs", "choleskys"), [
    ("qdwh", torch.float32, 2, 1), ("qdwh", torch.float64, 2, 2), ("qdwh", torch.bfloat16, 1, 1),
    ("zolo", torch.float64, 8, 8), ("zolo", torch.float32, 5, 5)])  # fmt: skip
def test_which_steps_are_qr(monkeypatch, method, dtype, qrs, choleskys):
    calls = []
    qr, cholesky = torch.linalg.qr, torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "qr", lambda x: (calls.append("qr"), qr(x))[1])
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x: (calls.append("ch"), cholesky(x))[1])
    polar(reference.gaussian(9, 11).to(dtype), method=method)
    assert calls == ["qr"] * qrs + ["ch"] * choleskys


def test_the_default_takes_qr_first_and_cholesky_then():
    first, second = zolo.zolotarev_functions(EPS)
    assert first.condition > 1e20
    assert second.condition < 10 < QR_ABOVE
    for f, low in ((first, EPS), (second, first.lower_image)):
        assert f.condition == pytest.approx((1 + f.poles[0]) / (low**2 + f.poles[0]))


@pytest.mark.parametrize("con", [1.5, 30.0, 1e3, 1e6])
def test_singular_values_are_zolotarevs_function_of_them(con):
    """Below 1 / con too, where it has not converged: what it is there tells the terms."""
    s = torch.cat(
        [torch.logspace(0, -math.log10(con), 6), 1 / con / torch.arange(3, 21, 3)]
    ).double()
    for shape in ((12, 17), (17, 12), (12, 40), (40, 12), (12, 12)):
        x = reference.with_singular_values(s, *shape)
        inner = [value * con / qdwh.norm_bound(x) for value in s.tolist()]
        values, _ = qdwh.zolotarev(inner, con, len(zolo.zolotarev_functions(1 / con)))
        mapped = qdwh.sharpen(torch.tensor([float(y) for y in values], dtype=torch.float64))
        assert ((mapped > 0.01) & (mapped < 0.99)).any()
        u = zolo.polar_by_zolo(x[None], 1 / con)[0]
        expected = reference.with_singular_values(mapped, *shape)
        assert (u - expected).norm() <= 3e-14 * con * expected.norm(), shape

"""Which products Newton-Schulz takes, what users may write, sides filled up; triton_checks.py."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectral_dist
from spectral_dist.polar import api, check, polar, products, set_products
from spectral_dist.polar.products import TORCH, products_for
from spectral_dist.polar.scaling import unit_frobenius
from tests.reference import polar as reference

ROOT = Path(__file__).resolve().parents[3]
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TRITON = "Triton's products"


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(products, "_chosen", None)
    monkeypatch.delenv(products.VARIABLE, raising=False)


@pytest.fixture
def h100(monkeypatch):
    """Pretend that there is an H100, and Triton."""
    monkeypatch.setattr(products, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(products, "_has_triton", lambda: True)
    monkeypatch.setattr(products, "_works", lambda device: True)
    monkeypatch.setattr(products, "_triton", lambda: TRITON)


@pytest.mark.parametrize("variable", [None, "", "auto"])
def test_auto_follows_the_table(variable, h100, monkeypatch):
    if variable is not None:
        monkeypatch.setenv(products.VARIABLE, variable)
    for dtype in (BF16, FP16):
        assert products_for(4096, dtype, GPU) is TRITON
        assert products_for(4095, dtype, GPU) is TORCH
    for dtype in (FP32, torch.float64):
        assert products_for(8192, dtype, GPU) is TORCH


def test_auto_is_torch_within_torch_compile(h100, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert products_for(8192, BF16, GPU) is TORCH


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (8, 9), (10, 0), (12, 0)])
def test_auto_is_torch_on_cards_that_were_not_measured(capability, h100, monkeypatch):
    monkeypatch.setattr(products, "_capability", lambda device: capability)
    assert products_for(8192, BF16, GPU) is TORCH


def test_capability_is_that_of_nvidias_cards_alone(monkeypatch):
    """AMD's MI250 calls itself (9, 0), too."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    capability = products._capability.__wrapped__
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert capability(GPU) == (9, 0)
    assert capability(CPU) == (0, 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert capability(GPU) == (0, 0)


def test_auto_without_triton_is_torch(monkeypatch):
    monkeypatch.setattr(products, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(products, "_has_triton", lambda: False)
    products._works.cache_clear()
    assert products_for(8192, BF16, GPU) is TORCH
    products._works.cache_clear()


def test_auto_with_a_triton_that_cannot_compile_says_so_once_and_is_torch(monkeypatch, caplog):
    def fails(x, out):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(products, "_has_triton", lambda: True)
    monkeypatch.setattr(products, "_triton", lambda: TORCH._replace(gram=fails))
    monkeypatch.setitem(products.SHORTEST, (0, 0), 4)  # the CPU's
    products._works.cache_clear()
    with caplog.at_level(logging.WARNING, "spectral_dist"):
        for _ in range(2):
            assert products_for(8, BF16, CPU) is TORCH
    (record,) = caplog.records
    assert "RuntimeError: Failed to find C compiler" in record.getMessage()
    products._works.cache_clear()


def test_what_was_set_goes_before_the_environment(h100, monkeypatch):
    monkeypatch.setenv(products.VARIABLE, "torch")
    assert products_for(4096, BF16, GPU) is TORCH
    set_products("auto")
    assert products_for(4096, BF16, GPU) is TRITON
    set_products("torch")
    monkeypatch.setenv(products.VARIABLE, "auto")
    assert products_for(4096, BF16, GPU) is TORCH


@pytest.mark.parametrize("wrong", ["Triton", "cublas", None, True, 3])
def test_unknown_products(wrong):
    with pytest.raises(ValueError, match="is unknown; write 'auto', 'torch' or 'triton'") as caught:
        set_products(wrong)
    assert "set_products" in str(caught.value)
    assert "#products-and-graphs-of-polar-factors" in caught.value.__notes__[0]
    assert products.choice() == "auto"


def test_a_wrong_environment_is_refused_where_an_optimizer_is_made(monkeypatch):
    monkeypatch.setenv(products.VARIABLE, "tritn")
    groups = spectral_dist.param_groups(torch.nn.Linear(3, 4))
    for call in (lambda: polar(torch.eye(3)), lambda: check("qdwh"),
                 lambda: spectral_dist.Muon(groups)):  # fmt: skip
        with pytest.raises(ValueError, match="SPECTRAL_DIST_POLAR_PRODUCTS: 'tritn' is unknown"):
            call()


def test_triton_without_triton(monkeypatch):
    monkeypatch.setattr(products, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"set_products: 'triton' needs .* not installed; write"):
        set_products("triton")
    monkeypatch.setenv(products.VARIABLE, "triton")
    with pytest.raises(ValueError, match="PRODUCTS: 'triton' needs the package triton"):
        polar(torch.eye(3))


# half precision in rows of 16 bytes


@pytest.mark.parametrize("shape", [(2, 13, 29), (2, 29, 13), (1, 11, 11), (1, 8, 9), (1, 1, 3)])
def test_zeros_around_a_matrix_change_nothing(shape, monkeypatch):
    x = reference.gaussian(*shape)
    for method in ("jordan", "gram_jordan", "cubic5", "gram_polar_express"):
        plain = polar(x, method=method)
        with monkeypatch.context() as patch:
            patch.setattr(api, "_multiple", lambda x, dtype: 8)
            filled = polar(x, method=method)
        assert filled.shape == plain.shape
        assert filled.is_contiguous()
        torch.testing.assert_close(filled, plain, rtol=0, atol=1e-11)


def test_nan_fills_its_whole_matrix_within_zeros_too(monkeypatch):
    monkeypatch.setattr(api, "_multiple", lambda x, dtype: 8)
    x = torch.randn(1, 9, 13)
    x[0, 3, 2] = float("nan")
    assert polar(x).isnan().all()
    assert not polar(torch.zeros(9, 13)).any()


def test_sides_are_filled_up_with_zeros():
    x = torch.randn(2, 5, 16)
    y = unit_frobenius(x, BF16, 1.0, 8)
    assert y.shape == (2, 8, 16)
    assert torch.equal(y[:, :5], unit_frobenius(x, BF16, 1.0))
    assert not y[:, 5:].any()
    assert unit_frobenius(x[:, :, :8], FP32, 1.0, 1).shape == (2, 5, 8)


def test_cpus_and_single_precision_have_their_sides_as_they_are(monkeypatch):
    for dtype in (BF16, FP16, FP32):
        assert api._multiple(torch.empty(1, 3, 5), dtype) == 1

    class OnGpu:
        is_cuda = True

    assert [api._multiple(OnGpu(), dtype) for dtype in (BF16, FP16, FP32)] == [8, 8, 1]


# Triton's interpreter

WITHOUT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import importlib.util, torch
find, missing = importlib.util.find_spec, ("triton",)
importlib.util.find_spec = lambda name, *rest: None if name in missing else find(name, *rest)
from spectral_dist.polar import polar, set_products
polar(torch.eye(3))
try:
    set_products("triton")
except ValueError as error:
    print(error)
"""
ON_CPU = """
import torch
from spectral_dist.polar import polar
try:
    polar(torch.eye(3))
except ValueError as error:
    print(error)
print(polar(torch.eye(3), method="svd").trace().item())
"""
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


def run(*arguments, **variables):
    """A process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_triton_by_its_interpreter(which):
    checks = str(ROOT / "tests/unit/polar/triton_checks.py")
    assert " passed" in run("-m", "pytest", checks, "-x", "-m", which, TRITON_INTERPRET="1")


@needs_triton
def test_triton_on_a_cpu_is_refused():
    refused, svd = run("-c", ON_CPU, SPECTRAL_DIST_POLAR_PRODUCTS="triton").splitlines()
    assert "'triton', which has no kernels for cpu" in refused
    assert "write 'auto'" in refused
    assert float(svd) == pytest.approx(3)


def test_nothing_needs_triton():
    assert "needs the package triton, which is not installed" in run("-c", WITHOUT)

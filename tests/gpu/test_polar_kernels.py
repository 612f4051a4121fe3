"""Polar factors as CUDA graphs, by Triton's kernels and with sides filled up, against torch's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spectral_dist.polar import graphs, polar, products, set_graphs, set_products
from tests.gpu import support

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    set_graphs(False)
    products._chosen = graphs._chosen = None


def matrices(device: torch.device, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("jordan", "bfloat16"),
        ("jordan", "float32"),
        ("quintic", "float16"),
        ("polar_express", "bfloat16"),
        ("gram_jordan", "float16"),
        ("gram_polar_express", "float32"),
        ("cans", "float64"),
        (((2, -1.5, 0.5),), "bfloat16"),
    ],
)
def test_graphs_are_the_bits_of_eager(method, dtype, device):
    for shape in ((5, 8, 8), (3, 64, 200), (2, 200, 63), (1, 96, 96)):
        for given in (torch.float32, torch.bfloat16):
            results = []
            for seed in range(3):
                x = matrices(device, *shape, seed=seed).to(given)
                set_graphs(False)
                eager = polar(x, method=method, compute_dtype=dtype)
                set_graphs(True)
                graph = [polar(x, method=method, compute_dtype=dtype) for _ in range(2)]
                results.append((eager, *graph))
                x.zero_()
            for eager, *graph in results:
                for replayed in graph:
                    assert torch.equal(replayed, eager), shape


def test_many_graphs_share_their_work_space_and_spoil_no_result(gpu):
    set_graphs(False)
    xs = [matrices(gpu, 3, 8 + i, 40) for i in range(12)]
    eager = [polar(x) for x in xs]
    set_graphs(True)
    for _ in range(3):
        for result, expected in zip([polar(x) for x in xs], eager, strict=True):
            assert torch.equal(result, expected)
    captured = [entry.graph for entry in graphs._graphs.values()]
    assert len(captured) == 12
    assert all(captured)
    assert len({graph.pool() for graph in captured if graph}) == 1


def test_a_replay_launches_little(gpu):
    set_graphs(True)
    x = matrices(gpu, 5, 8, 8)
    polar(x)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        polar(x)
        torch.cuda.synchronize()
    kinds = ("LaunchKernel", "MemcpyAsync", "MemsetAsync", "GraphLaunch")
    launches = {
        event.key: event.count for event in profile.key_averages()
        if any(kind in event.key for kind in kinds)
    }  # fmt: skip
    assert sum(launches.values()) <= 4, launches  # copied in, replayed, copied out


def test_a_replay_waits_for_nothing(gpu):
    set_graphs(True)
    x = matrices(gpu, 5, 8, 8)
    polar(x)
    torch.cuda.set_sync_debug_mode("error")
    polar(x)


def test_within_a_graph_of_the_users_own(gpu):
    set_graphs(True)
    x = matrices(gpu, 2, 16, 24)
    expected = polar(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = polar(x)
    graph.replay()
    assert torch.equal(result, expected)


def test_sides_that_are_no_multiples_of_8(device):
    for shape in ((2, 63, 201), (1, 130, 77), (1, 5, 5)):
        x = matrices(device, *shape)
        exact = polar(x.double(), method="jordan")
        for dtype, bound in (("bfloat16", 0.05), ("float16", 0.01)):
            found = polar(x, method="jordan", compute_dtype=dtype)
            assert found.is_contiguous()
            assert float((found.double() - exact).norm() / exact.norm()) < bound


@pytest.mark.slow  # compiles dozens of kernels
def test_the_kernels_pass_their_checks_on_this_gpu(gpu):
    """Those of triton_checks.py, compiled."""
    support.need("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/unit/polar/triton_checks.py", "--noconftest",
         "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize(("method", "dtype"), [("jordan", "bfloat16"), ("gram_jordan", "float16")])
def test_products_by_triton_are_as_exact_as_torchs_at_sizes_that_take_them(method, dtype, gpu):
    support.need("triton")
    for shape in ((1, 3072, 3584), (1, 3584, 3072), (2, 1000, 1500)):
        x = matrices(gpu, *shape)
        exact = polar(x, method="jordan", compute_dtype="float32")
        errors = {}
        for which in ("torch", "triton"):
            set_products(which)
            factor = polar(x, method=method, compute_dtype=dtype)
            errors[which] = float((factor - exact).norm() / exact.norm())
        assert errors["triton"] <= 1.15 * errors["torch"], (shape, errors)
        set_graphs(True)
        assert torch.equal(polar(x, method=method, compute_dtype=dtype), factor)
        set_graphs(False)


def test_auto_takes_triton_from_the_size_of_the_table_on(gpu):
    support.need("triton")
    if torch.cuda.get_device_capability(gpu) not in products.SHORTEST:
        pytest.skip(f"no measurements of {torch.cuda.get_device_name(gpu)}")
    set_products("auto")
    chosen = products.products_for(4096, torch.bfloat16, gpu)
    assert chosen is not products.TORCH
    assert products.products_for(2048, torch.bfloat16, gpu) is products.TORCH
    assert products.products_for(4096, torch.float32, gpu) is products.TORCH

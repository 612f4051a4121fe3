"""The device of these tests: a GPU; without one they are skipped.

To write them on a machine without one: SPECTRAL_DIST_GPU_TESTS=cpu runs them on the CPU and gloo,
all but those that measure a GPU's memory or its waits. They need pytest and torch alone, so that
``--confcutdir tests/gpu`` leaves out what the other tests ask for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

HERE = Path(__file__).parent
ON_CPU = os.environ.get("SPECTRAL_DIST_GPU_TESTS") == "cpu"
WITHOUT = "torch.cuda.is_available() is False: these tests need a CUDA device"
# before the first product: the same bits from the same products
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests without a GPU; other packages' warnings fail none of them."""
    skipped = not ON_CPU and not torch.cuda.is_available()
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.filterwarnings("default"))
            if skipped:
                item.add_marker(pytest.mark.skip(reason=WITHOUT))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where these tests run."""
    return torch.device("cpu" if ON_CPU else "cuda:0")


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same, of a test that means nothing elsewhere."""
    if device.type != "cuda":
        pytest.skip("what a GPU's driver counts is not counted on a CPU")
    torch.use_deterministic_algorithms(False)  # some of which wait, or take memory of their own
    return device


@pytest.fixture(scope="session")
def one_rank(device: torch.device) -> Iterator[torch.device]:
    """A job of one rank under NCCL (gloo on a CPU), with what launchers set."""
    wanted = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": "29511"}  # fmt: skip
    if device.type == "cpu":
        wanted["DS_ACCELERATOR"] = "cpu"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield device
    dist.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def deterministic(device: torch.device) -> Iterator[None]:
    """The same bits from the same numbers, where torch can."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()

"""Ranks with Megatron's twenty process groups are ended with the last test that needs them."""

from __future__ import annotations

import re

import pytest
import torch

from tests import harness

NEEDS = {
    # its DTensor cannot flatten a dimension that is cut, as nn.Linear does with a cut sequence
    r"\btp_sequence(_fsdp)?-\d": (2, 13),
    # replicate() wants a mesh of two dimensions
    r"\breplicate(_tp)?-\d": (2, 10),
}
"""Layouts in a test's name -> the first release of torch that was seen to have them."""
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the layouts that an older torch does not have."""
    for layout, first in NEEDS.items():
        if first > TORCH and re.search(layout, item.name):
            pytest.skip(f"torch {torch.__version__} has no such layout")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Each group's threads poll for as long as it lives, and slow whatever runs beside them."""
    if "megatron" in item.nodeid and (nextitem is None or "megatron" not in nextitem.nodeid):
        for (_, name), pool in list(harness.POOLS.items()):
            if name:
                pool.end()

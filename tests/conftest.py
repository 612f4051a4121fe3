"""Ranks with Megatron's twenty process groups are ended with the last test that needs them."""

from __future__ import annotations

import pytest

from tests import harness


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Each group's threads poll for as long as it lives, and slow whatever runs beside them."""
    if "megatron" in item.nodeid and (nextitem is None or "megatron" not in nextitem.nodeid):
        for (_, name), pool in list(harness.POOLS.items()):
            if name:
                pool.end()

"""Which tests run (--slow-part), how hypothesis draws, and when ranks of Megatron end."""

from __future__ import annotations

import re
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed as dist

from tests.support import harness, slow_parts

# Also in place of the profile that hypothesis loads by itself where CI is set
hypothesis.settings.register_profile(
    "spectral_dist", derandomize=True, deadline=None, max_examples=15
)
hypothesis.settings.load_profile("spectral_dist")

PART = pytest.StashKey[tuple[int, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-part",
        metavar="K/N",
        help="run only the slow tests, and of those only the K-th of N parts; a test of a whole"
        " collection is always in the same part",
    )
    parser.addoption(
        "--soak",
        action="store_true",
        help="tests/faults/test_soak.py with 200 kills, 20 signals and 20 restarts: an hour",
    )


def pytest_configure(config: pytest.Config) -> None:
    text = config.getoption("--slow-part")
    if text is None:
        return
    try:
        config.stash[PART] = slow_parts.parse(text)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    asked = config.option.markexpr  # setup.cfg's, unless there is a -m
    config.option.markexpr = "slow" if asked in ("", "not slow") else f"slow and ({asked})"


CASES = pytest.StashKey[dict[str, tuple[set[str], set[str]]]]()
"""What ``fast_cases`` of a test names, and the cases that the test has."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Make slow what ``fast_cases`` does not name."""
    fast = item.get_closest_marker("fast_cases")
    if fast is None:
        return
    case = item.callspec.id  # type: ignore[attr-defined]
    cases = item.config.stash.setdefault(CASES, {})
    cases.setdefault(item.nodeid.partition("[")[0], (set(fast.args), set()))[1].add(case)
    if case not in fast.args:
        item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a name in ``fast_cases`` that no case has: all cases would be slow in silence."""
    for test, (fast, ids) in session.config.stash.get(CASES, {}).items():
        if fast - ids and not any("::" in word for word in session.config.args):
            raise pytest.UsageError(f"{test}: fast_cases names no case: {sorted(fast - ids)}")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # files of Megatron's tests one after the other, last of all: their ranks are started once
    items.sort(key=lambda item: "megatron" in item.nodeid.partition("::")[0])
    if PART not in config.stash:
        return
    selected = slow_parts.select([item.nodeid for item in items], *config.stash[PART])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in selected])
    items[:] = [item for item in items if item.nodeid in selected]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    if PART not in config.stash:
        return None
    part, parts = config.stash[PART]
    return f"slow tests, part {part}/{parts}: {len(items) or 'there are none in it'}"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A part without tests, which the line above has said, is no failure."""
    if PART in session.config.stash and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


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


@pytest.hookimpl(wrapper=True)  # around the fixtures' ends
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """End ranks with Megatron's twenty process groups with the last test that needs them.

    Each group's threads poll for as long as it lives, and slow whatever runs beside them. And a
    test that leaves a group in this process fails, in place of those that come after it.
    """
    if "megatron" in item.nodeid and (nextitem is None or "megatron" not in nextitem.nodeid):
        for (_, name), pool in list(harness.POOLS.items()):
            if name:
                pool.end()
    yield
    if dist.is_initialized() and "one_rank" not in getattr(item, "fixturenames", ()):
        dist.destroy_process_group()
        pytest.fail("the test has left torch.distributed initialized")

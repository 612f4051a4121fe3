"""The harness tells what ranks do, and no rank that is out of step reaches another test."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support import harness

POOL = "harness"
"""of this file alone, since these tests break it"""


def identity() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def all_raise(message: str) -> None:
    raise ValueError(f"{message} {dist.get_rank()}")


def one_raises(other: str) -> None:
    """Rank 1 raises; rank 0 waits for it, returns, dies or raises after a while."""
    if dist.get_rank() == 1:
        raise ValueError("only here")
    if other == "waits":
        dist.all_reduce(torch.ones(3))
    if other == "dies":
        os._exit(7)
    if other == "is late":
        time.sleep(4)
        raise ValueError("too late")


def out_of_step() -> None:
    """Every rank raises, but rank 0 leaves a collective behind that no other rank has joined."""
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(3), async_op=True)
    raise ValueError("everywhere")


@pytest.fixture(autouse=True, scope="module")
def ranks():
    yield
    for key in [key for key in harness.POOLS if key[1] == POOL]:
        harness.POOLS[key].end()


def processes() -> list[int]:
    found = harness.run(2, identity, pool=POOL)
    assert [rank for rank, _ in found] == [0, 1]
    return [process for _, process in found]


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_ranks_stay_from_call_to_call_and_leave_no_file():
    assert processes() == processes()
    pool = harness.POOLS[2, POOL]
    assert all(log.exists() for log in pool.logs)
    pool.end()
    assert not Path(pool.folder.name).exists()


@pytest.mark.slow
def test_any_error_ends_the_ranks():
    before = processes()
    with pytest.raises(harness.RankError, match=r"(?s)rank 0.*ValueError: no 0.*rank 1.*no 1"):
        harness.run(2, all_raise, "no", pool=POOL)
    assert not any(map(alive, before))
    assert not set(processes()) & set(before)


def test_errors_on_every_rank_are_returned_and_the_ranks_stay():
    before = processes()
    texts = harness.run_expecting_errors(2, all_raise, message="rank", pool=POOL)
    assert texts == ["ValueError: rank 0", "ValueError: rank 1"]
    assert processes() == before


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("waits", r"not every rank raised within 2\.0 s.*rank 0:\nno answer.*rank 1:.*only here"),
        ("returns", r"not every rank raised.*rank 0:\nreturned None.*rank 1:.*only here"),
        ("dies", r"not every rank raised.*rank 0:\ndied with exit code 7.*rank 1:.*only here"),
        ("is late", r"not every rank raised.*rank 0:\nno answer.*rank 1:.*only here"),
    ],
)
def test_an_error_on_one_rank_alone_fails_in_time(other, said, monkeypatch):
    before = processes()
    monkeypatch.setattr(harness, "busy", lambda: 1.0)
    start = time.monotonic()
    with pytest.raises(harness.RankError, match=f"(?s){said}"):
        harness.run_expecting_errors(2, one_raises, other, within=2.0, pool=POOL)
    assert time.monotonic() - start < 15  # of a busy machine; gloo itself would wait 30 minutes
    assert not any(map(alive, before))


@pytest.mark.parametrize(("load", "answers"), [(0.0, False), (1e6, True)])
def test_a_busy_machine_gets_longer(
    load: float, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes()
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(harness, "TIMEOUT", 1.0)
    if answers:
        assert harness.run(2, time.sleep, 3, pool=POOL) == [None, None]
    else:
        with pytest.raises(harness.RankError, match="no answer before the timeout"):
            harness.run(2, time.sleep, 3, pool=POOL)


@pytest.mark.slow
def test_errors_that_leave_the_group_out_of_step_fail():
    before = processes()
    with pytest.raises(harness.RankError, match="after their errors the ranks' group is broken"):
        harness.run_expecting_errors(2, out_of_step, within=3.0, pool=POOL)
    assert not any(map(alive, before))
    assert len(processes()) == 2

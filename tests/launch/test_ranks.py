"""How processes find each other: not by what is left of those before, nor by an open port."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch

from spectral_dist.launch import ranks
from tests.launch.jobs import ROOT
from tests.support import harness

ALONE = """
import psutil
import torch.distributed as dist
from spectral_dist.launch import ranks
here = ranks.start()
assert here.gather(3) == [3] and here.total([2.0]) == [2.0]
assert here.on_first(lambda: "x") == "x"
dist.barrier(dist.new_group([0]))
for each in psutil.Process().net_connections():
    print(each.laddr.ip, each.status)
"""


def test_one_process_listens_to_nobody_else() -> None:
    pytest.importorskip("psutil")
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-c", ALONE]
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} <= {"127.0.0.1"}


def test_a_store_with_what_is_left_of_an_earlier_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks come late, in any order, and none reads what one before has written."""
    store: Any = ranks.distributed.TCPStore
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = store("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=30))
    monkeypatch.setattr(ranks, "START_TIMEOUT", 30.0)
    for _ in range(3):  # the first start, and two restarts
        stores: dict[int, Any] = {}

        def start(rank: int, stores: dict[int, Any] = stores) -> None:
            stores[rank] = ranks.fresh_store(rank, 3, "127.0.0.1", port)

        threads = [threading.Thread(target=start, args=(rank,)) for rank in (0, 2, 1)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(timeout=30)
        assert sorted(stores) == [0, 1, 2]
        assert not stores[1].check(["address"])  # of a rank that is gone
        stores[0].set("address", "here")
        assert [stores[rank].get("address") for rank in (1, 2)] == [b"here", b"here"]
    del server


def _alone_fails(which: int, error: str) -> str:
    import torch.distributed as dist

    here = ranks.Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))

    def call() -> int:
        if here.rank == which:
            raise {"os": PermissionError(13, "no", "a"), "value": ValueError("no: 'a'")}[error]
        return here.rank

    assert here.together(lambda: here.rank) == [0, 1]
    assert here.on_first(lambda: here.rank) == 0
    try:
        here.together(call)
    except ValueError as raised:
        return str(raised)
    return "nothing"


@pytest.mark.parametrize("error", ["os", "value"])
@pytest.mark.parametrize("which", [0, 1])
def test_what_one_rank_cannot_do_ends_all(which: int, error: str) -> None:
    said = harness.run(2, _alone_fails, which, error)
    assert said[0] == said[1]
    assert "no: 'a'" in said[0]

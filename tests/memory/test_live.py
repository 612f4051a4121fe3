"""The meter of live bytes counts what is known to be allocated, to the byte."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from spectral_dist.sharding import collectives
from tests.support import harness
from tests.support.memory.live import Live, distinct_bytes


def test_a_known_sequence_has_its_known_peak():
    with Live() as live:
        a = torch.zeros(100)
        assert live.bytes == 400
        b = a.to(torch.float64)
        assert live.bytes == 1200
        del a
        assert live.bytes == 800
        c = torch.cat([b, b])
        assert live.bytes == 2400
        del b, c
        assert live.bytes == 0
        torch.zeros(10)
    assert (live.bytes, live.peak) == (0, 2400)


def test_what_was_alive_before_counts_only_when_it_is_freed():
    old, kept = torch.zeros(50), torch.zeros(70)
    with Live() as live:
        kept.add_(1.0)
        old[10:].mul_(2.0)
        assert (live.bytes, live.peak) == (0, 0)
        del old
        assert (live.bytes, live.peak) == (-200, 0)
        new = kept + 1
    assert (live.bytes, live.peak) == (80, 80)
    assert len(new) == 70


def test_views_and_results_in_place_count_once():
    with Live() as live:
        a = torch.zeros(20, 5)
        views = [a.view(-1), a[3:], a.mT, a.detach(), *torch.split(a, 4), a.reshape(10, 10)]
        views += [a.as_strided((2,), (1,)), a.add_(1.0), torch.mul(a, 2.0, out=a)]
        torch._foreach_mul_(views[:3], 2.0)
        torch._foreach_copy_([views[0]], [views[3].view(-1)])
        assert live.bytes == 400
        del a
        assert live.bytes == 400  # the views hold it
        views.clear()
        assert live.bytes == 0
        wide = torch.zeros(3).expand(1000, 3)
        assert live.bytes == 12
        del wide
    assert live.peak == 400


def test_lists_tuples_out_and_sizes():
    with Live() as live:
        a, b = torch.ones(10), torch.ones(30)
        doubled = torch._foreach_mul([a, b], 2.0)
        assert live.bytes == 320
        del doubled
        q, r = torch.linalg.qr(torch.ones(6, 2))
        assert live.bytes == 160 + q.nbytes + r.nbytes
        del q, r
        out = torch.empty(0)
        torch.add(b, 1.0, out=out)  # grows it
        assert live.bytes == 280
        out.untyped_storage().resize_(0)
        out.set_()
        del out
        assert live.bytes == 160
        c = torch.tensor([1.0, 2.0])
        assert live.bytes == 168
        del a, b, c
    assert live.bytes == 0


def test_nothing_is_counted_once_the_block_is_left():
    with Live() as live:
        a = torch.zeros(10)
    b = a + 1
    del a
    assert (live.bytes, live.peak, len(b)) == (40, 40, 10)


def in_ranks() -> dict[str, Any]:
    """Bytes along collectives as the core makes them, and of steps of DTensors."""
    found: dict[str, Any] = {}
    world = dist.group.WORLD
    sent = torch.ones(16)
    with Live() as live:
        pending = collectives.all_to_all(sent, [8, 8], [8, 8], world, collectives.Meter())
        found["all_to_all"] = live.bytes
        received = pending.wait()
        gathered = collectives.all_gather(received, world, collectives.Meter()).wait()
        found["all_gather"] = live.bytes
        del pending, received, gathered
        dist.all_reduce(sent)
    found["left"] = live.bytes  # gloo's threads may hold the last one for a moment more
    whole = distribute_tensor(torch.ones(8, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    with Live() as live:
        double = whole * 2
        found["dtensor"] = live.bytes
        double.add_(1.0)
        local = double.to_local()
        local += 1
        found["in place"] = live.bytes
    del double, local
    model = nn.Linear(6, 8, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(torch.ones(2, 6)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    with Live() as live:
        optimizer.step()
    found["first step"] = live.bytes
    found["state"] = distinct_bytes(
        [
            t.to_local() if isinstance(t, DTensor) else t
            for state in optimizer.state.values()
            for t in state.values()
        ]
    )
    with Live() as live:
        optimizer.step()
    found["second step"] = live.bytes
    return found


def test_collectives_and_dtensors():
    for found in harness.run(2, in_ranks):
        assert found["all_to_all"] == 64
        assert found["all_gather"] == 64 + 128
        assert 0 <= found["left"] <= 64 + 128
        assert found["dtensor"] == found["in place"] == 64
        assert found["first step"] == found["state"] == 2 * 4 * 6 * 4 + 4
        assert found["second step"] == 0


def test_distinct_bytes_counts_each_storage_once():
    a = torch.zeros(4)
    assert distinct_bytes([a, a[1:], a.view(2, 2)]) == 16
    assert distinct_bytes([a, torch.zeros(1).expand(100), torch.empty(0)]) == 20

"""What all ranks decide together: whether their exchanges agree, and whether any raised a flag."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.layout import Cut, flat_layout
from spectral_dist.sharding.matrix import Matrix
from tests.support import harness
from tests.unit.sharding.exchanges import grid, make


def disagreement(kind):
    """The error's text on this rank; the last rank has other ideas about matrix b."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    differs = rank == ranks - 1
    names = ["a", "b", "c"]
    numel, wire = 1 << 30, torch.float32
    if differs and kind == "name":
        names[1] = "x"
    if differs and kind == "count":
        names = ["a"]
    if differs and kind == "bucket":
        numel = 12
    if differs and kind == "wire":
        wire = torch.bfloat16
    cut = Cut.even(12, ranks)
    layouts = []
    for i, name in enumerate(names):
        odd = differs and i == 1
        m, n = (4, 3) if odd and kind == "shape" else (2, 6)
        layouts.append(
            flat_layout(
                Matrix(name, (m, n), ((0, m),)),
                Cut((0, *range(11, 12 * ranks, 12), 12 * ranks)) if odd and kind == "cut" else cut,
                offset=7 if odd and kind == "offset" else 6,
            )
        )
    try:
        make(layouts, numel, wire)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("kind", ["name", "count", "shape", "cut", "offset"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_disagree_say_so_everywhere(ranks, kind, monkeypatch):
    monkeypatch.setattr(harness, "TIMEOUT", 60.0)
    texts = harness.run(ranks, disagreement, kind)
    assert len(set(texts)) == 1
    assert "entry 1 is `b " in texts[0]
    assert "rank 0 but" in texts[0]
    assert f"on rank {ranks - 1}." in texts[0]
    assert "`nothing`" in texts[0] or kind != "count"


@pytest.mark.parametrize("kind", ["bucket", "wire"])
def test_ranks_that_disagree_about_buckets_or_the_wire_say_so(kind, monkeypatch):
    """They would exchange different numbers of bytes, or wait for each other for ever."""
    monkeypatch.setattr(harness, "TIMEOUT", 60.0)
    texts = harness.run(2, disagreement, kind)
    assert "no error" not in texts
    assert len(set(texts)) == 1


def disagreement_of_a_replica():
    """2 replicas x 2 ranks; the last rank has another matrix."""
    group, copies = grid(2, 2, False)
    m, n = (4, 3) if dist.get_rank() == 3 else (2, 6)
    layouts = [flat_layout(Matrix("b", (m, n), ((0, m),)), Cut.even(6, 2))]
    try:
        make(layouts, group=group, replicas=copies)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_replicas_that_disagree_say_so_everywhere(monkeypatch):
    monkeypatch.setattr(harness, "TIMEOUT", 60.0)
    texts = harness.run(4, disagreement_of_a_replica)
    assert all("entry 0 is `b " in text for text in texts)


def agreement():
    exchange, _, meter = make([flat_layout(Matrix("a", (2, 6), ((0, 2),)), Cut.even(12, 2))])
    return len(exchange.routes), meter.calls


def test_ranks_that_agree_do_not_raise():
    assert harness.run(2, agreement) == [(1, {}), (1, {})]


def flags(values):
    meter = Meter()
    mine = torch.tensor(values[dist.get_rank()])
    return collectives.any_rank(mine, (dist.group.WORLD,), meter), meter.calls


@pytest.mark.parametrize("values", [(False, False), (True, False), (False, True)])
def test_any_rank(values):
    assert harness.run(2, flags, values) == [(any(values), {"all_reduce": 1})] * 2


def test_any_rank_alone():
    meter = Meter()
    for groups in ((), (None,), (None, None)):
        assert collectives.any_rank(torch.tensor(True), groups, meter) is True
        assert collectives.any_rank(torch.tensor(False), groups, meter) is False
    assert meter == Meter()


def flag_on(which):
    meter = Meter()
    mine = torch.tensor(dist.get_rank() == which)
    return collectives.any_rank(mine, grid(2, 2, False), meter), meter.calls


@pytest.mark.parametrize("which", [0, 1, 2, 3, None])
def test_any_rank_of_shards_and_replicas(which):
    assert harness.run(4, flag_on, which) == [(which is not None, {"all_reduce": 2})] * 4

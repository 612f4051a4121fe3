"""Graphs of polar factors, by a stand-in for torch's that records operators and runs them again."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectral_dist.polar import api, check, graphs, polar, set_graphs
from tests.reference import polar as reference


class Graph:
    """In place of torch.cuda.CUDAGraph: what ran in it runs again on the same memory."""

    captured = 0

    def __init__(self):
        self.operators, self.shared, self.replays = [], None, 0

    def pool(self):
        return self.shared

    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.operators:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(results, again, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """In place of torch.cuda.graph."""

    fails = False

    def __init__(self, graph, pool, stream, capture_error_mode):
        super().__init__()
        self.graph = graph
        graph.shared = pool or object()
        Graph.captured += 1
        if Capture.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.graph.operators.append((function, args, kwargs or {}, tree_leaves(result)))
        return result


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        pass


@pytest.fixture(autouse=True)
def on(monkeypatch):
    """Graphs on, for all matrices."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(graphs, "wanted", lambda x: graphs.enabled())
    monkeypatch.setattr(graphs, "_chosen", True)
    monkeypatch.setattr(graphs, "_calls", 0)
    monkeypatch.setattr(Capture, "fails", False)
    monkeypatch.setattr(Graph, "captured", 0)
    graphs._graphs.clear()
    yield stream
    graphs._graphs.clear()
    graphs._side_stream.cache_clear()


def eager(x, **options):
    graphs._chosen = False
    result = polar(x, **options)
    graphs._chosen = True
    return result


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (3, 8, 5), (2, 2, 4, 6)])
@pytest.mark.parametrize("method", ["jordan", "gram_polar_express", ((2, -1.5, 0.5),)])
def test_replays_are_the_bits_of_eager(shape, method):
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for seed in range(3):
            x = reference.gaussian(*shape, seed=seed).to(dtype)
            results.append((polar(x, method=method), eager(x, method=method)))
            x.zero_()
        # compared at the end: a later replay writes where an earlier one has read
        for replayed, expected in results:
            assert torch.equal(replayed, expected)
            assert replayed.dtype == dtype
    assert Graph.captured == 2


def test_strides_nan_and_zero_are_as_in_eager():
    x = reference.gaussian(20, 12).float()
    for given in (x, x.mT.contiguous().mT, torch.zeros_like(x), x * float("nan"), x):
        torch.testing.assert_close(polar(given), eager(given), rtol=0, atol=0, equal_nan=True)
    assert Graph.captured == 1


def test_what_has_a_graph_of_its_own(on, monkeypatch):
    x = reference.gaussian(6, 10).float()
    kinds = [
        lambda: polar(x),
        lambda: polar(x[:5]),
        lambda: polar(x.mT),
        lambda: polar(x.double()),
        lambda: polar(x, compute_dtype="bfloat16"),
        lambda: polar(x, steps=4),
        lambda: polar(x, method="gram_jordan"),
        lambda: polar(x, method="quintic"),
    ]
    for kind in (*kinds, *kinds):
        kind()
    assert Graph.captured == len(kinds)
    # the same polynomials, as a list
    polar(x, method=[[3.4445, -4.7750, 2.0315]] * 5)
    assert Graph.captured == len(kinds)
    torch.use_deterministic_algorithms(True)
    polar(x)
    torch.use_deterministic_algorithms(False)
    assert Graph.captured == len(kinds) + 1
    other = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: other)
    polar(x)
    assert Graph.captured == len(kinds) + 2
    pools = {stream: set() for stream in (on, other)}
    for (stream, _), entry in graphs._graphs.items():
        pools[stream].add(entry.graph.pool())
    assert {len(pool) for pool in pools.values()} == {1}  # one work space for each stream
    assert not pools[on] & pools[other]


@pytest.mark.parametrize("method", ["svd", "eigh", "qdwh", "zolo"])
def test_what_waits_has_no_graph(method):
    polar(reference.gaussian(6, 10), method=method)
    assert not graphs._graphs


def test_inference_mode_leaves_a_graph_that_others_can_use():
    x = reference.gaussian(6, 10)
    with torch.inference_mode():
        polar(x)
    assert torch.equal(polar(2 * x), eager(2 * x))
    assert Graph.captured == 1


def test_the_number_of_graphs_is_bounded_and_the_oldest_give_way(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 3)
    monkeypatch.setattr(graphs, "PATIENCE", 10)
    xs = [reference.gaussian(2, 3 + i) for i in range(5)]
    # in turns: none is captured again and again, what has no room is computed without
    for _ in range(4):
        for x in xs:
            assert torch.equal(polar(x), eager(x))
    assert Graph.captured == len(graphs._graphs) == 3
    for _ in range(7):  # the first three are not used any more
        for x in xs[3:]:
            assert torch.equal(polar(x), eager(x))
    assert len(graphs._graphs) == 3
    assert Graph.captured == 5


def test_the_graph_that_gives_way_is_the_one_not_used_for_longest(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    monkeypatch.setattr(graphs, "PATIENCE", 3)
    first, second, third = (reference.gaussian(2, 3 + i) for i in range(3))
    for x in (first, second, first, first, first, third):
        polar(x)
    assert Graph.captured == 3
    polar(first)
    assert Graph.captured == 3
    polar(second)  # no room until the others are as old
    assert Graph.captured == 3


def test_what_cannot_be_captured_is_computed_and_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(Capture, "fails", True)
    xs = [reference.gaussian(4, n) for n in (5, 6)]
    with caplog.at_level(logging.WARNING, "spectral_dist"):
        for x in (*xs, *xs):
            assert torch.equal(polar(x), eager(x))
    (record,) = caplog.records
    assert "1x4x5, which are computed without: RuntimeError: operation not" in record.getMessage()
    assert Graph.captured == 2  # each is tried once


def test_off_frees_them_and_is_the_default(monkeypatch):
    x = reference.gaussian(4, 5)
    polar(x)
    assert len(graphs._graphs) == 1
    set_graphs(False)
    assert not graphs._graphs
    polar(x)
    assert not graphs._graphs
    monkeypatch.setattr(graphs, "_chosen", None)
    for text, is_on in ((None, False), ("", False), ("0", False), ("1", True)):
        if text is not None:
            monkeypatch.setenv(graphs.VARIABLE, text)
        assert graphs.enabled() is is_on
    set_graphs(False)
    assert not graphs.enabled()
    set_graphs(True)
    assert graphs.enabled()


def test_wrong_values(monkeypatch):
    for wrong in ("on", 1, None):
        with pytest.raises(ValueError, match=r"set_graphs: .* is unknown; write True or False"):
            set_graphs(wrong)
    monkeypatch.setattr(graphs, "_chosen", None)
    monkeypatch.setenv(graphs.VARIABLE, "yes")
    for call in (lambda: polar(torch.eye(3)), lambda: check("jordan")):
        with pytest.raises(ValueError, match="POLAR_GRAPHS: 'yes' is unknown; write 1 or 0"):
            call()


def test_cpus_have_none(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "_chosen", True)
    polar(torch.eye(3))
    assert not graphs._graphs


def test_filled_up_sides_are_within_the_graph(monkeypatch):
    monkeypatch.setattr(api, "_multiple", lambda x, dtype: 8)
    for seed in range(2):
        x = reference.gaussian(1, 5, 11, seed=seed).bfloat16()
        assert torch.equal(polar(x), eager(x))
    assert Graph.captured == 1

"""CUDA graphs of polar factors: captured at the first batch of a kind, replayed at all others."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist._log import logger

VARIABLE = "SPECTRAL_DIST_POLAR_GRAPHS"
MOST = 64
"""Kinds of batches that have graphs at a time."""
PATIENCE = 8 * MOST
"""A graph gives way to another once it was not used for so many calls.

Not sooner: of more kinds than ``MOST`` that take turns, all would be captured again at each turn.
"""

_chosen: bool | None = None


@dataclass
class _Graph:
    """A captured graph.

    Attributes:
        graph: what is replayed; None if it could not be captured.
        given, result: where it reads and writes.
        last: the number of the call that used it last.
    """

    graph: torch.cuda.CUDAGraph | None
    given: Tensor | None
    result: Tensor | None
    last: int = 0


_Kind = tuple[torch.cuda.Stream, Hashable]
_graphs: OrderedDict[_Kind, _Graph] = OrderedDict()
"""By stream and kind, the least recently used first."""
_lock = threading.Lock()
_calls = 0


@explained
def set_graphs(on: bool) -> None:
    """Choose whether polar factors on GPUs are CUDA graphs in this process from now on.

    A graph costs one launch, in place of about 20: worth having for many kinds of small batches.
    The environment variable SPECTRAL_DIST_POLAR_GRAPHS=1 turns them on until this is called; by
    default they are off. Each kind (batch, shape, dtypes, method, steps, device) is captured at its
    first call, which waits for the device; up to ``MOST`` of them are held, and each holds memory
    for its input and its result; they share their work space. Newton-Schulz alone is captured
    (``gram_*`` and schedules of one's own, too): decompositions and what converges wait for the
    device or choose by values. The bits are those without graphs.

    Where capturing fails, the factor is computed without a graph, and the first time is logged.

    Args:
        on: False also frees the graphs that there are.

    Raises:
        ValueError: ``on`` is neither True nor False.
    """
    global _chosen
    if not isinstance(on, bool):
        raise ValueError(f"set_graphs: {on!r} is unknown; write True or False")
    _chosen = on
    if not on:
        with _lock:
            _graphs.clear()


def enabled() -> bool:
    """Return whether the user wants graphs.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    if _chosen is not None:
        return _chosen
    text = os.environ.get(VARIABLE) or "0"
    if text not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: {text!r} is unknown; write 1 or 0")
    return text == "1"


def wanted(x: Tensor) -> bool:
    """Return whether a batch is to be computed by a graph: not within one that the user captures.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    if not enabled() or not x.is_cuda or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def replayed(compute: Callable[[Tensor], Tensor], x: Tensor, options: Hashable) -> Tensor:
    """Return ``compute(x)`` by a graph, in fresh memory.

    Args:
        compute: a function of x alone that neither waits nor chooses by the values.
        x: a batch on a GPU.
        options: what ``compute`` depends on besides x.
    """
    global _calls
    stream = torch.cuda.current_stream(x.device)
    # on one stream copies, replays and new uses of freed memory come one after another
    key = (stream, (x.shape, x.dtype, options, _modes()))
    with _lock:
        _calls += 1
        entry = _graphs.get(key)
        if entry is None and _has_room():
            entry = _graphs[key] = _captured(compute, x, stream)
        if entry is not None:
            entry.last = _calls
            _graphs.move_to_end(key)
            if entry.graph is not None and entry.given is not None and entry.result is not None:
                entry.given.copy_(x)
                entry.graph.replay()
                return entry.result.clone()
    return compute(x)


def _modes() -> tuple[Hashable, ...]:
    """Return torch's settings that choose kernels: a graph keeps those of its capture."""
    matmul = torch.backends.cuda.matmul
    return (
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch.are_deterministic_algorithms_enabled(),
    )


def _has_room() -> bool:
    """Return whether there may be one more graph; free the one that was not used for longest."""
    if len(_graphs) < MOST:
        return True
    key, oldest = next(iter(_graphs.items()))
    if _calls - oldest.last <= PATIENCE:
        return False
    del _graphs[key]
    return True


def _captured(compute: Callable[[Tensor], Tensor], x: Tensor, stream: torch.cuda.Stream) -> _Graph:
    """Return a graph of ``compute``, or none if it cannot be captured: the first time is logged."""
    # their work space is one: it means nothing before and after a replay, and those on one stream
    # come one after another
    live = (entry.graph for key, entry in _graphs.items() if key[0] == stream and entry.graph)
    pool = next((graph.pool() for graph in live), None)
    side = _side_stream(x.device)
    try:
        with torch.inference_mode(False), torch.no_grad():
            given = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                compute(given)  # makes handles and work spaces of libraries, compiles kernels
            stream.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile: one that pins a data loader's batches does
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                result = compute(given)
        return _Graph(graph, given, result)
    except Exception as error:  # computed without a graph, what is wrong with x is raised again
        if all(entry.graph for entry in _graphs.values()):
            logger.warning(
                "no CUDA graph of polar factors of %s, which are computed without: %s: %s; other"
                " kinds that fail are not logged",
                "x".join(map(str, x.shape)), type(error).__name__, error,
            )  # fmt: skip
        return _Graph(None, None, None)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which graphs of a device are captured."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

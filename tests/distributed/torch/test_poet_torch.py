"""POET under every layout of plain torch that has one: one process's numbers, and what travels."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

import spectral_dist
from spectral_dist import poet
from tests.distributed.torch import layouts, poet_torch
from tests.support import harness
from tests.support.quiet import quiet

LAYOUTS = [
    ("ddp", 2, 3), ("fsdp", 2, 3),
    ("ddp", 1, 1), ("ddp", 3, 2), ("ddp", 4, 3), ("fsdp", 3, 2), ("fsdp", 4, 1), ("fsdp", 4, 3),
    ("hsdp", 4, 1), ("hsdp", 4, 3), ("replicate", 2, 3), ("fsdp_columns", 2, 3),
]  # fmt: skip
"""Layout, ranks, micro-batches of a step."""
CASES = [
    pytest.param(*layout, setting, marks=[pytest.mark.slow] * (number > 1 or setting != "fast"))
    for number, layout in enumerate(LAYOUTS)
    for setting in poet_torch.SETTINGS
]


@functools.cache
def alone(setting: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return poet_torch.train("one", setting, dtype=dtype)


@pytest.mark.parametrize(("layout", "world", "accumulation", "setting"), CASES)
def test_equals_one_process(layout: str, world: int, accumulation: int, setting: str) -> None:
    """Skews of fewer numbers than ranks, and one that gets no gradient: two merges.

    In float64: Adam divides by gradients that are nearly zero, and so magnifies float32's rounding.
    """
    wanted = alone(setting)
    results = harness.run(world, poet_torch.train, layout, setting, accumulation)
    losses = [sum(each) / world for each in zip(*(r["losses"] for r in results), strict=True)]
    assert losses == pytest.approx(wanted["losses"], abs=1e-11, rel=0)
    for result in results:
        assert result["merges"] == wanted["merges"] == 2
        assert poet_torch.largest(result["parameters"], wanted["parameters"]) < 1e-10
        assert poet_torch.largest(result["exported"], wanted["exported"]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world"), [("ddp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_in_float32(layout: str, world: int) -> None:
    wanted = alone("fast", torch.float32)
    for result in harness.run(world, poet_torch.train, layout, "fast", 3, dtype=torch.float32):
        assert poet_torch.largest(result["parameters"], wanted["parameters"]) < 1e-4
        assert poet_torch.largest(result["exported"], wanted["exported"]) < 1e-4


# -- what travels


def reduced(layout: str) -> tuple[int, int, int, int]:
    """Numbers given to gradient reductions in a step, trainable, frozen; kept gradients of W.

    FSDP2 pads what trains to a multiple of the ranks.
    """
    placed, _ = poet_torch.start(layout, odd=False)
    sent = []
    if layout == "ddp":

        def hook(state: object, bucket: Any) -> Any:
            sent.append(bucket.buffer().numel())
            future: Any = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        hook.__annotations__ = {"bucket": dist.GradBucket,
                                "return": torch.futures.Future[torch.Tensor]}  # fmt: skip
        placed.model.register_comm_hook(None, hook)
    plain = dist.reduce_scatter_single

    def counting(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(input.numel())
        return plain(output, input, *args, **kwargs)

    dist.reduce_scatter_single = counting
    try:
        placed.backward(0, 3)
    finally:
        dist.reduce_scatter_single = plain
    even = 2 if layout == "fsdp" else 1
    trains = 0
    for p in placed.named.values():
        trains += p.requires_grad * -(-p.shape[0] // even) * even * math.prod(p.shape[1:])
    frozen = [p for p in placed.named.values() if not p.requires_grad]
    kept = sum(p.grad is not None for p in frozen)
    return sum(sent), trains, sum(p.numel() for p in frozen), kept


@pytest.mark.parametrize(
    "layout", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)]
)  # fmt: skip
def test_only_what_trains_is_reduced(layout: str) -> None:
    """Once in a step of three micro-batches."""
    for sent, trains, frozen, kept in harness.run(2, reduced, layout):
        assert kept == 0
        assert frozen > 5000
        assert sent == trains


def changed_between(reshard: bool) -> list[float]:
    """Differences to the whole model's losses, after each change of a shard between two passes."""
    placed, _ = poet_torch.start("fsdp")
    for module in placed.model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.set_reshard_after_forward(reshard)
    whole, _ = poet_torch.start("one")
    whole.data_rank, whole.data_ranks = placed.data_rank, placed.data_ranks
    name = "layers.0.up.skew_in"
    errors = []
    for number in range(6):
        sharded: Any = placed.named[name]
        plain = whole.named[name]
        change = 0.1 * torch.arange(1, 1 + plain.numel()).double().add(number).sin()
        with torch.no_grad():
            shards = distribute_tensor(change, sharded.device_mesh, sharded.placements)
            if number % 2:
                sharded.add_(shards)
            else:
                sharded.to_local().data.add_(shards.to_local())
            plain.add_(change)
        (loss,), (expected,) = placed.backward(0), whole.backward(0)
        errors.append(abs(loss - expected))
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("reshard", [True, False])
def test_changes_of_a_shard_are_seen_by_the_next_pass(reshard: bool) -> None:
    """FSDP2 gathers changed parameters at the old address without a new version."""
    for errors in harness.run(2, changed_between, reshard):
        assert max(errors) < 1e-12


# -- dtypes


def mixed(frozen: bool, reduce: torch.dtype | None) -> dict[str, Any]:
    """In bfloat16 by FSDP2's policy; ``frozen``: W is kept in it as well."""
    model = poet_torch.model(dtype=torch.float32, odd=False)
    for module in model.modules():
        if frozen and isinstance(module, poet.PoetLayer):
            module.weight.data = module.weight.data.bfloat16()
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce)
    layouts.shard(model, layouts.mesh((2,), ("dp",)), mp_policy=policy)
    placed = layouts.Laid(model, dist.get_rank(), 2)
    with quiet():
        optimizer = poet_torch.optimizer_of(placed)
    losses = poet_torch.steps(placed, optimizer, 0, poet_torch.STEPS)
    dtypes = {n: p.dtype for n, p in placed.named.items()}
    states = {v.dtype for state in optimizer.state.values() for v in state.values()}
    return {"losses": losses, "dtypes": dtypes, "states": states,
            "merges": poet_torch.merges(optimizer)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reduce", [None, torch.float32])
def test_mixed_precision(frozen: bool, reduce: torch.dtype | None) -> None:
    """Skews and moments stay float32; a W in bfloat16 may lie beside them."""
    wanted = poet_torch.train("one", "fast", dtype=torch.float32, odd=False)
    results = harness.run(2, mixed, frozen, reduce)
    losses = [sum(each) / 2 for each in zip(*(r["losses"] for r in results), strict=True)]
    assert losses == pytest.approx(wanted["losses"], abs=0.05)
    for result in results:
        assert result["merges"] == 2
        assert result["states"] == {torch.float32}
        for name, dtype in result["dtypes"].items():
            rotated = name.startswith("layers") and name.endswith("weight") and "norm" not in name
            assert dtype == (torch.bfloat16 if frozen and rotated else torch.float32)


# -- what is refused


def refused(what: str) -> str:
    mesh = layouts.mesh((2,), ("dp",))
    plain = layouts.conditioned(odd=False)
    try:
        with quiet():
            REFUSED[what][0](plain, mesh)
    except ValueError as error:
        return str(error)
    return "nothing"


def _convert(model: nn.Module) -> nn.Module:
    blocks = {name: size for name, size in poet_torch.BLOCKS.items() if name != "unused"}
    return poet.convert(model, block=8, blocks=blocks)


def each_linear(model: nn.Module, mesh: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)  # which makes it a class of its own
    _convert(model)


def inside_ddp(model: nn.Module, mesh: Any) -> None:
    placed = layouts.ddp(model)
    _convert(model)
    spectral_dist.param_groups(placed.model)


def in_half(model: nn.Module, mesh: Any) -> None:
    layouts.shard(_convert(model.bfloat16()), mesh)
    spectral_dist.param_groups(model)


def sharded_late(model: nn.Module, mesh: Any) -> None:
    optimizer = spectral_dist.POET(spectral_dist.param_groups(_convert(model)))
    placed = layouts.fsdp(model)
    placed.backward(0)
    optimizer.step()


def not_resharded(model: nn.Module, mesh: Any) -> None:
    placed = layouts.fsdp(_convert(model))
    optimizer = spectral_dist.POET(spectral_dist.param_groups(model))
    placed.backward(0)
    model.set_reshard_after_forward(False)
    with torch.no_grad():
        model(layouts.tokens(0))
    optimizer.step()


def by_tensors(model: nn.Module, mesh: Any) -> None:
    placed = layouts.tp(_convert(model))
    placed.backward(0)


REFUSED: dict[str, tuple[Any, str]] = {
    "sharded": (lambda m, mesh: _convert(layouts.fsdp(m).model), "is sharded already; convert"),
    "each linear": (each_linear, "is sharded already; convert the model first"),
    "wrapped": (lambda m, mesh: _convert(layouts.ddp(m).model), "before it is wrapped"),
    "twice": (lambda m, mesh: _convert(_convert(m)), "converted already"),
    "inside of DDP": (inside_ddp, "is not reduced by DistributedDataParallel"),
    "all in bfloat16": (in_half, "mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16"),
    "sharded after param_groups": (sharded_late, "sharded after param_groups(model)"),
    "not resharded": (not_resharded, "call model.reshard() before optimizer.step()"),
    "tensor parallel": (by_tensors, "POET knows no tensor parallelism by DTensors"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    for said in harness.run(2, refused, what):
        assert REFUSED[what][1] in said


# -- export


def exported(layout: str) -> dict[str, torch.Tensor]:
    """With every block in a wrapper that has its name in that of parameters, but not in keys."""
    model = poet_torch.model()
    for i, block in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(block)
    placed = layouts.LAYOUTS[layout][0](model)
    with quiet():
        optimizer = poet_torch.optimizer_of(placed)
    poet_torch.steps(placed, optimizer, 0, 4)
    return poet.export(placed.model)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_export_through_checkpoint_wrappers(layout: str) -> None:
    wanted = poet_torch.train("one", "fast", count=4)["exported"]
    for found in harness.run(2, exported, layout):
        assert poet_torch.largest(found, wanted) < 1e-10

"""One rank under NCCL: what a framework has wrapped steps as the plain model on the device."""

from __future__ import annotations

import contextlib
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spectral_dist.polar import polar, rows_of
from spectral_dist.sharding.boxes import even_slabs
from spectral_dist.sharding.collectives import Meter
from spectral_dist.sharding.slabs import SlabBatch
from spectral_dist.sharding.split import SplitReduction
from tests.gpu import support
from tests.support import models

pytestmark = pytest.mark.gpu
BOUND = 1e-3
"""Bound of a parameter's change: a framework may add up gradients in another order, and
five steps of jordan make rounding 485 times as large."""
ZERO_OPTIONS = {"lr": 0.02, "scalar_lr": 0.005, **support.FLOAT}


def plainly(name, device):
    """Parameters before and after three steps without a framework."""
    model, optimizer = support.build(name, device, **support.FLOAT)
    before = support.values(model)
    support.train(model, optimizer, device)
    return before, support.values(model)


def whole(model):
    """All parameters, gathered, by their names without a wrapper's prefix."""
    return {
        name.removeprefix("module."): (
            p.full_tensor() if isinstance(p, DTensor) else p
        ).detach().clone()
        for name, p in model.named_parameters()
    }  # fmt: skip


@pytest.mark.parametrize("name", support.OPTIONS)
def test_distributed_data_parallel(name, one_rank):
    model, _ = support.build(name, one_rank)
    wrapped = DistributedDataParallel(model)
    optimizer = support.optimizer_of(name, wrapped, **support.FLOAT)
    support.train(wrapped, optimizer, one_rank)
    before, wanted = plainly(name, one_rank)
    assert support.worst(whole(wrapped), wanted, before) <= BOUND


@pytest.mark.parametrize("name", support.OPTIONS)
def test_fsdp2(name, one_rank):
    model, _ = support.build(name, one_rank)
    mesh = init_device_mesh(one_rank.type, (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = support.optimizer_of(name, model, **support.FLOAT)
    support.train(model, optimizer, one_rank)
    before, wanted = plainly(name, one_rank)
    assert support.worst(whole(model), wanted, before) <= BOUND


def zero_engine(name, stage):
    """DeepSpeed's engine over the model, with our optimizer named in its JSON."""
    import deepspeed

    from spectral_dist.integrations.deepspeed import _compat

    _compat.without_compiling()
    options = {**ZERO_OPTIONS, **support.OPTIONS[name]}
    if name in ("SUMO", "POET"):
        options.pop("polar_dtype")
    if name == "POET":
        options.pop("wire_dtype")
        options |= {"block": support.BLOCK, "blocks": support.BLOCKS}
    return deepspeed.initialize(
        model=support.plain(),
        config={
            "train_batch_size": 12, "train_micro_batch_size_per_gpu": 12,
            "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0,
            "optimizer": {"type": f"Spectral{name}", "params": options},
        },
    )[0]  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["Muon", "SUMO", "POET"])
def test_deepspeed_zero(name, stage, one_rank):
    support.need("deepspeed")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import deepspeed

        engine = zero_engine(name, stage)
        for step in range(3):
            engine.backward(engine(models.tokens(step).to(one_rank)))
            engine.step()
        named = dict(engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters(list(named.values())):
            found = {key: p.detach().clone() for key, p in named.items()}
        engine.destroy()
    before, wanted = plainly(name, one_rank)
    assert support.worst(found, wanted, before) <= BOUND


@pytest.mark.parametrize(
    ("dtype", "bound"), [("bfloat16", 0.05), ("float16", 0.01), ("float32", 1e-5)]
)
@pytest.mark.parametrize("shape", [(64, 200), (200, 64), (96, 96)])
def test_a_team_of_one_rank_computes_the_polar_factor(shape, dtype, bound, one_rank):
    """Strategy split's products and collectives on this device: its Grams come out in float32."""
    cut = even_slabs(shape, 1, range(1))
    batch = SlabBatch((0, 1), (0, 0), shape, cut, cut.box(0, shape), range(1))
    reduction = SplitReduction(batch, dist.group.WORLD, Meter())
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5)).to(one_rank)
    steps, safety = rows_of("jordan")
    found = reduction.newton_schulz(x, steps, safety, getattr(torch, dtype))
    wanted = polar(x.double().cpu(), method="jordan", compute_dtype="float64").to(one_rank)
    assert found.dtype == x.dtype
    assert float((found - wanted).norm() / wanted.norm()) <= bound

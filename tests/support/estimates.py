"""What a real run of an engine keeps, sends and computes on this rank; called through the harness.

A small Llama (or Mixtral, or DeepSeek-V3) takes three steps; the third is measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import spectral_dist
from spectral_dist import poet
from spectral_dist.core.units import MatrixUnit
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING
from tests.support.memory.live import Live

STEPS = 3
SUB_GROUP = 2000
"""Elements, so that ZeRO-3 has many sub-groups."""
VOCABULARY = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    # odd sizes, so that every layout has uneven parts or padding
    "llama": {**COMMON, "model_type": "llama", "hidden_size": 36, "head_dim": 10,
              "intermediate_size": 87},
    "even": {**COMMON, "model_type": "llama", "hidden_size": 32, "head_dim": 8,
             "intermediate_size": 88},
    # one matrix has most of the work
    "shallow": {**COMMON, "model_type": "llama", "hidden_size": 36, "head_dim": 30,
                "intermediate_size": 9, "num_key_value_heads": 1, "num_hidden_layers": 1},
    "mixtral": {**COMMON, "model_type": "mixtral", "hidden_size": 40, "head_dim": 10,
                "intermediate_size": 28, "num_local_experts": 3, "num_experts_per_tok": 2},
}  # fmt: skip


def config_file(name: str, folder: Path) -> Path:
    """Write the config of a model."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(MODELS[name]), encoding="utf-8")
    return path


def build(name: str) -> nn.Module:
    """Build a model with weights, the same on every rank."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]))
    return model


def convert(model: nn.Module) -> nn.Module:
    """Convert a model for POET."""
    return poet.convert(model, block=8)


@contextlib.contextmanager
def _training(
    model: nn.Module,
    engine: str,
    optimizer: str,
    options: Mapping[str, Any],
    tp: int,
    nodes: int,
    dtype: str,
) -> Iterator[tuple[Any, Callable[[Tensor], None]]]:
    """Yield the optimizer, and what takes a training step."""
    title = registry.find(optimizer).title
    routing = {name: options[name] for name in ROUTING if name in options}
    if engine.startswith("zero"):
        from tests.distributed.deepspeed.engine import engine_for

        configuration = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(engine[-1]), "reduce_bucket_size": 10**6,
                                  "sub_group_size": SUB_GROUP},
            "optimizer": {"type": f"Spectral{title}", "params": {"lr": 1e-3, **options}},
            "bf16": {"enabled": dtype == "bfloat16"},
        }  # fmt: skip
        running = engine_for(configuration, model=model)

        def iterate(tokens: Tensor) -> None:
            running.backward(running(input_ids=tokens, labels=tokens).loss)
            running.step()

        yield running.basic_optimizer, iterate
        running.destroy()
        return
    wrapped = _wrapped(model.to(getattr(torch, dtype)), engine, tp, nodes)
    others = {name: value for name, value in options.items() if name not in routing}
    groups = spectral_dist.param_groups(wrapped, **routing)
    made = getattr(spectral_dist, title)(groups, lr=1e-3, **others)

    def step(tokens: Tensor) -> None:
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        made.step()
        made.zero_grad()

    yield made, step


def _wrapped(model: nn.Module, engine: str, tp: int, nodes: int) -> nn.Module:
    """Wrap a model for one of torch's engines."""
    world = dist.get_world_size()
    if engine == "ddp":
        return DistributedDataParallel(model)
    names = ("tp",) * (tp > 1)
    sizes = (tp,) * (tp > 1)
    data = ("replicate", "shard") if engine == "hsdp" else ("shard",)
    data_sizes = (nodes, world // tp // nodes) if engine == "hsdp" else (world // tp,)
    mesh = init_device_mesh("cpu", (*data_sizes, *sizes), mesh_dim_names=(*data, *names))
    layers: Any = model.model.layers  # type: ignore[union-attr]
    if tp > 1:
        column = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
                  "mlp.up_proj")  # fmt: skip
        styles: dict[str, Any] = {name: ColwiseParallel() for name in column}
        styles |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        for layer in layers:
            parallelize_module(layer, mesh["tp"], styles)
    data_mesh = mesh[data] if len(data) > 1 else mesh[data[0]]
    for layer in layers:
        fully_shard(layer, mesh=data_mesh)
    sharded: nn.Module = fully_shard(model, mesh=data_mesh)
    return sharded


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of all that the optimizer keeps on this rank."""
    states = [s for s in optimizer.state.values() if isinstance(s, dict)]
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    kept = sum(_local(t).nbytes for t in tensors)
    units = [u for u in optimizer.all_units if isinstance(u, MatrixUnit) and u.state is not None]
    return kept + sum(part.values.nbytes for unit in units for part in unit.state.parts())


def measure(
    model: str,
    engine: str,
    cases: Sequence[tuple[str, Mapping[str, Any]]],
    tp: int = 1,
    nodes: int = 1,
    dtype: str = "float32",
) -> list[dict[str, int]]:
    """Return what this rank has in each case (optimizer, options)."""
    return [_measure(model, engine, *case, tp, nodes, dtype) for case in cases]


def _measure(
    name: str,
    engine: str,
    optimizer: str,
    options: Mapping[str, Any],
    tp: int,
    nodes: int,
    dtype: str,
) -> dict[str, int]:
    model = build(name)
    if optimizer == "poet" and not engine.startswith("zero"):
        model = convert(model)
    given = {**options, **({"block": 8} if optimizer == "poet" and engine[0] == "z" else {})}
    generator = torch.Generator().manual_seed(dist.get_rank() // tp)
    sent = calls = 0
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        with _training(model, engine, optimizer, given, tp, nodes, dtype) as (made, step):
            peak = Watch(made)
            for _ in range(STEPS):
                sent, calls = made.comm_bytes, getattr(made, "polar_calls", 0)
                peak.bytes = 0
                step(torch.randint(VOCABULARY, (1, 8), generator=generator))
            return {
                "optimizer_state": state_bytes(made),
                "moved": made.comm_bytes - sent,
                "polar_calls": getattr(made, "polar_calls", 0) - calls,
                "temporary": peak.bytes,
                "gradients": peak.gradients,
                "team": max(teams(made), default=1),
                **_weights(model, made, engine),
            }


def teams(optimizer: Any) -> Iterator[int]:
    """Yield how many ranks work on each bucket of matrices under strategy 'split'."""
    for unit in optimizer.all_units:
        for bucket in unit.plan.buckets if isinstance(unit, MatrixUnit) else ():
            yield bucket.team


class Watch:
    """Takes the place of an optimizer's ``step``, and measures it.

    Attributes:
        bytes: the peak of live bytes in the steps since it was set to 0.
        gradients: the bytes of gradients that the last step got.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._step = optimizer, optimizer.step
        self.bytes = self.gradients = 0
        optimizer.step = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        groups = self._optimizer.param_groups
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        self.gradients = sum(_local(grad).nbytes for grad in grads)
        with Live() as live:
            result = self._step(*args, **kwargs)
        self.bytes = max(self.bytes, live.peak)
        return result


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _weights(model: nn.Module, optimizer: Any, engine: str) -> dict[str, int]:
    """Return the bytes of the model's parameters, and of DeepSpeed's copies of them."""
    if not engine.startswith("zero"):
        return {"parameters": sum(_local(p).nbytes for p in model.parameters())}
    wrapper = optimizer.placement.engine.optimizer
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    if engine == "zero3":
        partitions = (p.ds_tensor.nbytes for p in model.parameters())
        flats = wrapper.fp32_partitioned_groups_flat
        return {"parameters": sum(partitions), "master_weights": sum(f.nbytes for f in flats)}
    if engine == "zero0":
        whole = sum(p.nbytes for p in model.parameters())
        copies = 0 if wrapper is optimizer else sum(
            p.nbytes for group in optimizer.param_groups for p in group["params"]
        )  # fmt: skip
        return {"parameters": whole, "master_weights": copies}
    copies = sum(flat.nbytes for flat in wrapper.single_partition_of_fp32_groups)
    flats = sum(flat.nbytes for flat in wrapper.bit16_groups_flat)
    return {"parameters": flats + frozen, "master_weights": copies}

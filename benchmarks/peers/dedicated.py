"""DMuon's own layout: each matrix lies whole at its owner, which broadcasts it where it is used."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from typing_extensions import override

from benchmarks.peers.layouts import LR, Wrapped
from tests.support.megatron_cpu import Stream


def streams_on_cpu() -> None:
    """Give what DMuon asks of CUDA on a CPU: streams and events that have all passed.

    And gloo's collectives that are to be one of NCCL's are called one by one.
    """
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = cuda.current_stream = Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_device = lambda: 0
    distributed: Any = dist
    distributed._coalescing_manager = lambda **options: contextlib.nullcontext()


class Dedicated(Wrapped):
    """A model whose matrices have owners, and whose other parameters FSDP2 shards."""

    @override
    def wrap(self, model: nn.Module) -> nn.Module:
        streams_on_cpu()
        dmuon = importlib.import_module("dmuon")
        dmuon.dedicate_params(model, self.mesh, predicate=lambda name, p: name in self.names)
        for layer in model.layers:
            fully_shard(layer, mesh=self.mesh)
        return fully_shard(model, mesh=self.mesh)

    @override
    def whole(self) -> dict[str, Tensor]:
        get = importlib.import_module("dmuon").get_model_state_dict
        found = get(self.model, rank0_only=False)
        return {name: found[name].clone() for name in self.names}


def build(wrapped: Wrapped) -> Any:
    """Return DMuon's optimizer, with the direct form of Newton-Schulz."""
    muon = importlib.import_module("dmuon").Muon
    return muon(wrapped.model, lr=LR, adamw_lr=LR, ns_backend="direct")

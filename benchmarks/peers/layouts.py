"""Torch's layouts of the models: sharded by FSDP2, or replicated under DistributedDataParallel."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.models import Form, build, matrix_names

LR = 1e-2


class Wrapped:
    """A model in its layout.

    Attributes:
        mesh: of all ranks.
    """

    def __init__(self, form: Form, layout: str) -> None:
        model = build(form)
        self.layout, self.names = layout, matrix_names(model)
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.model = self.wrap(model)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model, sharded or replicated."""
        if self.layout == "ddp":
            return DistributedDataParallel(model)
        for layer in model.layers:
            fully_shard(layer, mesh=self.mesh)
        return fully_shard(model, mesh=self.mesh)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters by their names in the unwrapped model."""
        return {n.removeprefix("module."): p for n, p in self.model.named_parameters()}

    @property
    def matrices(self) -> list[nn.Parameter]:
        """Return what is orthogonalized."""
        return [p for name, p in self.parameters().items() if name in self.names]

    @property
    def rest(self) -> list[nn.Parameter]:
        """Return all else."""
        return [p for name, p in self.parameters().items() if name not in self.names]

    def whole(self) -> dict[str, Tensor]:
        """Return copies of all matrices, unsharded."""
        found = {name: p.detach() for name, p in self.parameters().items() if name in self.names}
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in found.items()}
        return {name: p.clone() for name, p in whole.items()}

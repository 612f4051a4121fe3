"""The job that an estimate is for: engine, numbers of ranks, dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spectral_dist._errors import suggest

ENGINES = {
    "ddp": "DistributedDataParallel",
    "fsdp": "FSDP2, each parameter cut over all data-parallel ranks; with tp over both",
    "hsdp": "FSDP2 within a node, copies between nodes",
    "zero0": "DeepSpeed, stage 0",
    "zero1": "DeepSpeed, stage 1",
    "zero2": "DeepSpeed, stage 2",
    "zero3": "DeepSpeed, stage 3",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUB_GROUP = 10**9
"""DeepSpeed's default of zero_optimization.sub_group_size."""


@dataclass(frozen=True)
class Job:
    """An engine on a number of ranks, none of which runs.

    Attributes:
        engine: one of ``ENGINES``.
        replicate: ranks that hold copies: HSDP's nodes, DDP's and ZeRO-0's ranks.
        shard: ranks that cut parameters among them, without tensor parallelism.
        tensor: tensor-parallel ranks.
        dtype: of the model's parameters.
        device: where matrices are computed, which decides the dtype on the wire.
        sub_group: ZeRO-3's sub_group_size.
    """

    engine: str
    replicate: int
    shard: int
    tensor: int
    dtype: torch.dtype
    device: torch.device
    sub_group: int = SUB_GROUP

    @property
    def ranks(self) -> int:
        """Return the number of ranks of the job."""
        return self.replicate * self.shard * self.tensor

    @property
    def zero_stage(self) -> int | None:
        """Return DeepSpeed's stage; None for the other engines."""
        return int(self.engine[-1]) if self.engine.startswith("zero") else None

    @classmethod
    def from_user(
        cls,
        engine: str,
        *,
        dp: int | None = None,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        nodes: int = 1,
        gpus_per_node: int | None = None,
        dtype: str | None = None,
        device: str = "cuda",
        sub_group: int = SUB_GROUP,
    ) -> Job:
        """Return the job that a user describes.

        Args:
            engine: one of ``ENGINES``.
            dp: data-parallel ranks; None: all that nodes and gpus_per_node leave to tp.
            tp, pp, ep: tensor-, pipeline- and expert-parallel ranks.
            nodes: the number of nodes, over which HSDP has copies.
            gpus_per_node: ranks on each; None: those that dp and tp need.
            dtype: of the model's parameters; None: bfloat16 with DeepSpeed, float32 otherwise.
            device: "cuda" or "cpu".
            sub_group: ZeRO-3's sub_group_size.

        Raises:
            ValueError: an engine that is not known, sizes that do not fit each other or the engine.
        """
        _check_engine(engine)
        sizes = {"dp": dp, "tp": tp, "pp": pp, "ep": ep, "nodes": nodes, "sub_group": sub_group}
        _check_sizes(engine, {**sizes, "gpus_per_node": gpus_per_node})
        if tp > 1 and engine not in ("fsdp", "hsdp"):
            raise ValueError(
                f"tp is {tp}, but engine {engine} has no tensor parallelism; take fsdp"
            )
        if nodes > 1 and gpus_per_node is None and engine != "hsdp":
            raise ValueError(f"nodes is {nodes}, which has no effect here; give gpus_per_node too")
        if sub_group != SUB_GROUP and engine != "zero3":
            raise ValueError(f"sub_group is {sub_group}, which only engine zero3 has; leave it out")
        dp = _data_ranks(dp, tp, nodes, gpus_per_node)
        replicate, shard = (dp, 1) if engine in ("ddp", "zero0") else (1, dp)
        if engine == "hsdp":
            if dp % nodes:
                raise ValueError(f"dp is {dp}, which is no multiple of nodes, {nodes}")
            replicate, shard = nodes, dp // nodes
        default = "bfloat16" if engine.startswith("zero") else "float32"
        if (dtype or default) not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}{suggest(str(dtype), DTYPES)}")
        if device not in ("cuda", "cpu"):
            raise ValueError(f"device is {device!r}; write cuda or cpu")
        chosen = DTYPES[dtype or default]
        return cls(engine, replicate, shard, tp, chosen, torch.device(device), sub_group)


def _check_sizes(engine: str, sizes: Mapping[str, int | None]) -> None:
    """Raise a ValueError for a size that is no whole number, or that the engine has not."""
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{name} is {size!r}; an estimate needs a whole number from 1 on")
        if name in ("pp", "ep") and size != 1:
            raise ValueError(f"{name} is {size}; engine {engine} is estimated with 1 only")


def _check_engine(engine: str) -> None:
    """Raise a ValueError for an engine that is not estimated."""
    if engine == "megatron":
        raise ValueError(
            "engine megatron is not estimated yet: its buffers are Megatron's own; run"
            " `launch/pretrain.py --engine megatron`, whose optimizer counts its bytes"
        )
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}{suggest(str(engine), ENGINES)}")


def _data_ranks(dp: int | None, tp: int, nodes: int, gpus_per_node: int | None) -> int:
    """Return the number of data-parallel ranks.

    Raises:
        ValueError: the sizes do not fit each other.
    """
    if gpus_per_node is None:
        if dp is None:
            raise ValueError("dp is needed, or nodes and gpus_per_node")
        return dp
    ranks = nodes * gpus_per_node
    if ranks % tp:
        raise ValueError(f"tp is {tp}, but {nodes} x {gpus_per_node} ranks are no multiple of it")
    if dp is not None and dp * tp != ranks:
        raise ValueError(
            f"dp is {dp}, but {nodes} x {gpus_per_node} ranks leave {ranks // tp} to it; leave it"
            " out, or gpus_per_node"
        )
    return ranks // tp

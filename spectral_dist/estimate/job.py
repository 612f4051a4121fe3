"""The job that an estimate is for: engine, numbers of ranks, dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    "megatron": "Megatron-core, with tp, pp and ep, with its distributed optimizer or without",
}
LAYERS = ("transformer_engine", "local")
"""Whose layers Megatron has, as its --transformer-impl says."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUB_GROUP = 10**9
"""DeepSpeed's default of zero_optimization.sub_group_size."""


@dataclass(frozen=True)
class Job:
    """An engine on a number of ranks, none of which runs.

    Attributes:
        engine: one of ``ENGINES``.
        replicate: ranks that hold copies: HSDP's nodes, DDP's and ZeRO-0's ranks, Megatron's
            data-parallel ranks without its distributed optimizer.
        shard: ranks that cut parameters among them, without tensor parallelism.
        tensor: tensor-parallel ranks.
        dtype: of the model's parameters.
        device: where matrices are computed, which decides the dtype on the wire.
        sub_group: ZeRO-3's sub_group_size.
        pipeline, expert: Megatron's pipeline stages and expert-parallel ranks.
        distributed_optimizer: whether Megatron has that.
        layers: Megatron's, one of ``LAYERS``.
        grouped_experts: whether a layer of Megatron's holds all of a rank's experts.
        bucket: elements from which on Megatron begins another bucket; None: it has one.
        expert_tensor: tensor-parallel ranks of experts; None: as many as of other parameters.
    """

    engine: str
    replicate: int
    shard: int
    tensor: int
    dtype: torch.dtype
    device: torch.device
    sub_group: int = SUB_GROUP
    pipeline: int = 1
    expert: int = 1
    distributed_optimizer: bool = False
    layers: str = LAYERS[0]
    grouped_experts: bool = False
    bucket: int | None = None
    expert_tensor: int | None = None

    @property
    def ranks(self) -> int:
        """Return the number of ranks of the job."""
        return self.data * self.tensor * self.pipeline

    @property
    def data(self) -> int:
        """Return the number of data-parallel ranks."""
        return self.replicate * self.shard

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
        **megatron: Any,
    ) -> Job:
        """Return the job that a user describes.

        Args:
            engine: one of ``ENGINES``.
            dp: data-parallel ranks; None: all that nodes and gpus_per_node leave to tp and pp.
            tp, pp, ep: tensor-, pipeline- and expert-parallel ranks.
            nodes: the number of nodes, over which HSDP has copies.
            gpus_per_node: ranks on each; None: those that dp, tp and pp need.
            dtype: of the model's parameters; None: bfloat16 with DeepSpeed and Megatron, float32
                otherwise.
            device: "cuda" or "cpu".
            sub_group: ZeRO-3's sub_group_size.
            megatron: settings of Megatron's own, a key of ``MEGATRON`` each.

        Raises:
            ValueError: an engine that is not known, sizes that do not fit each other or the engine.
        """
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}{suggest(str(engine), ENGINES)}")
        sizes = {"dp": dp, "tp": tp, "pp": pp, "ep": ep, "nodes": nodes, "sub_group": sub_group}
        _check_sizes(engine, {**sizes, "gpus_per_node": gpus_per_node})
        if tp > 1 and engine not in ("fsdp", "hsdp", "megatron"):
            raise ValueError(
                f"tp is {tp}, but engine {engine} has no tensor parallelism; take fsdp"
            )
        if nodes > 1 and gpus_per_node is None and engine != "hsdp":
            raise ValueError(f"nodes is {nodes}, which has no effect here; give gpus_per_node too")
        if sub_group != SUB_GROUP and engine != "zero3":
            raise ValueError(f"sub_group is {sub_group}, which only engine zero3 has; leave it out")
        own = _megatron(engine, megatron)
        dp = _data_ranks(dp, tp, pp, nodes, gpus_per_node)
        _check_experts(dp, tp, ep, own["expert_tensor"])
        copies = _copies(engine, dp, nodes, own["distributed_optimizer"])
        default = "bfloat16" if engine.startswith(("zero", "megatron")) else "float32"
        if (dtype or default) not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}{suggest(str(dtype), DTYPES)}")
        if device not in ("cuda", "cpu"):
            raise ValueError(f"device is {device!r}; write cuda or cpu")
        chosen, where = DTYPES[dtype or default], torch.device(device)
        return cls(engine, copies, dp // copies, tp, chosen, where, sub_group, pp, ep, **own)


MEGATRON: dict[str, tuple[str, Any]] = {
    "distributed_optimizer": ("distributed_optimizer", False),
    "transformer_impl": ("layers", LAYERS[0]),
    "moe_grouped_gemm": ("grouped_experts", False),
    "ddp_bucket_size": ("bucket", None),
    "etp": ("expert_tensor", None),
}
"""The field of ``Job``, and the default, of each setting that only Megatron has."""


def _copies(engine: str, dp: int, nodes: int, distributed_optimizer: bool) -> int:
    """Return how many of the data-parallel ranks hold copies of the same parameters.

    Raises:
        ValueError: HSDP's nodes do not divide them.
    """
    if engine == "hsdp":
        if dp % nodes:
            raise ValueError(f"dp is {dp}, which is no multiple of nodes, {nodes}")
        return nodes
    has_copies = engine in ("ddp", "zero0", "megatron") and not distributed_optimizer
    return dp if has_copies else 1


def _megatron(engine: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Job`` that only Megatron has.

    Args:
        engine: the engine.
        settings: those that a user has given, by the keys of ``MEGATRON``.

    Raises:
        ValueError: a setting that is not known, malformed, or of another engine.
    """
    fields = dict(MEGATRON.values())
    for name, value in settings.items():
        if name not in MEGATRON:
            raise ValueError(f"unknown setting {name!r}{suggest(name, MEGATRON)}")
        field, default = MEGATRON[name]
        if value != default and engine != "megatron":
            raise ValueError(f"{name} is {value!r}, which only engine megatron has; leave it out")
        fields[field] = value
    if fields["layers"] not in LAYERS:
        raise ValueError(f"transformer_impl is {fields['layers']!r}; write {' or '.join(LAYERS)}")
    _check_sizes(engine, {"ddp_bucket_size": fields["bucket"], "etp": fields["expert_tensor"]})
    return fields


def _check_experts(dp: int, tp: int, ep: int, etp: int | None) -> None:
    """Raise a ValueError if experts' ranks do not divide a stage's."""
    if etp not in (None, tp) and ep == 1:
        raise ValueError(f"etp is {etp} and tp is {tp}, which needs ep above 1; leave etp out")
    if dp * tp % (ep * (etp or tp)):
        what = f"dp is {dp}" if etp is None else f"dp x tp is {dp * tp}"
        of = f"ep, {ep}" if etp is None else f"ep x etp, {ep * etp}"
        raise ValueError(f"{what}, which is no multiple of {of}")


def _check_sizes(engine: str, sizes: Mapping[str, int | None]) -> None:
    """Raise a ValueError for a size that is no whole number, or that the engine has not."""
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{name} is {size!r}; an estimate needs a whole number from 1 on")
        if name in ("pp", "ep") and size != 1 and engine != "megatron":
            raise ValueError(f"{name} is {size}; engine {engine} is estimated with 1 only")


def _data_ranks(dp: int | None, tp: int, pp: int, nodes: int, gpus_per_node: int | None) -> int:
    """Return the number of data-parallel ranks.

    Raises:
        ValueError: the sizes do not fit each other.
    """
    if gpus_per_node is None:
        if dp is None:
            raise ValueError("dp is needed, or nodes and gpus_per_node")
        return dp
    ranks, model = nodes * gpus_per_node, tp * pp
    if ranks % model:
        sizes = f"tp is {tp}" if pp == 1 else f"tp x pp is {model}"
        raise ValueError(f"{sizes}, but {nodes} x {gpus_per_node} ranks are no multiple of it")
    if dp is not None and dp * model != ranks:
        raise ValueError(
            f"dp is {dp}, but {nodes} x {gpus_per_node} ranks leave {ranks // model} to it; leave"
            " it out, or gpus_per_node"
        )
    return ranks // model

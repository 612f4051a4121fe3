"""The YAML of --engine ddp and fsdp (configs/torch): what it may say, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from spectral_dist._errors import suggest
from spectral_dist.launch import yaml_config
from spectral_dist.launch.yaml_config import DTYPE, Rule, RunConfig, whole
from spectral_dist.rules import registry
from spectral_dist.rules.options import BaseOptions


def optimizers() -> dict[str, type[BaseOptions]]:
    """Return the options of every optimizer by its type in the YAML."""
    return {entry.title: entry.options for entry in registry.entries()}


ADAMW = "AdamW"  # torch's own
SHARDED = ("mesh", "tensor_parallel", "param_dtype")
"""Keys that only --engine fsdp has."""


@dataclass(frozen=True)
class Mesh:
    """Ranks that hold copies of a shard, and ranks that a copy is cut over; -1: all there are."""

    replicate: int = 1
    shard: int = -1


@dataclass(frozen=True)
class TorchConfig(RunConfig):
    """``param_dtype``: of FSDP's mixed precision, in which layers compute; None is ``dtype``, in
    which parameters are kept (with POET under FSDP2, those that are frozen: the rest is float32).
    """

    mesh: Mesh = field(default_factory=Mesh)
    tensor_parallel: int = 1
    param_dtype: str | None = None

    def identity(self) -> dict[str, Any]:
        """Also the dtype that layers compute in."""
        return {**super().identity(), "param_dtype": self.param_dtype}

    def check_engine(self, engine: str) -> None:
        """ValueError for a key that the engine would ignore."""
        for key in SHARDED:
            if engine != "fsdp" and key in self.given:
                raise self.fail(key, f"only --engine fsdp has it, and this is --engine {engine}")


_EXTENT: Rule = (
    lambda v: isinstance(v, int) and not isinstance(v, bool) and (v >= 1 or v == -1),
    "a whole number, at least 1, or -1 for all the ranks there are",
)
RULES: dict[str, Rule] = {
    **yaml_config.RULES,
    "tensor_parallel": whole(1),
    "param_dtype": DTYPE,
}


def read(path: Path) -> TorchConfig:
    """A configuration, checked. ValueError: the message names the file and the key."""
    values = yaml_config.read(
        path, TorchConfig, optimizers(), ADAMW, RULES, "configs/torch/muon.yaml"
    )
    if "mesh" in values:
        values["mesh"] = _mesh(path, values["mesh"])
    config = TorchConfig(**values)
    if config.rotates and config.tensor_parallel > 1:
        raise config.fail(
            "tensor_parallel",
            "POET has it with --engine megatron only; leave it out, so that FSDP2 cuts the weights",
        )
    return config


def _mesh(path: Path, given: Any) -> Mesh:
    known = {f.name for f in fields(Mesh)}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: mesh is {given!r}; write {{replicate: 1, shard: -1}}")
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{path}: mesh: unknown key {key!r}{suggest(str(key), known)}")
        yaml_config.check(f"{path}: mesh: {key}", value, _EXTENT)
    mesh = Mesh(**given)
    if mesh.replicate == mesh.shard == -1:
        raise ValueError(f"{path}: mesh: only one of replicate and shard can be -1")
    return mesh

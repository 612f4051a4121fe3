"""Read and check the YAML of --engine ddp and fsdp (configs/torch)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from spectral_dist._errors import suggest
from spectral_dist.launch import yaml_config
from spectral_dist.launch.yaml_config import DTYPE, Constraint, RunConfig, integer_from
from spectral_dist.rules import registry
from spectral_dist.rules.options import BaseOptions


def optimizers() -> dict[str, type[BaseOptions]]:
    """Return the options class of every optimizer by its type in the YAML."""
    return {entry.title: entry.options for entry in registry.entries()}


ADAMW = "AdamW"  # torch's own
FSDP_ONLY_KEYS = ("mesh", "tensor_parallel", "param_dtype")
"""Keys of the YAML that only --engine fsdp has."""


@dataclass(frozen=True)
class Mesh:
    """The FSDP mesh: ``replicate`` copies, each sharded over ``shard`` ranks; -1: all the rest."""

    replicate: int = 1
    shard: int = -1


@dataclass(frozen=True)
class TorchConfig(RunConfig):
    """The settings of a run with plain torch.

    Attributes:
        mesh, tensor_parallel: how ranks are arranged; fsdp only.
        param_dtype: the dtype of FSDP's mixed precision, in which layers compute. None: ``dtype``,
            in which parameters are stored (with POET under FSDP2 only the frozen ones: the rest is
            float32).
    """

    mesh: Mesh = field(default_factory=Mesh)
    tensor_parallel: int = 1
    param_dtype: str | None = None

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must not change, with the dtype of computation."""
        return {**super().identity(), "param_dtype": self.param_dtype}

    def check_engine(self, engine: str) -> None:
        """Refuse keys that the engine would ignore.

        Raises:
            ValueError: names the file and the key.
        """
        for key in FSDP_ONLY_KEYS:
            if engine != "fsdp" and key in self.present_keys:
                raise self.fail(key, f"only --engine fsdp has it, and this is --engine {engine}")


_EXTENT: Constraint = (
    lambda v: isinstance(v, int) and not isinstance(v, bool) and (v >= 1 or v == -1),
    "a whole number, at least 1, or -1 for all the ranks there are",
)
CONSTRAINTS: dict[str, Constraint] = {
    **yaml_config.CONSTRAINTS,
    "tensor_parallel": integer_from(1),
    "param_dtype": DTYPE,
}


def read(path: Path) -> TorchConfig:
    """Read and check a configuration.

    Raises:
        ValueError: names the file and the key.
    """
    values = yaml_config.read(
        path, TorchConfig, optimizers(), ADAMW, CONSTRAINTS, "configs/torch/muon.yaml"
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


def _mesh(path: Path, section: Any) -> Mesh:
    """Return the mesh of its section in the YAML.

    Raises:
        ValueError: an unknown key, or sizes that are no mesh.
    """
    known = {f.name for f in fields(Mesh)}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: mesh is {section!r}; write {{replicate: 1, shard: -1}}")
    for key, value in section.items():
        if key not in known:
            raise ValueError(f"{path}: mesh: unknown key {key!r}{suggest(str(key), known)}")
        yaml_config.check(f"{path}: mesh: {key}", value, _EXTENT)
    mesh = Mesh(**section)
    if mesh.replicate == mesh.shard == -1:
        raise ValueError(f"{path}: mesh: only one of replicate and shard can be -1")
    return mesh

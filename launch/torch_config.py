"""The YAML of --engine ddp and fsdp (configs/torch): what it may say, read and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

import spectral_dist
from spectral_dist.options import ROUTING, Options, suggest

OPTIMIZERS: dict[str, Any] = {
    "Muon": spectral_dist.Muon,
    "PolarGrad": spectral_dist.PolarGrad,
    "ROOT": spectral_dist.ROOT,
}
ADAMW = "AdamW"  # torch's own
ADAMW_OPTIONS = ("lr", "betas", "eps", "weight_decay")
DTYPES = ("float32", "bfloat16")
SHARDED = ("mesh", "tensor_parallel", "param_dtype")
"""Keys that only --engine fsdp has."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which 1e-3 is a number, and a key that is there twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Mesh:
    """Ranks that hold copies of a shard, and ranks that a copy is cut over; -1: all there are."""

    replicate: int = 1
    shard: int = -1


@dataclass(frozen=True)
class TorchConfig:
    """What a DeepSpeed JSON would say; the fields are the YAML's keys, with their defaults.

    ``steps`` are those of the whole run: warmup, then a cosine to a tenth of the learning rate.
    ``param_dtype``: of FSDP's mixed precision, in which layers compute; None is ``dtype``, in
    which parameters are kept.
    """

    path: Path
    kind: str  # optimizer.type
    options: Options
    routing: Mapping[str, Any]  # matrices, scalars, split
    batch: int
    steps: int
    micro_batch: int | None = None  # batch / data-parallel ranks
    warmup: int = 0  # steps / 10, if the YAML does not say
    clip: float = 1.0  # 0: off
    dtype: str = "float32"
    monitor_every: int = 0  # 0: off
    mesh: Mesh = field(default_factory=Mesh)
    tensor_parallel: int = 1
    param_dtype: str | None = None
    given: frozenset[str] = frozenset()  # keys of the YAML

    def fail(self, key: str, what: str) -> ValueError:
        """The error of a bad value."""
        return ValueError(f"{self.path}: {key}: {what}")

    def check_engine(self, engine: str) -> None:
        """ValueError for a key that the engine would ignore."""
        for key in SHARDED:
            if engine != "fsdp" and key in self.given:
                raise self.fail(key, f"only --engine fsdp has it, and this is --engine {engine}")

    def identity(self) -> dict[str, Any]:
        """The optimizer's part that a checkpoint brings with it, so that it cannot be changed."""
        if self.kind == ADAMW:
            own = {name: getattr(self.options, name) for name in ADAMW_OPTIONS}
        else:
            matrix, scalar = self.options.matrix_group(), self.options.scalar_group()
            own = matrix | {f"scalar_{name}": value for name, value in scalar.items()}
        routing = {name: self.routing.get(name) or None for name in ROUTING}
        return {"type": self.kind, "warmup": self.warmup, **own, **routing}


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least,
        f"a whole number, at least {least}",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_DTYPE = (lambda v: v in DTYPES, " or ".join(DTYPES))
_EXTENT = (
    lambda v: isinstance(v, int) and not isinstance(v, bool) and (v >= 1 or v == -1),
    "a whole number, at least 1, or -1 for all the ranks there are",
)
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "batch": _whole(1),
    "steps": _whole(1),
    "micro_batch": _whole(1),
    "warmup": _whole(0),
    "clip": (lambda v: _is_number(v) and 0 <= v < math.inf, "a number, at least 0 (0: off)"),
    "dtype": _DTYPE,
    "monitor_every": _whole(0),
    "tensor_parallel": _whole(1),
    "param_dtype": _DTYPE,
}


def read(path: Path) -> TorchConfig:
    """A configuration, checked. ValueError: the message names the file and the key."""
    fields_ = _load(path)
    known = {f.name for f in fields(TorchConfig)} - {"path", "kind", "options", "routing", "given"}
    known |= {"optimizer"}
    for key in fields_:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{suggest(str(key), known)}")
    for key in ("optimizer", "batch", "steps"):
        if key not in fields_:
            raise ValueError(f"{path}: {key} is missing")
    values = {key: value for key, value in fields_.items() if key != "optimizer"}
    for key, value in values.items():
        if key != "mesh":
            _check(f"{path}: {key}", value, *RULES[key])
    kind, options, routing = _optimizer(path, fields_["optimizer"])
    if "mesh" in values:
        values["mesh"] = _mesh(path, values["mesh"])
    values.setdefault("warmup", values["steps"] // 10)
    config = TorchConfig(path, kind, options, routing, given=frozenset(fields_), **values)
    if config.monitor_every and kind == ADAMW:
        raise config.fail("monitor_every", "there is nothing to watch: AdamW has no matrices")
    return config


def _load(path: Path) -> dict[Any, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"cannot read the configuration {path}: {said}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected keys and values, as in configs/torch/muon.yaml")
    return loaded


def _check(where: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    if not holds(value):
        raise ValueError(f"{where} is {value!r}; it must be {wanted}")


def _mesh(path: Path, given: Any) -> Mesh:
    known = {f.name for f in fields(Mesh)}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: mesh is {given!r}; write {{replicate: 1, shard: -1}}")
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{path}: mesh: unknown key {key!r}{suggest(str(key), known)}")
        _check(f"{path}: mesh: {key}", value, *_EXTENT)
    mesh = Mesh(**given)
    if mesh.replicate == mesh.shard == -1:
        raise ValueError(f"{path}: mesh: only one of replicate and shard can be -1")
    return mesh


def _optimizer(path: Path, given: Any) -> tuple[str, Options, dict[str, Any]]:
    """Type, options and routing."""
    where = f"{path}: optimizer"
    if not isinstance(given, dict) or "type" not in given:
        raise ValueError(f"{where} is {given!r}; write {{type: Muon, lr: 0.006}}")
    own = {key: value for key, value in given.items() if key != "type"}
    types = (*OPTIMIZERS, ADAMW)
    kind = given["type"]
    if kind not in types:
        raise ValueError(f"{where}: unknown type {kind!r}{suggest(str(kind), types)}")
    if kind == ADAMW:
        for name in own:
            if name not in ADAMW_OPTIONS:
                raise ValueError(
                    f"{where}: {ADAMW} has no option {name!r}{suggest(str(name), ADAMW_OPTIONS)}"
                )
        return kind, Options.from_user(own, where), {}
    routing = {name: own.pop(name) for name in ROUTING if name in own}
    return kind, OPTIMIZERS[kind].option_type.from_user(own, where), routing

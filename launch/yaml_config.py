"""Read and check the YAML that configures a run of --engine ddp, fsdp or megatron.

The engines' own keys are added by torch_config and megatron_config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from spectral_dist._errors import suggest
from spectral_dist.launch import files
from spectral_dist.poet.convert import SETTINGS, settings_of
from spectral_dist.poet.options import POETOptions
from spectral_dist.rules.options import ROUTING, BaseOptions, MatrixOptions

ADAM_OPTIONS = ("lr", "betas", "eps", "weight_decay")
DTYPES = ("float32", "bfloat16")

Constraint = tuple[Callable[[Any], bool], str]
"""A test of a value, and the words for what the value must be."""
LONG_INTEGER = re.compile(r"[-+]?[1-9]\d{17,}")
"""Integers that may be too large for int64."""


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader that reads 1e-3 as a number and refuses a key that is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Build a mapping, and refuse a key that is there twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int | float:
        """Read an integer as JSON's are read: as a float if no tensor can hold it."""
        text = str(self.construct_scalar(node)).replace("_", "")
        if LONG_INTEGER.fullmatch(text):
            return files.whole_number(text)
        value: int = super().construct_yaml_int(node)
        return value


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run, as its YAML has them; the fields are the keys, with their defaults.

    With --engine deepspeed, the DeepSpeed JSON says the same. ``steps`` are those of the whole run:
    warmup, then a cosine to a tenth of the learning rate.
    """

    path: Path
    kind: str  # optimizer.type
    options: BaseOptions
    routing: Mapping[str, Any]  # matrices, scalars, split
    batch: int
    steps: int
    micro_batch: int | None = None  # batch / data-parallel ranks
    warmup: int = 0  # steps / 10, if the YAML does not say
    clip: float = 1.0  # 0: off
    dtype: str = "float32"
    monitor_every: int = 0  # 0: off
    save_every: int = 0  # 0: at the end only; --save-every overrides it
    rotation: Mapping[str, Any] = field(default_factory=dict)  # POET: settings of poet.convert
    present_keys: frozenset[str] = frozenset()  # of the YAML

    @property
    def rotates(self) -> bool:
        """Return whether the optimizer is POET, for which the model has to be converted."""
        return isinstance(self.options, POETOptions)

    def fail(self, key: str, what: str) -> ValueError:
        """Return the error of a bad value, which names the file and the key."""
        return ValueError(f"{self.path}: {key}: {what}")

    def micro_batch_size(self, data_ranks: int) -> int:
        """Return the rows of a micro-batch on each of the data-parallel ranks.

        Raises:
            ValueError: the batch cannot be divided so.
        """
        micro = self.micro_batch or max(1, self.batch // data_ranks)
        if self.batch % (micro * data_ranks):
            raise self.fail(
                "batch",
                f"{self.batch} is no multiple of micro_batch {micro} times {data_ranks}"
                " data-parallel rank(s)",
            )
        return micro

    def lr_factor(self, step: int) -> float:
        """Return the factor on the learning rate at a step (from 0).

        It rises to 1 over ``warmup`` steps, then falls to 0.1 along a cosine.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must not change, as JSON."""
        optimizer = optimizer_identity(self.kind, self.options, self.routing, self.rotation)
        others = {name: getattr(self, name) for name in ("warmup", "clip", "dtype")}
        return {"optimizer": optimizer, **others}


def optimizer_identity(
    kind: str, options: BaseOptions, routing: Mapping[str, Any], rotation: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all settings of an optimizer that affect its numbers, defaults included.

    Args:
        kind, options, routing, rotation: returned by ``read_optimizer``.
    """
    if type(options) is MatrixOptions:  # the framework's own Adam
        values = {name: getattr(options, name) for name in ADAM_OPTIONS}
    else:
        rotates = isinstance(options, POETOptions)
        scalar_values = options.scalar_group()
        values = options.group_fields("skew" if rotates else "matrix")
        values = values | {f"scalar_{name}": value for name, value in scalar_values.items()}
    if isinstance(options, POETOptions):
        values |= {"clip_ramp": options.clip_ramp, **asdict(settings_of(rotation))}
        del values["variant"]  # which changes no number
    written = {name: routing.get(name) or None for name in ROUTING}
    if written["heads"] is None:  # runs that were saved before there was this option go on
        del written["heads"]
    return {"type": kind, **values, **written}


def integer_from(minimum: int) -> Constraint:
    """Return the constraint of an integer of at least ``minimum``."""
    return (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= minimum,
        f"a whole number, at least {minimum}",
    )


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


FLAG: Constraint = (lambda v: isinstance(v, bool), "true or false")
DTYPE: Constraint = (lambda v: v in DTYPES, " or ".join(DTYPES))
CONSTRAINTS: dict[str, Constraint] = {
    "batch": integer_from(1),
    "steps": integer_from(1),
    "micro_batch": integer_from(1),
    "warmup": integer_from(0),
    "clip": (lambda v: is_number(v) and 0 <= v < math.inf, "a number, at least 0 (0: off)"),
    "dtype": DTYPE,
    "monitor_every": integer_from(0),
    "save_every": integer_from(0),
}


def read(
    path: Path,
    cls: type[RunConfig],
    optimizers: Mapping[str, type[BaseOptions]],
    adam: str,
    constraints: Mapping[str, Constraint],
    example: str,
) -> dict[str, Any]:
    """Read a YAML file and return the arguments of ``cls``, checked.

    Args:
        path: the file.
        cls: the configuration class of the engine; its fields are the known keys.
        optimizers: the options class of each spectral optimizer, by type in the YAML.
        adam: the type of the framework's own Adam.
        constraints: by key; a key without one is not checked here.
        example: a file that is right, for the error.

    Raises:
        ValueError: names the file and the key.
    """
    loaded = _load_yaml(path, example)
    derived = {"path", "kind", "options", "routing", "rotation", "present_keys"}
    known = {f.name for f in fields(cls)} - derived | {"optimizer"}
    for key in loaded:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{suggest(str(key), known)}")
    for key in ("optimizer", "batch", "steps"):
        if key not in loaded:
            raise ValueError(f"{path}: {key} is missing")
    values = {str(key): value for key, value in loaded.items() if key != "optimizer"}
    for key, value in values.items():
        if key in constraints:
            check(f"{path}: {key}", value, constraints[key])
    kind, options, routing, rotation = read_optimizer(path, loaded["optimizer"], optimizers, adam)
    values.setdefault("warmup", values["steps"] // 10)
    if values.get("monitor_every") and kind == adam:
        raise ValueError(
            f"{path}: monitor_every: there is nothing to watch: {adam} has no matrices"
        )
    if getattr(options, "clip_ramp", 0) and values.get("clip", 1.0) == 0:
        raise ValueError(f"{path}: optimizer: clip_ramp has no effect with clip: 0")
    optimizer = {"kind": kind, "options": options, "routing": routing, "rotation": rotation}
    return {"path": path, **optimizer, "present_keys": frozenset(loaded), **values}


def check(where: str, value: Any, constraint: Constraint) -> None:
    """Raise a ValueError that begins with ``where`` if a value does not fulfil its constraint."""
    holds, wanted = constraint
    if not holds(value):
        raise ValueError(f"{where} is {value!r}; it must be {wanted}")


def _load_yaml(path: Path, example: str) -> dict[Any, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read the configuration {path}: {reason}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected keys and values, as in {example}")
    return loaded


def read_optimizer(
    path: Path, section: Any, optimizers: Mapping[str, type[BaseOptions]], adam: str
) -> tuple[str, BaseOptions, dict[str, Any], dict[str, Any]]:
    """Read the optimizer section of a configuration.

    Args:
        path: the file, for errors.
        section: the type, and the options beside it.
        optimizers: the options class of each spectral optimizer, by type.
        adam: the type of the framework's own Adam; "": there is none.

    Returns:
        The type, the options, which parameters are matrices (``ROUTING``), and POET's rotation.

    Raises:
        ValueError: names the file and the option.
    """
    where = f"{path}: optimizer"
    if not isinstance(section, dict) or "type" not in section:
        first = next(iter(optimizers))
        raise ValueError(f"{where} is {section!r}; write {{type: {first}, lr: 0.006}}")
    written_options = {key: value for key, value in section.items() if key != "type"}
    types = (*optimizers, adam)
    kind = section["type"]
    if kind not in types:
        raise ValueError(f"{where}: unknown type {kind!r}{suggest(str(kind), types)}")
    if kind == adam:
        for name in written_options:
            if name not in ADAM_OPTIONS:
                raise ValueError(
                    f"{where}: {adam} has no option {name!r}{suggest(str(name), ADAM_OPTIONS)}"
                )
        return kind, MatrixOptions.from_user(written_options, where), {}, {}
    routing = {name: written_options.pop(name) for name in ROUTING if name in written_options}
    options_type, rotation = optimizers[kind], {}
    if options_type is POETOptions:
        rotation = _take_poet_settings(where, kind, written_options, routing)
    return kind, options_type.from_user(written_options, where), routing, rotation


def _take_poet_settings(
    where: str, kind: str, written_options: dict[str, Any], routing: Mapping[str, Any]
) -> dict[str, Any]:
    """Remove the settings of ``poet.convert`` from the written options, check and return them."""
    for name in routing.keys() - {"matrices", "scalars"}:
        raise ValueError(f"{where}: {name} has no effect: {kind} orthogonalizes no matrix")
    known = {*SETTINGS, *(f.name for f in fields(POETOptions))}
    for name in written_options:
        if name not in known:
            raise ValueError(f"{where}: unknown option {name!r}{suggest(str(name), known)}")
    rotation = {name: written_options.pop(name) for name in SETTINGS if name in written_options}
    try:
        settings_of(rotation)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('poet.convert: ')}") from None
    return rotation

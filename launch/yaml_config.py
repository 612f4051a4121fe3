"""What the YAMLs of all engines that have one share: how they are read, and what is checked."""

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

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value holds, and what it must be."""


LONG_NUMBER = re.compile(r"[-+]?[1-9]\d{17,}")


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which 1e-3 is a number, and a key that is there twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuse a key that is there twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int | float:
        """Decimal ones as in a JSON: a float for what no tensor holds."""
        text = str(self.construct_scalar(node)).replace("_", "")
        if LONG_NUMBER.fullmatch(text):
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
    """What a DeepSpeed JSON would say; the fields are the YAML's keys, with their defaults.

    ``steps`` are those of the whole run: warmup, then a cosine to a tenth of the learning rate.
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
    save_every: int = 0  # 0: at the end only; --save-every goes first
    rotation: Mapping[str, Any] = field(default_factory=dict)  # POET: settings of poet.convert
    given: frozenset[str] = frozenset()  # keys of the YAML

    @property
    def rotates(self) -> bool:
        """Whether the optimizer is POET, and so the model to be converted."""
        return isinstance(self.options, POETOptions)

    def fail(self, key: str, what: str) -> ValueError:
        """The error of a bad value."""
        return ValueError(f"{self.path}: {key}: {what}")

    def micro(self, data_ranks: int) -> int:
        """Rows of a micro-batch on one of the data-parallel ranks. ValueError: it does not fit."""
        micro = self.micro_batch or max(1, self.batch // data_ranks)
        if self.batch % (micro * data_ranks):
            raise self.fail(
                "batch",
                f"{self.batch} is no multiple of micro_batch {micro} times {data_ranks}"
                " data-parallel rank(s)",
            )
        return micro

    def factor(self, step: int) -> float:
        """On the learning rate at `step` (from 0): up over `warmup`, then down to 0.1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint brings with it, so that it cannot be changed; JSON."""
        optimizer = optimizer_identity(self.kind, self.options, self.routing, self.rotation)
        kept = {name: getattr(self, name) for name in ("warmup", "clip", "dtype")}
        return {"optimizer": optimizer, **kept}


def optimizer_identity(
    kind: str, options: BaseOptions, routing: Mapping[str, Any], rotation: Mapping[str, Any]
) -> dict[str, Any]:
    """All of an optimizer that its numbers depend on, defaults too: what `read_optimizer` read."""
    if type(options) is MatrixOptions:  # the framework's own Adam
        own = {name: getattr(options, name) for name in ADAM_OPTIONS}
    else:
        rotates = isinstance(options, POETOptions)
        scalar = options.scalar_group()
        own = options.group_fields("skew" if rotates else "matrix")
        own = own | {f"scalar_{name}": value for name, value in scalar.items()}
    if isinstance(options, POETOptions):
        own |= {"clip_ramp": options.clip_ramp, **asdict(settings_of(rotation))}
        del own["variant"]  # which changes no number
    return {"type": kind, **own, **{name: routing.get(name) or None for name in ROUTING}}


def whole(least: int) -> Rule:
    """A whole number."""
    return (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least,
        f"a whole number, at least {least}",
    )


def is_number(value: Any) -> bool:
    """Whether it is a number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


FLAG: Rule = (lambda v: isinstance(v, bool), "true or false")
DTYPE: Rule = (lambda v: v in DTYPES, " or ".join(DTYPES))
RULES: dict[str, Rule] = {
    "batch": whole(1),
    "steps": whole(1),
    "micro_batch": whole(1),
    "warmup": whole(0),
    "clip": (lambda v: is_number(v) and 0 <= v < math.inf, "a number, at least 0 (0: off)"),
    "dtype": DTYPE,
    "monitor_every": whole(0),
    "save_every": whole(0),
}


def read(
    path: Path,
    cls: type[RunConfig],
    optimizers: Mapping[str, type[BaseOptions]],
    adam: str,
    rules: Mapping[str, Rule],
    example: str,
) -> dict[str, Any]:
    """The arguments of ``cls``, each checked by its rule, if it has one.

    ``optimizers``: options by type; ``adam`` is the type beside them that is not ours.
    ValueError: names the file and the key.
    """
    loaded = _load(path, example)
    known = {f.name for f in fields(cls)} - {
        "path",
        "kind",
        "options",
        "routing",
        "rotation",
        "given",
    }
    known |= {"optimizer"}
    for key in loaded:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{suggest(str(key), known)}")
    for key in ("optimizer", "batch", "steps"):
        if key not in loaded:
            raise ValueError(f"{path}: {key} is missing")
    values = {str(key): value for key, value in loaded.items() if key != "optimizer"}
    for key, value in values.items():
        if key in rules:
            check(f"{path}: {key}", value, rules[key])
    kind, options, routing, rotation = read_optimizer(path, loaded["optimizer"], optimizers, adam)
    values.setdefault("warmup", values["steps"] // 10)
    if values.get("monitor_every") and kind == adam:
        raise ValueError(
            f"{path}: monitor_every: there is nothing to watch: {adam} has no matrices"
        )
    if getattr(options, "clip_ramp", 0) and values.get("clip", 1.0) == 0:
        raise ValueError(f"{path}: optimizer: clip_ramp has no effect with clip: 0")
    own = {"path": path, "kind": kind, "options": options, "routing": routing}
    return {**own, "rotation": rotation, "given": frozenset(loaded), **values}


def check(where: str, value: Any, rule: Rule) -> None:
    """ValueError if the value does not hold."""
    holds, wanted = rule
    if not holds(value):
        raise ValueError(f"{where} is {value!r}; it must be {wanted}")


def _load(path: Path, example: str) -> dict[Any, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"cannot read the configuration {path}: {said}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected keys and values, as in {example}")
    return loaded


def read_optimizer(
    path: Path, given: Any, optimizers: Mapping[str, type[BaseOptions]], adam: str
) -> tuple[str, BaseOptions, dict[str, Any], dict[str, Any]]:
    """Return type, options, routing and rotation.

    Args:
        path: of the file, for errors.
        given: what it says under `optimizer`: the type, and the options beside it.
        optimizers: options by type.
        adam: the type beside them that is not ours; "": there is none.

    Raises:
        ValueError: names the file and the option.
    """
    where = f"{path}: optimizer"
    if not isinstance(given, dict) or "type" not in given:
        first = next(iter(optimizers))
        raise ValueError(f"{where} is {given!r}; write {{type: {first}, lr: 0.006}}")
    own = {key: value for key, value in given.items() if key != "type"}
    types = (*optimizers, adam)
    kind = given["type"]
    if kind not in types:
        raise ValueError(f"{where}: unknown type {kind!r}{suggest(str(kind), types)}")
    if kind == adam:
        for name in own:
            if name not in ADAM_OPTIONS:
                raise ValueError(
                    f"{where}: {adam} has no option {name!r}{suggest(str(name), ADAM_OPTIONS)}"
                )
        return kind, MatrixOptions.from_user(own, where), {}, {}
    routing = {name: own.pop(name) for name in ROUTING if name in own}
    options_type, rotation = optimizers[kind], {}
    if options_type is POETOptions:
        rotation = _rotation(where, kind, own, routing)
    return kind, options_type.from_user(own, where), routing, rotation


def _rotation(
    where: str, kind: str, own: dict[str, Any], routing: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of ``poet.convert``, taken out of ``own`` and checked."""
    for name in routing.keys() - {"matrices", "scalars"}:
        raise ValueError(f"{where}: {name} has no effect: {kind} orthogonalizes no matrix")
    known = {*SETTINGS, *(f.name for f in fields(POETOptions))}
    for name in own:
        if name not in known:
            raise ValueError(f"{where}: unknown option {name!r}{suggest(str(name), known)}")
    rotation = {name: own.pop(name) for name in SETTINGS if name in own}
    try:
        settings_of(rotation)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('poet.convert: ')}") from None
    return rotation

"""Options of optimizers: frozen dataclasses whose fields say what they mean and how to check them.

Checks, command-line flags, JSON and documentation all come from the fields' metadata, so that an
option is described in one place: the dataclass of its rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import Any, NoReturn, Self, get_args, get_type_hints

import torch

from spectral_dist import polar
from spectral_dist._errors import suggest
from spectral_dist.machine import Machine
from spectral_dist.polar import DTYPES, of_gram
from spectral_dist.rules.adamw import BACKENDS
from spectral_dist.rules.scales import SCALE_ALIASES, SCALES

STRATEGIES = {
    "auto": "gram where tensor parallelism has cut matrices so that it is faster, else owner",
    "owner": "one rank gets the whole matrix",
    "gram": "matrices stay cut along their long side, and Gram matrices travel",
    "block": "what each rank holds is orthogonalized alone, but for every block_period-th step",
}
ROUTING = ("matrices", "scalars", "split", "one_sided")
"""Options of ``param_groups``, which DeepSpeed's JSON takes beside those of the optimizer."""
_SPEC = "spectral_dist option"


@dataclass(frozen=True)
class OptionSpec:
    """What is known of one option.

    Attributes:
        doc: one sentence about it.
        problem: says what is wrong with a value, or returns None.
        parse: reads a value from a command line's text.
        scope: 'matrix' or 'scalar' if parameter groups of that kind carry it, 'all' if both do,
            'optimizer' if it belongs to the optimizer as a whole.
        shapes_state: whether state saved with one value does not fit another.
        learned: whether training changes it, so that checkpoints bring it back.
    """

    doc: str
    problem: Callable[[Any], str | None]
    parse: Callable[[str], Any]
    scope: str = "matrix"
    shapes_state: bool = False
    learned: bool = False


def option(
    default: Any,
    doc: str,
    problem: Callable[[Any], str | None],
    parse: Callable[[str], Any] | None = None,
    **more: Any,
) -> Any:
    """Declare a field with a check of its own; ``more`` as in ``OptionSpec``."""
    spec = OptionSpec(doc, problem, parse or parse_value, **more)
    return field(default=default, metadata={_SPEC: spec})


def number(
    default: float | None,
    doc: str,
    *,
    low: float = 0.0,
    below: float = math.inf,
    above: bool = False,
    **more: Any,
) -> Any:
    """Declare a number in [low, below), low left out if ``above``; None if that is the default."""

    def problem(value: Any) -> str | None:
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            quoted = " (YAML and JSON read 1e-3 as text if it is quoted)" * isinstance(value, str)
            return f"it must be a number{quoted}"
        if not low <= value < below:
            return f"it must be at least {low:g}" + f" and below {below:g}" * math.isfinite(below)
        return f"it must be above {low:g}" if above and value == low else None

    return option(default, doc, problem, **more)


def whole(default: int | None, doc: str, *, least: int = 1, unit: str = "", **more: Any) -> Any:
    """Declare a whole number of ``unit``, at least ``least``; None if that is the default."""

    def problem(value: Any) -> str | None:
        if value is None and default is None:
            return None
        if is_whole(value, least):
            return None
        return f"it must be a whole number{f' of {unit}' * bool(unit)}, at least {least}"

    return option(default, doc, problem, **more)


def flag(default: bool, doc: str, **more: Any) -> Any:
    """Declare a switch."""
    return option(default, doc, _flag_problem, _parse_flag, **more)


def choice(
    default: str, known: Iterable[str] | Callable[[], Iterable[str]], doc: str, what: str,
    aliases: Mapping[str, str] | None = None, **more: Any,
) -> Any:  # fmt: skip
    """Declare one of several names. ``aliases``: what others call some of them; told, not taken."""

    def problem(value: Any) -> str | None:
        if not isinstance(value, str):
            return "it must be a name"
        names = list(known() if callable(known) else known)
        if value in names:
            return None
        if aliases and value in aliases:
            return f"here that is {aliases[value]!r}"
        return f"unknown {what}{suggest(value, names)}"

    return option(default, doc, problem, str, **more)


def is_whole(value: object, least: int) -> bool:
    """Return whether the value is a whole number, at least ``least``, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def parse_value(text: str) -> Any:
    """Read a number as Python does, else JSON, else return the text itself."""
    for read in (int, float, json.loads):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _flag_problem(value: Any) -> str | None:
    return None if isinstance(value, bool) else "it must be true or false"


def _parse_flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r}: write true or false")
    return text.lower() == "true"


def _text_problem(value: Any) -> str | None:
    return None if isinstance(value, str) else "it must be a name"


def betas_problem(value: Any) -> str | None:
    """Return what is wrong with a pair of decays, or None."""
    numbers = isinstance(value, tuple | list) and len(value) == 2
    if numbers and all(
        isinstance(b, int | float) and not isinstance(b, bool) and 0 <= b < 1 for b in value
    ):
        return None
    return "write two numbers in [0, 1), as in [0.9, 0.95]"


def _wire_problem(value: Any) -> str | None:
    if value is None or value in ("float32", "bfloat16"):
        return None
    return "write 'float32' or 'bfloat16' (float16 would overflow unnormalised)"


def _machine_problem(value: Any) -> str | None:
    if value is not None and not isinstance(value, Mapping):
        return "write numbers by name, as in {'bandwidth': 4e10}"
    return None


_PLAIN: dict[type, tuple[Callable[[Any], str | None], Callable[[str], Any]]] = {
    bool: (_flag_problem, _parse_flag),
    str: (_text_problem, str),
    float: (number(0.0, "", low=-math.inf).metadata[_SPEC].problem, parse_value),
    int: (lambda v: None if is_whole(v, -(2**63)) else "it must be a whole number", parse_value),
}


_specs: dict[type, dict[str, OptionSpec]] = {}


def specs_of(cls: type[BaseOptions]) -> dict[str, OptionSpec]:
    """Return every option of a class by name; of a field without metadata, as its type says."""
    if cls in _specs:
        return _specs[cls]
    hints: dict[str, Any] = {}
    specs = {}
    for each in fields(cls):
        spec = each.metadata.get(_SPEC)
        if spec is None:
            hints = hints or get_type_hints(cls)
            spec = _spec_of_type(hints[each.name], each)
        specs[each.name] = spec
    _specs[cls] = specs
    return specs


def _spec_of_type(hint: Any, each: Field[Any]) -> OptionSpec:
    members = set(get_args(hint)) or {hint}
    optional = NoneType in members
    members.discard(NoneType)
    kind = float if members == {int, float} else next(iter(members)) if len(members) == 1 else None
    problem, parse = _PLAIN.get(kind, (lambda value: None, parse_value))  # type: ignore[arg-type]

    def allowed(value: Any) -> str | None:
        return None if optional and value is None else problem(value)

    return OptionSpec(str(each.metadata.get("doc", "")), allowed, parse)


@dataclass(frozen=True)
class BaseOptions:
    """Options of every optimizer; every integration takes these names, with these defaults."""

    lr: float = number(1e-3, "Learning rate.", scope="all")
    weight_decay: float = number(0.1, "Decoupled weight decay, times lr.", scope="all")
    scalar_lr: float | None = number(
        None, "Learning rate of what AdamW trains; None: lr.", scope="optimizer"
    )
    scalar_weight_decay: float | None = number(
        None, "Weight decay of what AdamW trains; None: weight_decay.", scope="optimizer"
    )
    betas: tuple[float, float] = option(
        (0.9, 0.95), "AdamW's decay of its two moments.", betas_problem, scope="scalar"
    )
    eps: float = number(1e-8, "AdamW's addition to the denominator.", scope="scalar")
    scalar_backend: str = choice(
        "torch", BACKENDS, "What computes AdamW.", "backend", scope="optimizer"
    )
    check_finite: bool = flag(
        True, "Refuse NaN and infinite gradients, on every rank.", scope="optimizer"
    )

    @classmethod
    def from_user(cls, given: Mapping[str, Any], where: str = "options") -> Self:
        """Build options from keywords or JSON, checked.

        Args:
            given: values by name.
            where: who takes them, for errors.

        Raises:
            ValueError: an unknown name or a bad value.
        """
        known = specs_of(cls)
        for name in given:
            if not isinstance(name, str):
                raise ValueError(f"{where}: {name!r} is no name of an option; write names as text")
            if name in ROUTING:
                raise ValueError(
                    f"{where}: {name} decides which parameters are matrices, so it belongs to"
                    f" param_groups: {where}(spectral_dist.param_groups(model, {name}=...))"
                )
            if name not in known:
                raise ValueError(
                    f"{where}: unknown option {name!r}{suggest(name, {*known, *ROUTING})}"
                )
        options = cls(**given)
        try:
            object.__setattr__(options, "betas", tuple(options.betas))
        except TypeError:
            options.fail(where, "betas", "write two numbers, as in [0.9, 0.95]")
        options.check(where)
        return options

    def fail(self, where: str, name: str, what: str) -> NoReturn:
        """Raise the ValueError that a bad option gets."""
        raise ValueError(f"{where}: {name} is {getattr(self, name)!r}; {what}")

    def check(self, where: str) -> None:
        """Raise a ValueError for the first bad value; subclasses add what concerns several."""
        for name, spec in specs_of(type(self)).items():
            problem = spec.problem(getattr(self, name))
            if problem:
                self.fail(where, name, problem)

    @classmethod
    def names(cls, kind: str) -> frozenset[str]:
        """Return the options that a parameter group of this kind carries."""
        specs = specs_of(cls).items()
        return frozenset(name for name, spec in specs if spec.scope in (kind, "all"))

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Return the kinds of parameters that the optimizer can have."""
        return ("scalar",)

    def group(self, kind: str) -> dict[str, Any]:
        """Return what a parameter group of one of ``kinds`` carries: plain values."""
        if kind == "scalar":
            return self.scalar_group()
        values = {name: getattr(self, name) for name in specs_of(type(self))}
        carried = {name: values[name] for name in values if name in self.names(kind)}
        return {"kind": kind, "lr_ratio": 1.0, **carried}

    def scalar_group(self) -> dict[str, Any]:
        """Return what a parameter group on AdamW carries."""
        decay = self.scalar_weight_decay
        return {
            "kind": "scalar",
            "lr": self.lr,
            "lr_ratio": self.ratio(self.scalar_lr, "scalar_lr"),
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay if decay is None else decay,
        }

    def ratio(self, lr: float | None, name: str) -> float:
        """Return ``lr`` over the base lr: schedulers may then write one lr into every group."""
        if lr is None or lr == self.lr:
            return 1.0
        if self.lr == 0:
            raise ValueError(f"{name} is {lr}, but it is kept as a ratio to lr, which is 0; set lr")
        return lr / self.lr


@dataclass(frozen=True)
class MatrixOptions(BaseOptions):
    """Options of every optimizer that orthogonalizes matrices."""

    momentum: float = number(0.95, "Decay of the momentum.", below=1.0)
    wire_dtype: str | None = option(
        None, "Dtype in which matrices travel; None: bfloat16 if they are computed so, else that"
        " of momentum.", _wire_problem,
    )  # fmt: skip
    strategy: str = choice(
        "auto", STRATEGIES, "Where cut matrices are orthogonalized.", "strategy", scope="optimizer"
    )
    block_period: int = whole(
        5, "Under strategy 'block': every so many steps, whole matrices.", unit="steps",
        scope="optimizer",
    )  # fmt: skip
    machine: Mapping[str, float] | None = option(
        None, "Under strategy 'auto': numbers of the machine for its cost model.",
        _machine_problem, scope="optimizer",
    )  # fmt: skip
    bucket_mb: float = number(
        64.0, "MiB of matrices that a rank works on at a time.", above=True, scope="optimizer"
    )
    replicate_momentum: bool = flag(
        False, "Keep all momentum on every replica, and not at owners alone.", scope="optimizer"
    )

    def check(self, where: str) -> None:
        """Add what concerns the strategy."""
        super().check(where)
        if self.block_period != MatrixOptions.block_period and self.strategy != "block":
            self.fail(where, "block_period", "it has an effect with strategy='block' only")
        if self.machine is None:
            return
        if self.strategy != "auto":
            self.fail(where, "machine", "it has an effect with strategy='auto' only")
        try:
            Machine.from_user(self.machine)
        except ValueError as error:
            raise ValueError(f"{where}: machine: {error}") from None

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """Return the kinds of parameters that the optimizer can have."""
        return ("matrix", "scalar")


@dataclass(frozen=True)
class ComputedOptions(MatrixOptions):
    """Options of the optimizers that compute polar factors by polynomials."""

    polar_steps: int | None = option(
        None, "Steps of the polar method; None: its own number.", lambda value: None
    )
    polar_dtype: str = choice(
        "auto", ("auto", *DTYPES), "Dtype in which polar factors are computed.", "dtype"
    )


@dataclass(frozen=True)
class PolarOptions(ComputedOptions):
    """Options of the optimizers whose polar method can be chosen."""

    polar: str | Sequence[Sequence[float]] = option(
        "jordan", "Polar method, or a schedule of your own, [[a, b, c], ...].", lambda value: None
    )

    def check(self, where: str) -> None:
        """Add the polar method, with its steps and dtype."""
        super().check(where)
        try:
            polar.check(self.polar, self.polar_steps, self.polar_dtype)
            if self.strategy == "gram":
                dtype = DTYPES.get(self.polar_dtype, torch.float32)
                of_gram.dtype_of(self.polar, self.polar_steps, dtype)
        except ValueError as error:
            text = f"{'polar_' * str(error).startswith('steps')}{error}"
            in_slabs = "; or strategy='owner'" * ("Gram matrix" in text)
            raise ValueError(f"{where}: {text}{in_slabs}") from None


@dataclass(frozen=True)
class ScaledOptions(MatrixOptions):
    """Options of the optimizers whose direction is multiplied by a factor of the shape."""

    scale: str = choice(
        "match_rms_adamw", SCALES, "Factor of the direction.", "scale", SCALE_ALIASES
    )


@dataclass(frozen=True)
class NesterovOptions(ScaledOptions):
    """Options of the optimizers that orthogonalize a momentum."""

    nesterov: bool = flag(True, "Orthogonalize Nesterov's form of the momentum.")

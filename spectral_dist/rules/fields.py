"""Options as fields of a dataclass: what each means, how it is checked and read from text.

    temperature: float = number(1.0, "Divisor of the logits.", above=True)

Checks, command-line flags, JSON and documentation all come from the fields' metadata.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from torch import Tensor

from spectral_dist._errors import suggest

_SPEC = "spectral_dist option"


@dataclass(frozen=True)
class OptionSpec:
    """The metadata of one option.

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
    problem: Callable[[object], str | None]
    parse: Callable[[str], Any]
    scope: str = "matrix"
    shapes_state: bool = False
    learned: bool = False


def option(
    default: Any,
    doc: str,
    problem: Callable[[object], str | None],
    parse: Callable[[str], Any] | None = None,
    **more: Any,
) -> Any:
    """Declare a field with a check of its own.

    Args:
        default: of the field.
        doc: one sentence about it.
        problem: says what is wrong with a value, or returns None.
        parse: reads a value from a command line's text; None reads a number or JSON.
        more: ``scope``, ``shapes_state`` or ``learned`` of ``OptionSpec``.
    """
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
    """Declare a number in [low, below), without low if ``above``; None is allowed as the default.

    Args:
        default: of the field.
        doc: one sentence about it.
        low: the smallest value.
        below: values must be below it.
        above: whether values must be above ``low``.
        more: as ``option`` takes it.
    """

    def problem(value: object) -> str | None:
        value = plain(value)
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            quoted = " (YAML and JSON read 1e-3 as text if it is quoted)" * isinstance(value, str)
            return f"it must be a number{quoted}"
        if not low <= value < below:
            return f"it must be at least {low:g}" + f" and below {below:g}" * math.isfinite(below)
        return f"it must be above {low:g}" if above and value == low else None

    return option(default, doc, problem, **more)


def whole(
    default: int | None,
    doc: str,
    *,
    least: int = 1,
    most: float = math.inf,
    unit: str = "",
    **more: Any,
) -> Any:
    """Declare a whole number in [least, most]; None is allowed if it is the default.

    Args:
        default: of the field.
        doc: one sentence about it.
        least: the smallest value.
        most: the largest value.
        unit: what is counted, for errors.
        more: as ``option`` takes it.
    """

    def problem(value: object) -> str | None:
        if value is None and default is None:
            return None
        number = plain(value)
        if is_whole(number, least) and number <= most:
            return None
        ends = f"at least {least}" + f" and at most {most}" * math.isfinite(most)
        return f"it must be a whole number{f' of {unit}' * bool(unit)}, {ends}"

    return option(default, doc, problem, **more)


def flag(default: bool, doc: str, **more: Any) -> Any:
    """Declare a field that is true or false."""
    return option(default, doc, _flag_problem, _parse_flag, **more)


def choice(
    default: str, known: Iterable[str] | Callable[[], Iterable[str]], doc: str, what: str,
    aliases: Mapping[str, str] | None = None, **more: Any,
) -> Any:  # fmt: skip
    """Declare a field that is one of several names.

    Args:
        default: of the field.
        known: the names, or a function that returns them.
        doc: one sentence about it.
        what: what the names are of, for errors.
        aliases: other projects' words for some of the names: refused, and the error has the name.
        more: as ``option`` takes it.
    """

    def problem(value: object) -> str | None:
        if not isinstance(value, str):
            return "it must be a name"
        names = list(known() if callable(known) else known)
        if value in names:
            return None
        if aliases and value in aliases:
            return f"here that is {aliases[value]!r}"
        return f"unknown {what}{suggest(value, names)}"

    return option(default, doc, problem, str, **more)


def plain(value: Any) -> Any:
    """Return a single number of numpy or torch as Python's own, and anything else unchanged.

    Waits for the device if the number is a tensor there.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.item()
    if type(value) in (int, float, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def is_whole(value: object, least: int) -> bool:
    """Return whether a value is a whole number, at least ``least``, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def parse_value(text: str) -> Any:
    """Read a number as Python does, else JSON, else return the text itself."""
    for read in (int, float, json.loads):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _flag_problem(value: object) -> str | None:
    """Return what is wrong with a switch, or None."""
    return None if isinstance(value, bool) else "it must be true or false"


def _parse_flag(text: str) -> bool:
    """Return the bool that a text says.

    Raises:
        ValueError: it says neither true nor false.
    """
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r}: write true or false")
    return text.lower() == "true"


def _text_problem(value: object) -> str | None:
    """Return what is wrong with a name, or None."""
    return None if isinstance(value, str) else "it must be a name"


def betas_problem(value: object) -> str | None:
    """Return what is wrong with a pair of decays, or None."""
    pair = [plain(b) for b in value] if isinstance(value, tuple | list) else []
    decays = [b for b in pair if isinstance(b, int | float) and not isinstance(b, bool)]
    if len(pair) == len(decays) == 2 and all(0 <= b < 1 for b in decays):
        return None
    return "write two numbers in [0, 1), as in [0.9, 0.95]"


_PLAIN: dict[type, tuple[Callable[[object], str | None], Callable[[str], Any]]] = {
    bool: (_flag_problem, _parse_flag),
    str: (_text_problem, str),
    float: (number(0.0, "", low=-math.inf).metadata[_SPEC].problem, parse_value),
    int: (lambda v: None if is_whole(v, -(2**63)) else "it must be a whole number", parse_value),
}


_specs: dict[type, dict[str, OptionSpec]] = {}


def specs_of(cls: type[Any]) -> dict[str, OptionSpec]:
    """Return every option of a class by name; a field without metadata is checked by its type."""
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
    """Return the spec of a field without metadata, with the check of its type."""
    members = set(get_args(hint)) or {hint}
    optional = NoneType in members
    members.discard(NoneType)
    kind = float if members == {int, float} else next(iter(members)) if len(members) == 1 else None
    problem, parse = _PLAIN.get(kind, (lambda value: None, parse_value))  # type: ignore[arg-type]

    def allowed(value: object) -> str | None:
        return None if optional and value is None else problem(value)

    return OptionSpec(str(each.metadata.get("doc", "")), allowed, parse)

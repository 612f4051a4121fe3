"""Our options as flags of a Megatron training script."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from spectral_dist.integrations.megatron.config import OWN
from spectral_dist.integrations.megatron.inner import TYPES
from spectral_dist.options import ROUTING

PREFIX = "spectral_"
_parsed: dict[str, Any] = {}
"""What the flags of this process said: Megatron's OptimizerConfig has no room for it."""


def parsed() -> tuple[str | None, dict[str, Any]]:
    """(the optimizer's name, its options) as the flags gave them."""
    options = {name: value for name, value in _parsed.items() if name != "optimizer"}
    return _parsed.get("optimizer"), options


def forget() -> None:
    """As if no flag had been parsed."""
    _parsed.clear()


class _Remember(argparse.Action):
    """Stores a flag in the namespace as any, and for ``parsed``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """One flag."""
        setattr(namespace, self.dest, values)
        _parsed[self.dest.removeprefix(PREFIX)] = values


class _Optimizer(argparse.Action):
    """--optimizer: ours are Adam to Megatron, whose machinery they use (what it checks for other
    names, and the distributed optimizer that it turns off for them, is about its own).
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """One flag."""
        ours = values in TYPES
        setattr(namespace, self.dest, "adam" if ours else values)
        namespace.spectral_optimizer = values if ours else None
        _parsed.pop("optimizer", None)
        if ours:
            _parsed["optimizer"] = values


def add_spectral_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """``--optimizer spectral_...`` and a flag ``--spectral-OPTION`` for every option; the parser.

    For ``extra_args_provider`` of Megatron's ``pretrain``. lr, weight decay, betas and eps are
    Megatron's own flags. Lists and tables are JSON: ``--spectral-scalars '["router"]'``.
    """
    forget()
    _extend_optimizer(parser)
    group = parser.add_argument_group("spectral_dist")
    for name, (reader, default, owners) in sorted(_options().items()):
        group.add_argument(
            "--" + (PREFIX + name).replace("_", "-"),
            dest=PREFIX + name,
            action=_Remember,
            type=reader,
            default=None,
            metavar=name.upper(),
            help=f"{name} of {', '.join(owners)} (default: {default})",
        )
    return parser


def _extend_optimizer(parser: argparse.ArgumentParser) -> None:
    known: Any = parser._option_string_actions.get("--optimizer")
    if known is None:
        parser.add_argument("--optimizer", action=_Optimizer, choices=list(TYPES), required=True)
        return
    if known.choices is not None:
        known.choices = [*known.choices, *TYPES]
    known.__class__ = _Optimizer  # its own class only stores


def _options() -> dict[str, tuple[Callable[[str], Any], Any, list[str]]]:
    """Every option that is not Megatron's own: (how to read it, its default, who has it)."""
    found: dict[str, tuple[Callable[[str], Any], Any, list[str]]] = {}
    for name, cls in TYPES.items():
        for field in fields(cls.option_type):
            if field.name in OWN or field.name == "scalar_weight_decay":
                continue
            default = None if field.default is MISSING else field.default
            found.setdefault(field.name, (_reader(str(field.type)), default, []))[2].append(name)
    for name in ROUTING:
        found[name] = (_json, None, list(TYPES))
    return found


def _reader(annotation: str) -> Callable[[str], Any]:
    if annotation == "bool":
        return _boolean
    return str if annotation == "str" else _json


def _json(text: str) -> Any:
    """JSON, or the text itself where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false")
    return text.lower() == "true"

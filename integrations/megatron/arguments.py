"""Our options as flags of a Megatron training script."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from spectral_dist.integrations.megatron.config import OWN
from spectral_dist.integrations.megatron.inner import TYPES
from spectral_dist.rules.options import ROUTING, OptionSpec, parse_value, specs_of

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
    for name, (reader, said) in sorted(_options().items()):
        group.add_argument(
            "--" + (PREFIX + name).replace("_", "-"),
            dest=PREFIX + name,
            action=_Remember,
            type=reader,
            default=None,
            metavar=name.upper(),
            help=said,
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


def _options() -> dict[str, tuple[Callable[[str], Any], str]]:
    """Every option that is not Megatron's own: (how to read it, what to say of it)."""
    owners: dict[str, list[str]] = {}
    said: dict[str, tuple[Callable[[str], Any], str]] = {}
    for name, cls in TYPES.items():
        for each in fields(cls.options_type):
            if each.name in OWN or each.name == "scalar_weight_decay":
                continue
            spec = specs_of(cls.options_type)[each.name]
            owners.setdefault(each.name, []).append(name)
            said.setdefault(each.name, (_reader(spec), f"{spec.doc} Default: {each.default}."))
    for name in ROUTING:
        said[name] = (parse_value, "As of param_groups; JSON.")
        owners[name] = list(TYPES)
    return {
        name: (read, f"{text} Of {', '.join(owners[name])}.".replace("%", "%%"))
        for name, (read, text) in said.items()
    }


def _reader(spec: OptionSpec) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return spec.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read

"""Our options as flags of a Megatron training script."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from spectral_dist.integrations.megatron.config import OWN
from spectral_dist.integrations.megatron.optimizer import TYPES
from spectral_dist.rules.fields import OptionSpec, parse_value, specs_of
from spectral_dist.rules.options import ROUTING

PREFIX = "spectral_"


@dataclass
class _Said:
    """What flags said of an optimizer of ours: Megatron's OptimizerConfig has no room for it."""

    named: bool = False
    """whether any optimizer was"""
    optimizer: str | None = None
    """None if it is not ours"""
    options: dict[str, Any] = field(default_factory=dict)


_flags = _Said()
"""Those of this process, as parsed last."""
_restored = _Said()
"""Those in the checkpoint of --use-checkpoint-args."""


def parsed() -> tuple[str | None, dict[str, Any]]:
    """Return (the optimizer's name, its options) as the flags gave them, or the checkpoint's."""
    optimizer = _flags.optimizer if _flags.named else _restored.optimizer
    before = _restored.options if optimizer == _restored.optimizer else {}
    return optimizer, {**before, **_flags.options}


def forget() -> None:
    """Make it as if no flag had been parsed, and no checkpoint read."""
    for said in (_flags, _restored):
        _clear(said)


def _clear(said: _Said) -> None:
    said.named, said.optimizer = False, None
    said.options.clear()


def restore(args: Any, saved: Any) -> dict[str, Any]:
    """Set what --use-checkpoint-args takes from a checkpoint; flags that are given win.

    Args:
        args: those of this run, of Megatron's parser.
        saved: those of the run that wrote the checkpoint.

    Returns:
        What was set, by name, for Megatron to say.
    """
    name = getattr(saved, "spectral_optimizer", None)
    if name not in TYPES or (_flags.named and _flags.optimizer != name):
        return {}
    before = {
        option: value
        for option in _options()
        if (value := getattr(saved, PREFIX + option, None)) is not None
    }
    _restored.named, _restored.optimizer, _restored.options = True, name, before
    found = {PREFIX + k: v for k, v in before.items() if k not in _flags.options}
    if not _flags.named:
        args.optimizer = "adam"  # as ``_Optimizer`` does
        found[PREFIX + "optimizer"] = name
    for key, value in found.items():
        setattr(args, key, value)
    return found


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
        _flags.options[self.dest.removeprefix(PREFIX)] = values


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
        _flags.named, _flags.optimizer = True, values if ours else None


def add_spectral_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--optimizer spectral_...`` and ``--spectral-OPTION`` for every option; the parser.

    Megatron-LM's parsers have them already, once ``spectral_dist.integrations.megatron`` has been
    imported; this is for parsers of your own. A second time it adds nothing. lr, weight decay,
    betas and eps are Megatron's own flags. Lists and tables are JSON: ``--spectral-scalars
    '["router"]'``.
    """
    _clear(_flags)
    if isinstance(parser._option_string_actions.get("--optimizer"), _Optimizer):
        return parser
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

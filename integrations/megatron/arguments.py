"""Our options as flags of Megatron training scripts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from spectral_dist.integrations.megatron.config import MEGATRON_SETTINGS
from spectral_dist.integrations.megatron.optimizer import TYPES
from spectral_dist.rules.fields import OptionSpec, parse_value, specs_of
from spectral_dist.rules.options import ROUTING

PREFIX = "spectral_"


@dataclass
class _Choice:
    """The optimizer and options that flags chose; Megatron's OptimizerConfig cannot hold them.

    Attributes:
        is_named: whether --optimizer was given, with any value.
        optimizer: the name of our optimizer; None if none was named, or one that is not ours.
        options: the values of our flags, by the name of the option.
    """

    is_named: bool = False
    optimizer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


_flags = _Choice()
"""The choice of this process's flags, as parsed last."""
_restored = _Choice()
"""The choice of the run whose checkpoint --use-checkpoint-args has read."""


def parsed() -> tuple[str | None, dict[str, Any]]:
    """Return (name of our optimizer or None, its options), from flags and the read checkpoint.

    Flags win over the checkpoint. Its options count only if the optimizer is the same.
    """
    optimizer = _flags.optimizer if _flags.is_named else _restored.optimizer
    restored = _restored.options if optimizer == _restored.optimizer else {}
    return optimizer, {**restored, **_flags.options}


def forget() -> None:
    """Forget all parsed flags, and what was read from a checkpoint."""
    for choice in (_flags, _restored):
        _clear(choice)


def _clear(choice: _Choice) -> None:
    """Remove the optimizer and options of a choice, in place."""
    choice.is_named, choice.optimizer = False, None
    choice.options.clear()


def restore(args: Any, saved: Any) -> dict[str, Any]:
    """Take our optimizer and its options from a checkpoint, for --use-checkpoint-args.

    Flags of this run win.

    Args:
        args: this run's arguments, of Megatron's parser; written.
        saved: the arguments of the run that wrote the checkpoint.

    Returns:
        The arguments that were set, by name, for Megatron to print.
    """
    name = getattr(saved, "spectral_optimizer", None)
    if name not in TYPES or (_flags.is_named and _flags.optimizer != name):
        return {}
    saved_options = {
        option: value
        for option in _options()
        if (value := getattr(saved, PREFIX + option, None)) is not None
    }
    _restored.is_named, _restored.optimizer, _restored.options = True, name, saved_options
    restored = {PREFIX + k: v for k, v in saved_options.items() if k not in _flags.options}
    if not _flags.is_named:
        args.optimizer = "adam"  # as ``_StoreOptimizer`` does
        restored[PREFIX + "optimizer"] = name
    for key, value in restored.items():
        setattr(args, key, value)
    return restored


class _StoreOption(argparse.Action):
    """Stores the value of a flag in the namespace, and for ``parsed``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value of one occurrence of the flag."""
        setattr(namespace, self.dest, values)
        _flags.options[self.dest.removeprefix(PREFIX)] = values


class _StoreOptimizer(argparse.Action):
    """Stores --optimizer, as "adam" if it names one of ours, and the name itself for ``parsed``.

    Ours use the machinery that Megatron has for Adam. For other names it makes checks, and turns
    the distributed optimizer off, which is right for its own optimizers only.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value of one occurrence of the flag."""
        is_ours = values in TYPES
        setattr(namespace, self.dest, "adam" if is_ours else values)
        namespace.spectral_optimizer = values if is_ours else None
        _flags.is_named, _flags.optimizer = True, values if is_ours else None


def add_spectral_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--optimizer spectral_...``, and ``--spectral-OPTION`` for every option, to a parser.

    Megatron-LM's parsers have these flags already, once ``spectral_dist.integrations.megatron`` has
    been imported; this is for parsers of your own. A second call adds nothing. lr, weight decay,
    betas and eps are Megatron's own flags. Lists and tables are written as JSON:
    ``--spectral-scalars '["router"]'``.

    Returns:
        The same parser.
    """
    _clear(_flags)
    if isinstance(parser._option_string_actions.get("--optimizer"), _StoreOptimizer):
        return parser
    _extend_optimizer(parser)
    group = parser.add_argument_group("spectral_dist")
    for name, (parse, text) in sorted(_options().items()):
        group.add_argument(
            "--" + (PREFIX + name).replace("_", "-"),
            dest=PREFIX + name,
            action=_StoreOption,
            type=parse,
            default=None,
            metavar=name.upper(),
            help=text,
        )
    return parser


def _extend_optimizer(parser: argparse.ArgumentParser) -> None:
    """Add our optimizers to the choices of a parser's --optimizer, or add that flag."""
    flag: Any = parser._option_string_actions.get("--optimizer")
    if flag is None:
        names = list(TYPES)
        parser.add_argument("--optimizer", action=_StoreOptimizer, choices=names, required=True)
        return
    if flag.choices is not None:
        flag.choices = [*flag.choices, *TYPES]
    flag.__class__ = _StoreOptimizer  # argparse's own class stores the value, and does no more


def _options() -> dict[str, tuple[Callable[[str], Any], str]]:
    """Return {option: (parser of its value, help text)}, without Megatron's own options."""
    optimizers_of: dict[str, list[str]] = {}
    options: dict[str, tuple[Callable[[str], Any], str]] = {}
    for name, cls in TYPES.items():
        for option in fields(cls.options_type):
            if option.name in MEGATRON_SETTINGS or option.name == "scalar_weight_decay":
                continue
            spec = specs_of(cls.options_type)[option.name]
            optimizers_of.setdefault(option.name, []).append(name)
            text = f"{spec.doc} Default: {option.default}."
            options.setdefault(option.name, (_parser(spec), text))
    for name in ROUTING:
        options[name] = (parse_value, "As of param_groups; JSON.")
        optimizers_of[name] = list(TYPES)
    return {
        name: (parse, f"{text} Of {', '.join(optimizers_of[name])}.".replace("%", "%%"))
        for name, (parse, text) in options.items()
    }


def _parser(spec: OptionSpec) -> Callable[[str], Any]:
    """Return a function that parses an option's value, with argparse's error for a bad one."""

    def parse(text: str) -> Any:
        try:
            return spec.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse

"""The names of optimizers: whatever has a list of them reads it here.

A rule is registered by ``@register("name")`` in its own file. This package's rules are found by
looking into the folder; those of other packages by their entry points in ``ENTRY_POINTS``, each the
module that registers them:

    [project.entry-points."spectral_dist.rules"]
    signed = "my_package.signed"
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from spectral_dist._error_help import explained
from spectral_dist._errors import suggest
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import BaseOptions

if TYPE_CHECKING:
    from spectral_dist.rules.base import Rule

ENTRY_POINTS = "spectral_dist.rules"
R = TypeVar("R", bound="type[Rule[Any]]")


@dataclass(frozen=True)
class Entry:
    """One registered optimizer.

    Attributes:
        name: in flags and YAML, as "muon".
        title: of its class in torch, as "Muon".
        options: the class of its options.
        rule: its rule; None if the optimizer orthogonalizes no matrix.
    """

    name: str
    title: str
    options: type[BaseOptions]
    rule: type[Rule[Any]] | None

    @property
    def deepspeed_type(self) -> str:
        """Return its type in DeepSpeed's JSON, as "SpectralMuon"."""
        return f"Spectral{self.title}"

    @property
    def megatron_name(self) -> str:
        """Return its name for Megatron's --optimizer, as "spectral_muon"."""
        return f"spectral_{self.name}"


_entries: dict[str, Entry] = {}
_listeners: list[Callable[[Entry], None]] = []


def register(name: str) -> Callable[[R], R]:
    """Return the decorator that registers a rule; the optimizer's title is the name of the class.

    Args:
        name: lower case letters, digits and underscores.

    Raises:
        ValueError: a name or title that is taken or malformed, or a rule without options.
    """

    @explained
    def decorate(rule: R) -> R:
        """Register the rule and return it."""
        if getattr(rule, "options_type", None) is None:
            raise ValueError(
                f"rule {rule.__name__} has no options; write class {rule.__name__}(Rule[...]) with"
                " a frozen dataclass derived from spectral_dist.rules.options.MatrixOptions"
            )
        add(Entry(name, rule.__name__, rule.options_type, rule))
        return rule

    return decorate


@explained
def add(entry: Entry) -> None:
    """Register an optimizer, and pass it to all listeners.

    Raises:
        ValueError: a name or title that is taken or malformed.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", entry.name):
        raise ValueError(
            f"{entry.name!r} is no name for a rule; write lower case letters, digits and _"
        )
    for known in _entries.values():
        both = known.title == entry.title and known.rule and entry.rule
        if both and known.rule.__module__ == entry.rule.__module__:
            continue  # the same module, loaded again
        if entry.name == known.name or entry.title.lower() == known.title.lower():
            raise ValueError(
                f"an optimizer {known.name!r} ({known.title}) is registered already, by"
                f" {(known.rule or known.options).__module__}; take another name"
            )
    specs_of(entry.options)
    _entries[entry.name] = entry
    for listener in _listeners:
        listener(entry)


def entries() -> list[Entry]:
    """Return every optimizer: first this package's, then those of other packages."""
    _load_builtin()
    _load_entry_points()
    return list(_entries.values())


def builtin_entries() -> list[Entry]:
    """Return this package's optimizers that have a rule, without looking for others."""
    _load_builtin()
    return [e for e in _entries.values() if e.rule and e.rule.__module__.startswith(__package__)]


def add_listener(listener: Callable[[Entry], None]) -> None:
    """Call ``listener`` with every optimizer, now and whenever one is registered."""
    for entry in entries():
        listener(entry)
    _listeners.append(listener)


@explained
def find(name: str) -> Entry:
    """Return the optimizer of this name.

    Raises:
        ValueError: there is none; with the nearest name and the list.
    """
    known = {entry.name: entry for entry in entries()}
    if name not in known:
        raise ValueError(f"unknown optimizer {name!r}{suggest(str(name), known)}")
    return known[name]


def option_names(kind: str | None = None) -> frozenset[str]:
    """Return the names of the options of all optimizers.

    Args:
        kind: of parameter groups: only options that such a group can carry; None is all.
    """
    return _option_names(kind, len(entries()))


@cache
def _option_names(kind: str | None, count: int) -> frozenset[str]:
    """Return what ``option_names`` returns, anew when there are more optimizers."""
    names: set[str] = set()
    for entry in _entries.values():
        if kind is None:
            names |= specs_of(entry.options).keys()
        elif kind in entry.options.kinds():
            names |= entry.options.names(kind)
    return frozenset(names)


def nearest_option(word: str) -> str | None:
    """Return the option of any optimizer that a word may have been meant for, or None."""
    near = difflib.get_close_matches(word, option_names(), n=1, cutoff=0.85)
    return near[0] if near else None


@cache
def _load_builtin() -> None:
    """Import every module of this package, each of which registers its rule."""
    package = importlib.import_module("spectral_dist.rules")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "adamw_apex":  # needs apex
            importlib.import_module(f"spectral_dist.rules.{module.name}")


@cache
def _load_entry_points() -> None:
    """Import the rules of other packages; warn of those that do not load."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            warnings.warn(
                f"the rule {point.name!r} of {point.dist.name if point.dist else point.value} does"
                f" not load, so it is not there: {type(error).__name__}: {error}",
                stacklevel=3,
            )

"""The section ``spectral`` of a YAML whose trainer stands on transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from spectral_dist._error_help import explained
from spectral_dist.core.named import class_of
from spectral_dist.poet.convert import SETTINGS, settings_of
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING

SECTION = "spectral"
"""The name of the section."""
ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Options that the trainer's own keys say."""


class Section(NamedTuple):
    """What a section says, checked."""

    keywords: dict[str, Any]
    """of ``SpectralFactory``: the optimizer's name, its options and those of ``param_groups``"""
    rotation: dict[str, Any] | None
    """keywords of ``spectral_dist.poet.convert``; None: the optimizer is not POET"""


@explained
def read(section: Any) -> Section:
    """Return what a section says: ``{"optimizer": "muon", "momentum": 0.95}``.

    Raises:
        ValueError: it names no optimizer, an unknown one, an unknown option or a bad value, or an
            option that the trainer's own keys say.
    """
    if not isinstance(section, Mapping) or "optimizer" not in section:
        raise ValueError(f"{SECTION} is {section!r}; write {{optimizer: muon, momentum: 0.95}}")
    keywords = dict(section)
    for name, key in ARGUMENTS.items():
        if name in keywords:
            raise ValueError(f"{SECTION} has {name}; write {key} beside {SECTION}")
    name = keywords.pop("optimizer")
    entry = registry.find(name)
    options_type = class_of(entry).options_type if entry.rule is not None else POET.options_type
    routing = {key: keywords.pop(key) for key in ROUTING if key in keywords}
    if entry.rule is not None:
        options_type.from_user(keywords, SECTION)
        return Section({"optimizer": name, **routing, **keywords}, None)
    for key in routing.keys() - {"matrices", "scalars"}:
        raise ValueError(f"{SECTION}: {key} has no effect: {entry.title} orthogonalizes no matrix")
    rotation = {key: keywords.pop(key) for key in SETTINGS if key in keywords}
    settings_of(rotation)
    options_type.from_user(keywords, SECTION)
    return Section({"optimizer": name, **keywords}, {**routing, **rotation})


def check_deepspeed(args: Any, where: str) -> None:
    """Raise a ValueError if DeepSpeed's JSON has an optimizer, which the Trainer takes then.

    Args:
        args: the TrainingArguments.
        where: the setting that names an optimizer of ours.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None and "optimizer" in config.config:
        raise ValueError(
            f"{where} names an optimizer, and so does DeepSpeed's JSON, whose one the Trainer"
            f" takes: leave out optimizer there, or {where} here"
        )

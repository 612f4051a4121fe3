"""The section ``spectral`` of a YAML whose trainer stands on transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from spectral_dist._error_help import explained
from spectral_dist._errors import suggest
from spectral_dist.core.named import class_of
from spectral_dist.poet.convert import SETTINGS, settings_of
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.rules.fields import specs_of
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
    if entry.rule is None:
        keywords, rotation = split_rotation(keywords, SECTION)
        POET.options_type.from_user(keywords, SECTION)
        return Section({"optimizer": name, **keywords}, rotation)
    options = {key: value for key, value in keywords.items() if key not in ROUTING}
    class_of(entry).options_type.from_user(options, SECTION)
    return Section({"optimizer": name, **keywords}, None)


def split_rotation(
    keywords: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return POET's own options, and keywords of ``spectral_dist.poet.convert``.

    Args:
        keywords: both of them.
        where: they are from, for errors.

    Raises:
        ValueError: an unknown name, a bad setting of ``convert``, or an option of ``param_groups``
            that it has not.
    """
    converts = (*SETTINGS, "matrices", "scalars")
    known = {*specs_of(POET.options_type), *converts}
    for key in keywords:
        if key in ROUTING and key not in converts:
            raise ValueError(f"{where}: {key} has no effect: POET orthogonalizes no matrix")
        if key not in known:
            raise ValueError(f"{where}: unknown option {key!r}{suggest(key, known)}")
    rotation = {key: value for key, value in keywords.items() if key in converts}
    settings_of({key: value for key, value in rotation.items() if key in SETTINGS})
    return {key: value for key, value in keywords.items() if key not in converts}, rotation


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

"""POET under DeepSpeed: the model is converted before the engine has it, and merged after steps.

An engine flattens or partitions the trainable parameters when it is built, so W must be frozen
before. And the model's parameters are copies of the tensors that the optimizer steps, written after
its step, so the merge has to come after that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectral_dist import poet
from spectral_dist._errors import suggest
from spectral_dist.integrations.deepspeed import _compat
from spectral_dist.poet.convert import SETTINGS
from spectral_dist.poet.layer import PoetLayer
from spectral_dist.poet.optimizer import POET
from spectral_dist.poet.options import POETOptions

NAME = "SpectralPOET"
CONVERSION = (*SETTINGS, "matrices", "scalars")
"""The names in the JSON's params that are arguments of ``poet.convert``."""

_converted: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()
"""The settings that each model was converted by here, to allow a second ``deepspeed.initialize``
with a corrected configuration."""


def split_params(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a JSON's params into (arguments of ``poet.convert``, options of the optimizer).

    Raises:
        ValueError: an unknown name, or a bad option.
    """
    known = (*POETOptions.__dataclass_fields__, *CONVERSION)
    for name in params:
        if name not in known:
            raise ValueError(f"{NAME}: unknown option {name!r}{suggest(name, known)}")
    options = {name: value for name, value in params.items() if name not in CONVERSION}
    POETOptions.from_user(options, NAME)
    return {name: value for name, value in params.items() if name in CONVERSION}, options


def layers_of(model: nn.Module) -> list[PoetLayer]:
    """Return the rotated layers of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, PoetLayer)]


def convert(engine: Any, model: nn.Module) -> None:
    """Convert the model by the settings in the engine's JSON, unless it is converted already.

    Raises:
        ValueError: a bad setting, or one that would have no effect on a converted model.
    """
    settings, options = split_params(engine.optimizer_params() or {})
    check_clip(engine, options.get("clip_ramp", 0))
    if not layers_of(model):
        poet.convert(model, **settings)
        _converted[model] = settings
        return
    earlier = _converted.get(model)
    if earlier is None and settings:
        raise ValueError(
            f"{NAME}: the model has been converted by spectral_dist.poet.convert already, so"
            f" {', '.join(settings)} would have no effect; take them out of the JSON, or leave the"
            " conversion to it"
        )
    if earlier is not None and earlier != settings:
        raise ValueError(
            f"{NAME}: an earlier deepspeed.initialize has converted this model with other"
            f" settings, {earlier}; build it anew for {settings}"
        )


def cast_skews(engine: Any) -> None:
    """Cast the skew parameters to the 16-bit dtype of the engine, if it has one.

    DeepSpeed keeps float32 master copies of the model's parameters. Skew parameters that stage 3 or
    ``zero.Init`` has partitioned are left as they are.
    """
    if engine.fp16_enabled():
        dtype = torch.float16
    elif engine.bfloat16_enabled():
        dtype = torch.bfloat16
    else:
        return
    for layer in layers_of(engine.module):
        for skew in layer.skews.values():
            if not _compat.is_partitioned(skew):
                skew.data = skew.data.to(dtype)


def insert_skew_params(items: Iterable[Any], model: nn.Module) -> list[Any]:
    """Return ``model_parameters`` with the skew parameters that it lacks inserted after their W.

    It lacks them if the user listed the parameters before the engine converted the model.

    Args:
        items: parameters, (name, parameter) pairs or groups of them, as ``deepspeed.initialize``
            was given them.
        model: the converted model.

    Raises:
        ValueError: trainable parameters of the model are in no item.
    """
    groups = [{**i, "params": _list(i["params"])} if isinstance(i, dict) else i for i in items]
    listed = [p for i in groups for p in (i["params"] if isinstance(i, dict) else [i])]
    listed_ids = {id(_param(p)) for p in listed}
    skews_of: dict[int, list[Tensor]] = {}
    for layer in layers_of(model):
        skews_of[id(layer.weight)] = [s for s in layer.skews.values() if id(s) not in listed_ids]
    inserted: list[Any] = []
    for item in groups:
        parameters = item["params"] if isinstance(item, dict) else [item]
        skews = [skew for p in parameters for skew in skews_of.pop(id(_param(p)), ())]
        listed_ids |= {id(skew) for skew in skews}
        if not isinstance(item, dict):
            inserted += [item, *(("skew", s) if isinstance(item, tuple) else s for s in skews)]
            continue
        inserted.append(item)
        if skews:  # a group of their own, without W's decay: rotations have none
            options = {k: v for k, v in item.items() if k != "weight_decay"}
            inserted.append(options | {"params": skews})
    named = model.named_parameters()
    missing = [n for n, p in named if p.requires_grad and id(p) not in listed_ids]
    if missing:
        raise ValueError(
            f"{NAME}: model_parameters leaves out {len(missing)} trainable parameters"
            f" ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}); freeze what is not to be"
            " trained (requires_grad_(False)) before deepspeed.initialize, or leave"
            " model_parameters out"
        )
    return inserted


def _list(parameters: Any) -> list[Any]:
    """Return the parameters of a group as a list: torch allows a single one."""
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _param(item: Any) -> Any:
    """Return the parameter of an item that is one, or a (name, parameter) pair."""
    return item[1] if isinstance(item, tuple) else item


def check_clip(engine: Any, ramp: int) -> None:
    """Raise a ValueError if ``clip_ramp`` is set, but the engine does not clip gradients."""
    if ramp and not engine.gradient_clipping():
        raise ValueError(
            f"clip_ramp is {ramp}, but gradient_clipping is 0, so it would have no effect; write"
            ' "gradient_clipping" in the JSON, or leave clip_ramp out'
        )


def merge_after_steps(engine: Any, optimizer: POET) -> None:
    """Make this engine's steps clip as ``clip_ramp`` says, and end with the merge if it is due."""

    def step(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        with _compat.scaled_clip_limit(engine, optimizer.clip_factor()):
            original(*args, **kwargs)
        optimizer.merge_if_due()  # a skipped step is not counted, so it makes no merge due

    _compat.wrap_step(engine, step)

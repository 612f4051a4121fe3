"""POET under DeepSpeed: the model is converted before the engine has it, and merged after steps.

An engine flattens or partitions what is trainable when it is built, so W must be frozen before;
and the model's parameters are copies of what the optimizer steps on, written after its step, so
the merge comes then.
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
"""What of the JSON's params is for ``poet.convert``."""

_converted: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()
"""Models that were converted here, and how: for another try with a mended config."""


def divided(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is for ``poet.convert``, the optimizer's options) of a JSON's params.

    Raises:
        ValueError: an unknown name, or a bad option.
    """
    known = (*POETOptions.__dataclass_fields__, *CONVERSION)
    for name in given:
        if name not in known:
            raise ValueError(f"{NAME}: unknown option {name!r}{suggest(name, known)}")
    options = {name: value for name, value in given.items() if name not in CONVERSION}
    POETOptions.from_user(options, NAME)
    return {name: value for name, value in given.items() if name in CONVERSION}, options


def layers_of(model: nn.Module) -> list[PoetLayer]:
    """The rotated layers of a model."""
    return [module for module in model.modules() if isinstance(module, PoetLayer)]


def convert(engine: Any, model: nn.Module) -> None:
    """Convert the model by the engine's JSON, unless it has been.

    Raises:
        ValueError: also settings that would have no effect.
    """
    given, options = divided(engine.optimizer_params() or {})
    check_clip(engine, options.get("clip_ramp", 0))
    if not layers_of(model):
        poet.convert(model, **given)
        _converted[model] = given
        return
    before = _converted.get(model)
    if before is None and given:
        raise ValueError(
            f"{NAME}: the model has been converted by spectral_dist.poet.convert already, so"
            f" {', '.join(given)} would have no effect; take them out of the JSON, or leave the"
            " conversion to it"
        )
    if before is not None and before != given:
        raise ValueError(
            f"{NAME}: an earlier deepspeed.initialize has converted this model with other"
            f" settings, {before}; build it anew for {given}"
        )


def cast_skews(engine: Any) -> None:
    """To the dtype of the model, of which masters are copies: not done after ``zero.Init``."""
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


def with_skews(items: Iterable[Any], model: nn.Module) -> list[Any]:
    """``model_parameters``, with the skews that are not there where their W stands.

    They may have been listed before the conversion.

    Raises:
        ValueError: trainable parameters that are left out.
    """
    groups = [{**i, "params": _list(i["params"])} if isinstance(i, dict) else i for i in items]
    listed = [p for i in groups for p in (i["params"] if isinstance(i, dict) else [i])]
    there = {id(_bare(p)) for p in listed}
    of: dict[int, list[Tensor]] = {}
    for layer in layers_of(model):
        of[id(layer.weight)] = [p for p in layer.skews.values() if id(p) not in there]
    found: list[Any] = []
    for item in groups:
        parameters = item["params"] if isinstance(item, dict) else [item]
        skews = [skew for p in parameters for skew in of.pop(id(_bare(p)), ())]
        there |= {id(skew) for skew in skews}
        if not isinstance(item, dict):
            found += [item, *(("skew", s) if isinstance(item, tuple) else s for s in skews)]
            continue
        found.append(item)
        if skews:  # in a group of their own, without the decay that was W's: they have none
            found.append({k: v for k, v in item.items() if k != "weight_decay"} | {"params": skews})
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in there]
    if missing:
        raise ValueError(
            f"{NAME}: model_parameters leaves out {len(missing)} trainable parameters"
            f" ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}); freeze what is not to be"
            " trained (requires_grad_(False)) before deepspeed.initialize, or leave"
            " model_parameters out"
        )
    return found


def _list(parameters: Any) -> list[Any]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _bare(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item


def check_clip(engine: Any, ramp: int) -> None:
    """ValueError if there is no limit for ``clip_ramp`` to act on."""
    if ramp and not engine.gradient_clipping():
        raise ValueError(
            f"clip_ramp is {ramp}, but gradient_clipping is 0, so it would have no effect; write"
            ' "gradient_clipping" in the JSON, or leave clip_ramp out'
        )


def merge_after_steps(engine: Any, optimizer: POET) -> None:
    """Have this engine's steps end with the merge, if it is due, and clip as ``clip_ramp`` says."""

    def step(take: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        with _compat.clipping(engine, optimizer.clip_factor()):
            take(*args, **kwargs)
        optimizer.merge_if_due()  # a skipped step is none of Adam's, and makes no merge due

    _compat.around_step(engine, step)

"""``save_pretrained`` of a model that POET trains: right for from_pretrained, and to resume."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spectral_dist.params.classify import unwrap
from spectral_dist.params.spec import plain_name
from spectral_dist.poet.layer import FROZEN_WEIGHT, PoetLayer


def export_on_save(model: nn.Module) -> None:
    """Let ``model.save_pretrained`` write the rotated weights, as from_pretrained needs them.

    Beside them are the frozen weights and the rotations, which ``load_state_dict`` of a converted
    model takes: the Trainer resumes bit by bit. A file has the converted weights twice.
    ``SpectralFactory`` calls this.

    Args:
        model: of transformers, converted by ``spectral_dist.poet.convert``.

    Raises:
        ValueError: the model has no save_pretrained.
    """
    model, _ = unwrap(model)
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise ValueError(
            f"export_on_save: a {type(model).__name__} has no save_pretrained; write"
            " torch.save(spectral_dist.poet.export(model), file)"
        )
    if hasattr(save, "writes_rotated"):
        return
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        state = call.arguments.get("state_dict")
        state = model.state_dict() if state is None else state
        call.arguments["state_dict"] = with_rotated(model, state)
        return save(*call.args, **call.kwargs)

    save_pretrained.writes_rotated = True  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained  # type: ignore[assignment]


def with_rotated(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with R_o W R_i as each weight, and W beside it as ``FROZEN_WEIGHT``.

    Args:
        model: whose layers have the rotations.
        state: the model's whole state dict, or none of it on a rank that does not save.
    """
    names = {plain_name(name): name for name in state}
    exported = dict(state)
    for key, layer in model.named_modules():
        key = plain_name(key)
        if not isinstance(layer, PoetLayer) or f"{key}.weight" not in names:
            continue
        weight = state[names[f"{key}.weight"]]
        skews = {leaf: state[names[f"{key}.{leaf}"]] for leaf in layer.skews}
        rotated = layer.rotated_weight(weight, skews).to(weight.dtype)
        exported[names[f"{key}.weight"]] = rotated.contiguous()
        exported[f"{key}.{FROZEN_WEIGHT}"] = weight
    return exported

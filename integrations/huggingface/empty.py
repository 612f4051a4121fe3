"""Models of transformers without memory, of which only shapes are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from spectral_dist._errors import nearest


def empty_model(fields: Mapping[str, Any], where: object) -> nn.Module:
    """Return a causal language model of any architecture that transformers knows.

    Args:
        fields: of its config.json.
        where: they are from, for errors.

    Returns:
        The model on the meta device.

    Raises:
        ValueError: no model can be built from the fields.
    """
    kind = fields.get("model_type") if isinstance(fields, Mapping) else None
    if kind not in CONFIG_MAPPING:
        suggestion = nearest(str(kind), list(CONFIG_MAPPING))
        hint = f"; did you mean {suggestion!r}?" if suggestion else ""
        raise ValueError(f"{where}: model_type is {kind!r}, which transformers does not know{hint}")
    try:
        config = AutoConfig.for_model(**fields)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises errors of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"no model can be built from {where}: {reason}") from error
    return model

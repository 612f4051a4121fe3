"""Output heads of a model, recognized by type, tying and shape, never by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

BY_SIZE = "output head (as many outputs as the embedding has entries)"
"""How a head is recognized that is not tied and that the model does not name."""


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return a parameter's unsharded shape.

    ZeRO-3 empties parameters, and keeps their shape in ``ds_shape``.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def output_heads(model: nn.Module) -> dict[int, str]:
    """Return {id of a parameter that maps to the vocabulary: how it was recognized}."""
    heads: dict[int, str] = {}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    embedded = {id(m.weight) for m in embeddings}
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if isinstance(head, nn.Module) and isinstance(getattr(head, "weight", None), nn.Parameter):
        heads[id(head.weight)] = "output head (get_output_embeddings)"
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        if id(linear.weight) in embedded:
            heads[id(linear.weight)] = "output head tied to the embedding"
    if heads or not embeddings:
        return heads
    vocabulary = max(m.num_embeddings for m in embeddings)
    linears_by_name = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    name = vocabulary_head(
        [(name, full_shape(m.weight)[0]) for name, m in linears_by_name.items()], vocabulary
    )
    return heads if name is None else {id(linears_by_name[name].weight): BY_SIZE}


def vocabulary_head(linears: Sequence[tuple[str, int]], vocabulary: int) -> str | None:
    """Return the name of the Linear that maps to the vocabulary, or None.

    A head has an output for each entry of the largest embedding. A Linear inside of a numbered
    block may have as many outputs by chance, so such ones are passed over; of the others, the head
    is the last.

    Args:
        linears: (name, number of outputs) of every Linear of the model, in its order.
        vocabulary: the number of entries of the largest embedding.
    """
    # a name that recurs with other numbers (layers.0.down, layers.1.down) belongs to a block
    patterns = [re.sub(r"\d+", "*", name) for name, _ in linears]
    for index, (name, outputs) in reversed(list(enumerate(linears))):
        is_last = index == len(linears) - 1
        is_unique_last = is_last and patterns.count(patterns[index]) == 1
        in_block = any(map(str.isdigit, name.split(".")[:-1]))
        if outputs == vocabulary and (is_unique_last or not in_block):
            return name
    return None

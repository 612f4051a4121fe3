"""Output heads of a model, recognized by type, tying and shape, never by name."""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import nn


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
    # The vocabulary is that of the largest embedding, and a head has an output for each entry. A
    # Linear inside of a numbered block may have as many outputs by chance, so such ones are passed
    # over; of the others, the head is the last.
    vocabulary = max(m.num_embeddings for m in embeddings)
    candidates = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and full_shape(m.weight)[0] == vocabulary
    ]
    # a name that recurs with other numbers (layers.0.down, layers.1.down) belongs to a block
    name_counts = Counter(
        re.sub(r"\d+", "*", name) for name, m in model.named_modules() if isinstance(m, nn.Linear)
    )
    for name, m in candidates[::-1]:
        is_unique_last = m is linears[-1] and name_counts[re.sub(r"\d+", "*", name)] == 1
        if is_unique_last or not any(map(str.isdigit, name.split(".")[:-1])):
            heads[id(m.weight)] = "output head (as many outputs as the embedding has entries)"
            break
    return heads

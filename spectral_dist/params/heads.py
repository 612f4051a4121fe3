"""Which Linear of a model is its output head: found by type, tying and shape, never by name."""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import nn


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The unsharded shape; ZeRO-3 empties parameters and keeps their shape in ``ds_shape``."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def output_heads(model: nn.Module) -> dict[int, str]:
    """ids of parameters that map to the vocabulary, with how each was found."""
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
    # The vocabulary is the largest embedding, and a head has an output for each of its entries. A
    # Linear inside a numbered block may have as many by chance; of several others, it is the last.
    vocabulary = max(m.num_embeddings for m in embeddings)
    candidates = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and full_shape(m.weight)[0] == vocabulary
    ]
    # a name that recurs with other numbers, layers.0.down and layers.1.down, is a block's own
    shared = Counter(
        re.sub(r"\d+", "*", name) for name, m in model.named_modules() if isinstance(m, nn.Linear)
    )
    for name, m in candidates[::-1]:
        alone = m is linears[-1] and shared[re.sub(r"\d+", "*", name)] == 1
        if alone or not any(map(str.isdigit, name.split(".")[:-1])):
            heads[id(m.weight)] = "output head (as many outputs as the embedding has entries)"
            break
    return heads

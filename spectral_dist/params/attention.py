"""The heads of attention projections that hold q, k or v alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from spectral_dist.params.architectures import equal_heads, head_size

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_b_proj", "", ""),
    ("wq_b", "", ""),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "", ""),
    ("q_attn", "", ""),
)
"""The names that modules give to their projections q, k and v; "": they hold none of that name."""


def projection_head(holder: nn.Module, leaf: str) -> int:
    """Return the rows of each head in the weight of a layer that holds q, k or v; 0: it does not.

    Args:
        holder: the module that has the layer.
        leaf: the layer's name in it.
    """
    for names in PROJECTIONS:
        if leaf not in names:
            continue
        beside = [name for name in names[:2] if name]
        if all(isinstance(getattr(holder, name, None), nn.Module) for name in beside):
            query: Any = getattr(holder, names[0])
            rows = getattr(query, "out_features", getattr(query, "nf", 0))
            size = head_size(holder) or equal_heads(holder, rows)
            values: Any = getattr(holder, "v_head_dim", size)
            return values if leaf == names[2] and isinstance(values, int) else size
    return 0


def packed_heads(module: nn.Module, leaf: str) -> tuple[int, ...]:
    """Return the rows of each head in each part of a weight of ``nn.MultiheadAttention``."""
    if not isinstance(module, nn.MultiheadAttention) or not leaf.endswith("_proj_weight"):
        return ()
    return (module.head_dim,) * (3 if leaf == "in_proj_weight" else 1)

"""Polar factors of batches of matrices: pure functions, no torch.distributed."""

from spectral_dist.polar.api import (
    DTYPES,
    METHODS,
    Method,
    check,
    null_cutoff,
    polar,
    resolve_dtype,
    rows_of,
)
from spectral_dist.polar.graphs import set_graphs
from spectral_dist.polar.products import set_products

__all__ = [
    "DTYPES",
    "METHODS",
    "Method",
    "check",
    "null_cutoff",
    "polar",
    "resolve_dtype",
    "rows_of",
    "set_graphs",
    "set_products",
]

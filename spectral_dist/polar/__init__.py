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

__all__ = [
    "DTYPES",
    "METHODS",
    "Method",
    "check",
    "null_cutoff",
    "polar",
    "resolve_dtype",
    "rows_of",
]

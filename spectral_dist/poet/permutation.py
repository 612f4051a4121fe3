"""Permutations, from a stable hash, that decide which rows or columns are in which block.

A dimension is cut into ``segments`` contiguous parts, each permuted within itself: blocks never
cross the ranks of a tensor-parallel size that divides ``segments``, and the permutation of a
segment depends neither on that size nor on other generators.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def permutation(size: int, *key: object) -> Tensor:
    """Return a permutation of 0 .. size - 1, int64 on the CPU, by the key's text alone."""
    return torch.randperm(size, generator=generator(*key))


def generator(*key: object) -> torch.Generator:
    """Return a generator on the CPU, seeded by the key's text alone."""
    text = "/".join(map(str, key))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)

"""The registered optimizers, and a small model for any of them."""

from __future__ import annotations

import torch
from torch import nn

from spectral_dist.rules import registry

ENTRIES = registry.entries()
RULES = [entry for entry in ENTRIES if entry.rule is not None]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6, bias=False))

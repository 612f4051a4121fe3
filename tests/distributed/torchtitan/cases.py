"""The cases of the tests, and the numbers of their runs."""

from __future__ import annotations

from typing import Any

STEPS, SAVED_AT, ROWS, LENGTH, WARMUP, CLIP = 4, 2, 4, 16, 2, 1.0
MICRO = 2
"""Batches whose gradients are accumulated in a step."""
LR, SCALAR_LR = 0.02, 0.005
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"polar_dtype": "float32"},
    "sumo": {"rank": 8, "period": 3},
    "normuon": {"polar_dtype": "float32"},
    "poet": {"merge_every": 2, "eps": 1e-4},
}
LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "fsdp": {"data_parallel_shard_degree": 2},
    "replicate": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1},
    "tp": {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 1},
    "pp": {"pipeline_parallel_degree": 2, "data_parallel_shard_degree": 1},
}
TITLES = {"muon": "Muon", "sumo": "SUMO", "normuon": "NorMuon", "poet": "POET"}
BLOCK = 16
"""The size of the blocks of POET's rotations."""

"""Megatron's TEGroupedMLP on a CPU, for ranks; Transformer Engine's grouped layer is a loop here.

Its weights are shaped, named and marked as those of TEGroupedLinear, by Megatron's own function.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """TEGroupedLinear: weight0, weight1, ... of this rank's experts, cut by expert TP."""

    mode = ""

    def __init__(
        self, number: int, inputs: int, outputs: int, *, config: Any, pg_collection: Any,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        engine: Any = importlib.import_module("megatron.core.extensions.transformer_engine")
        size = pg_collection.expt_tp.size()
        rows, columns = (outputs // size, inputs) if self.mode == "column" else (
            outputs, inputs // size)  # fmt: skip
        for i in range(number):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.zeros(rows, columns)))
        own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        engine._set_expert_parameter_attributes(self, self.mode, own_groups)
        if self.mode == "column" and config.gated_linear_unit:
            for weight in self.parameters():
                weight.gate_and_up = True  # for the tests' own cutting

    def forward(self, tokens: Tensor, numbers: list[int]) -> tuple[Tensor, None]:
        parts = zip(tokens.split(numbers), self.parameters(), strict=True)
        return torch.cat([part @ weight.T for part, weight in parts]), None


class Column(GroupedLinear):
    mode = "column"


class Row(GroupedLinear):
    mode = "row"


def group_experts(spec: Any) -> None:
    """Make the experts of a layer's spec of Megatron's one TEGroupedMLP."""
    experts: Any = importlib.import_module("megatron.core.transformer.moe.experts")
    submodules = experts.GroupedMLPSubmodules(linear_fc1=Column, linear_fc2=Row)
    moe = spec.submodules.mlp.keywords["submodules"]
    moe.experts = functools.partial(experts.TEGroupedMLP, submodules=submodules)

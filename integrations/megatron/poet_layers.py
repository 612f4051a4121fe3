"""POET's rotated layers for Megatron: column- and row-parallel linear layers as R_o W R_i.

Each tensor-parallel rank has its own tile of W, and its own blocks of the rotation of the dimension
that is cut. The rotation of the other dimension is the same on all of them, and acts outside of
Megatron's communication: before the gather of a ColumnParallelLinear's input, and after the
reduction of a RowParallelLinear's output. So the gradient of that rotation is complete on every
rank; under sequence parallelism it is that of the rank's tokens, which Megatron then sums over
ranks, as it sums those of norms. A merge communicates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from spectral_dist.integrations.megatron import _compat
from spectral_dist.poet.layer import PoetLayer
from spectral_dist.sharding import collectives


class PoetParallelLinear(PoetLayer):
    """The base of both kinds of rotated layers: checkpoints, and the whole matrix for reports.

    Attributes:
        axis: the dimension of the weight that tensor parallelism cuts.
        adds_bias: whether the layer adds its bias, after R_o; Megatron's own forward pass, which
            comes before R_o, no longer does.
        tp_group: Megatron's tensor-parallel group, of one rank too.
    """

    axis: int
    adds_bias: bool
    bias: Any
    tp_group: Any

    def full_weight(self, weight: Tensor) -> Tensor:
        """Return the whole matrix, of which ``weight`` is this rank's tile.

        Rows of a fused weight are in the order of ranks, not matrix by matrix. A collective call
        of the tensor-parallel ranks.
        """
        if self.group is None:
            return weight
        tiles = collectives.all_gather(weight.flatten(), self.group, collectives.Meter()).wait()
        parts = tiles.view(collectives.size(self.group), *weight.shape)
        return torch.cat(list(parts), self.axis)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Any = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the sharded state dict of the layer, as Megatron's layers do.

        Skew parameters of the cut dimension are tiles, those of the other one are copies.

        Args:
            prefix: of keys.
            sharded_offsets, metadata: as Megatron passes them on.
        """
        axes = {"weight": self.axis} | {r.skew: 0 for r in self.rotations if r.ranks > 1}
        if self.axis == 0:
            axes["bias"] = 0
        sharded: dict[str, Any] = _compat.make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )  # fmt: skip
        return sharded

    def set_extra_state(self, state: Any) -> None:
        """Load the number of merges.

        Raises:
            ValueError: the checkpoint has none, or the layer was built with other settings.
        """
        if not isinstance(state, Tensor):
            raise ValueError(
                f"{self.key}: the checkpoint is of a model without rotations; load it before"
                " spectral_dist.integrations.megatron.poet.convert"
            )
        super().set_extra_state(state)

    def _fixed_settings(self) -> dict[str, int]:
        """Return the settings that have to be those of the checkpoint, by name."""
        blocks = {f"the block of {r.skew}": r.block for r in self.rotations}
        return {**super()._fixed_settings(), **blocks}


class PoetColumnParallelLinear(PoetParallelLinear, ColumnParallelLinear):  # type: ignore[misc]
    """A rotated ColumnParallelLinear: R_i before the input's gather, R_o on the rank's rows."""

    axis = 0

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, the bias if the caller has to add it), as Megatron's layer does.

        Args:
            input_: (sequence, batch, in), or this rank's tokens under sequence parallelism.
            weight: has to be None.
            runtime_gather_output: whether to gather the output; None: as the layer was built.

        Raises:
            ValueError: a weight is passed.
        """
        if weight is not None:
            raise ValueError(f"{self.key}: a rotated layer multiplies by its own weight only")
        output, bias = self.maybe_recompute(self._forward_rotated, input_), self.bias
        if self.adds_bias:
            output, bias = output + bias, None
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            output = _compat.gather_from_tensor_model_parallel_region(output, group=self.tp_group)
        return output, bias

    def _forward_rotated(self, x: Tensor) -> Tensor:
        """Return R_o W R_i x of this rank's rows."""
        turned = self.rotate_rows(x, self.inner)
        product, _ = super().forward(turned, runtime_gather_output=False)
        return self.rotate_rows(product, self.outer)


class PoetRowParallelLinear(PoetParallelLinear, RowParallelLinear):  # type: ignore[misc]
    """A rotated RowParallelLinear: R_i acts on the rank's columns, R_o after the sum over ranks."""

    axis = 1

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (output, the bias if the caller has to add it), as Megatron's layer does."""
        output = self.maybe_recompute(self._forward_rotated, input_)
        return (output + self.bias, None) if self.adds_bias else (output, self.bias)

    def _forward_rotated(self, x: Tensor) -> Tensor:
        """Return R_o W R_i x, summed over ranks before R_o."""
        product, _ = super().forward(self.rotate_rows(x, self.inner))
        return self.rotate_rows(product, self.outer)


KINDS: dict[type[nn.Module], type[PoetParallelLinear]] = {
    ColumnParallelLinear: PoetColumnParallelLinear,
    RowParallelLinear: PoetRowParallelLinear,
}
"""The rotated class of each supported class of layers."""

"""R_o W R_i x as one function: in the order of the blocks from the first product to the last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_dist.poet.rotation import block_gradients, put_back, turn_blocks


class RotatedProduct(torch.autograd.Function):
    """Rows x (t, n) -> (t, m) of a frozen W that all blocks of both sides rotate.

    x is permuted once, the result once, and W in between, which is smaller than what is multiplied
    by it: so W is kept in its own order. x and W R_i x are saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        inner: Tensor,
        outer: Tensor,
        *deltas: Tensor,
    ) -> Tensor:
        """``inner``, ``outer``: indices of blocks. ``deltas``: of inputs, then of outputs."""
        product = _multiply(x, weight, inner, outer, deltas[0])
        ctx.save_for_backward(x, weight, inner, outer, product, *deltas)
        result = x.new_empty(len(x), len(weight))
        return put_back(result, outer, turn_blocks(product, deltas[1:]), True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and of the deltas."""
        x, weight, inner, outer, product, *deltas = ctx.saved_tensors
        picked = gradient.index_select(1, outer)
        of_outer = block_gradients(product, picked, deltas[1:])
        back = turn_blocks(picked, [change.mT for change in deltas[1:]])
        back = back @ _permuted(weight, inner, outer).to(back.dtype)
        of_inner = block_gradients(x.index_select(1, inner), back, deltas[:1])
        of_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            of_x = put_back(x, inner, turn_blocks(back, [deltas[0].mT]), True)
        return of_x, None, None, None, *of_inner, *of_outer


def _multiply(x: Tensor, weight: Tensor, inner: Tensor, outer: Tensor, change: Tensor) -> Tensor:
    """W R_i x, its outputs in the order of the outer blocks."""
    turned = turn_blocks(x.index_select(1, inner), [change])
    return turned @ _permuted(weight, inner, outer).mT.to(turned.dtype)


def _permuted(weight: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    return weight.index_select(0, outer).index_select(1, inner)

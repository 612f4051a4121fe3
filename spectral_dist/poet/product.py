"""R_o W R_i x as one autograd function, in the order of the blocks between its two products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_dist.poet.rotation import block_gradients, rotate_blocks, scatter_columns


class RotatedProduct(torch.autograd.Function):
    """The product of rows x (t, n) with a frozen W that all blocks of both sides rotate: (t, m).

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
        """Return R_o W R_i x of each row.

        Args:
            ctx: autograd's context.
            x: rows (t, n).
            weight: W, (m, n).
            inner: indices of the blocks of inputs, block after block, (n,).
            outer: indices of the blocks of outputs, (m,).
            deltas: R - I of the blocks of inputs (k, b, b), then those of outputs, one or more.
        """
        product = _multiply(x, weight, inner, outer, deltas[0])
        ctx.save_for_backward(x, weight, inner, outer, product, *deltas)
        result = x.new_empty(len(x), len(weight))
        return scatter_columns(result, outer, rotate_blocks(product, deltas[1:]), True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the deltas."""
        x, weight, inner, outer, product, *deltas = ctx.saved_tensors
        permuted = gradient.index_select(1, outer)
        outer_gradients = block_gradients(product, permuted, deltas[1:])
        product_gradient = rotate_blocks(permuted, [change.mT for change in deltas[1:]])
        weight = _permuted(weight, inner, outer).to(product_gradient.dtype)
        inner_gradient = product_gradient @ weight  # of R_i x, in the order of the inner blocks
        inner_gradients = block_gradients(x.index_select(1, inner), inner_gradient, deltas[:1])
        x_gradient: Tensor | None = None
        if ctx.needs_input_grad[0]:
            x_gradient = scatter_columns(
                x, inner, rotate_blocks(inner_gradient, [deltas[0].mT]), True
            )
        return x_gradient, None, None, None, *inner_gradients, *outer_gradients


def _multiply(x: Tensor, weight: Tensor, inner: Tensor, outer: Tensor, change: Tensor) -> Tensor:
    """Return W R_i x, its outputs in the order of the outer blocks."""
    rotated = rotate_blocks(x.index_select(1, inner), [change])
    return rotated @ _permuted(weight, inner, outer).mT.to(rotated.dtype)


def _permuted(weight: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """Return W with its rows and columns in the order of the blocks."""
    return weight.index_select(0, outer).index_select(1, inner)

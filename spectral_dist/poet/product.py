"""R_o W R_i x as one autograd function, from the packed blocks to the rows of the result."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spectral_dist.poet import cayley
from spectral_dist.poet.rotation import block_gradients, rotate_blocks


class ProductOptions(NamedTuple):
    """What a layer's product needs to know beside tensors.

    Attributes:
        blocks: b of each skew parameter: of the inputs' first, then of one or more of outputs.
        order: of the Cayley-Neumann map.
        recomputes: whether only x is saved, and all else made again in the backward pass.
    """

    blocks: tuple[int, ...]
    order: cayley.Order
    recomputes: bool


class RotatedProduct(torch.autograd.Function):
    """The product of rows x (t, n) with a frozen W that all blocks of both sides rotate: (t, m).

    x is permuted once, the result once, and W in between, which is smaller than what is multiplied
    by it: so W is kept in its own order. (With few rows it would be less to permute them on both
    sides of W; but how numbers are rounded would then depend on how many rows a rank has.)

    x is saved, and unless all is to be made again, W R_i x and G - I of all blocks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: ProductOptions,
        x: Tensor,
        weight: Tensor,
        inner: Tensor,
        inner_inverse: Tensor,
        outer: Tensor,
        outer_inverse: Tensor,
        *skews: Tensor,
    ) -> Tensor:
        """Return R_o W R_i x of each row.

        Args:
            ctx: autograd's context.
            plan: of the layer.
            x: rows (t, n).
            weight: W, (m, n).
            inner: indices of the blocks of inputs, block after block, (n,).
            inner_inverse: the place of each input in ``inner``, (n,).
            outer: indices of the blocks of outputs, (m,).
            outer_inverse: the place of each output in ``outer``, (m,).
            skews: packed blocks of inputs, then those of outputs, one or more.
        """
        ctx.plan = plan
        with cayley.no_autocast(x.device):
            deltas = cayley.deltas(skews, plan.blocks, plan.order, x.dtype)
            rows = rotate_blocks(x.index_select(1, inner), deltas[:1])
            product = torch.mm(rows, _permuted(weight, inner, outer, x.dtype).mT)
            del rows
            saved = [] if plan.recomputes else [product, *deltas]
            ctx.save_for_backward(x, weight, inner, inner_inverse, outer, *skews, *saved)
            return rotate_blocks(product, deltas[1:]).index_select(1, outer_inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the packed blocks."""
        blocks, order, recomputes = ctx.plan
        x, weight, inner, inner_inverse, outer, *rest = ctx.saved_tensors
        skews, saved = rest[: len(blocks)], rest[len(blocks) :]
        with cayley.no_autocast(x.device):
            weight = _permuted(weight, inner, outer, x.dtype)
            permuted = None
            if recomputes:
                deltas = cayley.deltas(skews, blocks, order, x.dtype)
                permuted = x.index_select(1, inner)
                product = torch.mm(rotate_blocks(permuted, deltas[:1]), weight.mT)
            else:
                product, *deltas = saved
            transposed = [change.mT for change in deltas]
            outward = gradient.index_select(1, outer)
            gradients = block_gradients(product, outward, deltas[1:])
            del product
            inward = torch.mm(rotate_blocks(outward, transposed[1:]), weight)
            del weight, outward
            permuted = x.index_select(1, inner) if permuted is None else permuted
            gradients = block_gradients(permuted, inward, deltas[:1]) + gradients
            del permuted
            x_gradient: Tensor | None = None
            if ctx.needs_input_grad[1]:
                x_gradient = rotate_blocks(inward, transposed[:1]).index_select(1, inner_inverse)
            del inward, deltas, transposed
            packed = cayley.delta_gradients(skews, blocks, order, gradients)
        return None, x_gradient, None, None, None, None, None, *packed


def _permuted(weight: Tensor, inner: Tensor, outer: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W in a dtype, with its rows and columns in the order of the blocks."""
    return weight.to(dtype).index_select(0, outer).index_select(1, inner)

"""POET (arXiv 2506.08001) from specs/poet.md: dense matrices, one block at a time, by autograd.

Everything is computed in the dtype of what it is given. Which indices are in which block is data:
a list of tensors, one of b indices for each block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

OPTIONS = {"lr": 0.02, "scalar_lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-6,
           "merge_every": 4}  # fmt: skip


def skew_matrix(numbers: Tensor, b: int) -> Tensor:
    """Q of the strict upper triangle, row by row."""
    rows = [[torch.zeros((), dtype=numbers.dtype)] * b for _ in range(b)]
    place = 0
    for r in range(b):
        for c in range(r + 1, b):
            rows[r][c], rows[c][r] = numbers[place], -numbers[place]
            place += 1
    return torch.stack([torch.stack(row) for row in rows])


def cayley(q: Tensor, order: int | str) -> Tensor:
    """(I + Q)(I + Q + ... + Q^k), or (I + Q)(I - Q)^-1."""
    eye = torch.eye(len(q), dtype=q.dtype)
    if order == "exact":
        return (eye + q) @ torch.linalg.inv(eye - q)
    series = eye + sum(torch.linalg.matrix_power(q, i) for i in range(1, int(order) + 1))
    return (eye + q) @ series


def shrink(theta: float, order: int | str) -> float:
    """The singular value of G where Q has the eigenvalues +-i theta."""
    return {
        1: 1 + theta**2,
        2: (1 + theta**6) ** 0.5,
        3: abs(1 - theta**4),
        4: (1 + theta**10) ** 0.5,
        "exact": 1.0,
    }[order]


def thetas(skew: Tensor, b: int) -> Tensor:
    """|eigenvalues| of Q of every block, (k, b), float64."""
    blocks = [
        torch.linalg.eigvals(skew_matrix(row.double(), b))
        for row in skew.detach().view(-1, b * (b - 1) // 2)
    ]
    return torch.stack(blocks).abs()


def rotation(skew: Tensor, indices: Sequence[Tensor], d: int, order: int | str) -> Tensor:
    """R = I + sum over blocks of D(S) (G - I) D(S)^T, d x d; ``skew``: block after block."""
    r = torch.eye(d, dtype=skew.dtype)
    for numbers, s in zip(skew.view(len(indices), -1), indices, strict=True):
        b = len(s)
        spread = torch.zeros(d, b, dtype=skew.dtype)
        for column, index in enumerate(s.tolist()):
            spread[index, column] = 1
        g = cayley(skew_matrix(numbers, b), order)
        r = r + spread @ (g - torch.eye(b, dtype=skew.dtype)) @ spread.T
    return r


def effective(
    w: Tensor,
    skews: tuple[Tensor, Tensor],
    indices: tuple[Sequence[Tensor], Sequence[Tensor]],
    order: int | str,
) -> Tensor:
    """R_o W R_i of W, (m, n); skews and indices of inputs, then of outputs."""
    m, n = w.shape
    r_i, r_o = (rotation(skews[i], indices[i], d, order) for i, d in ((0, n), (1, m)))
    return r_o @ w @ r_i


class Adam:
    """AdamW by hand, of one tensor."""

    def __init__(self, o: dict[str, Any], lr: float, decay: float) -> None:
        self.o, self.lr, self.decay = o, lr, decay
        self.restart()

    def restart(self) -> None:
        """As if there had been no step."""
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.t = 0

    def step(self, p: Tensor, g: Tensor, factor: float = 1.0) -> None:
        """In place; ``factor``: of the learning rate."""
        (b1, b2), lr = self.o["betas"], self.lr * factor
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        ahead = (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)) ** 0.5 + self.o["eps"])
        p.copy_(p * (1 - lr * self.decay) - lr * ahead)


class PoetTraining:
    """Trains a plain model by POET.

    Args:
        model: plain; nothing in it is changed.
        blocks: names of the rotated nn.Linears -> (b_in, b_out).
        index: name, side ('in' or 'out') and merges so far -> the indices of all blocks in a row.
        options: as ``OPTIONS``.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[str, tuple[int, int]],
        index: Callable[[str, str, int], Tensor],
        order: int | str = 4,
        **options: Any,
    ) -> None:
        self.model, self.blocks, self.index, self.order = model, blocks, index, order
        self.o = {**OPTIONS, **options}
        named = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.frozen = {name: named.pop(f"{name}.weight") for name in blocks}
        self.scalars = named
        self.merges = 0
        self.since = 0
        self.skews = {}
        for name, pair in blocks.items():
            for side, b in zip(("in", "out"), pair, strict=True):
                count = len(index(name, side, 0)) // b
                zeros = torch.zeros(count, b * (b - 1) // 2, dtype=self.frozen[name].dtype)
                self.skews[name, side] = zeros
        o = self.o
        self.adams: dict[Any, Adam] = {key: Adam(o, o["lr"], 0.0) for key in self.skews}
        self.adams |= {key: Adam(o, o["scalar_lr"], o["weight_decay"]) for key in self.scalars}

    def effective(self, skews: dict[Any, Tensor]) -> dict[str, Tensor]:
        """R_o W R_i by name."""
        found = {}
        for name, pair in self.blocks.items():
            sides = list(zip(("in", "out"), pair, strict=True))
            indices = tuple(self.index(name, side, self.merges).split(b) for side, b in sides)
            both = tuple(skews[name, side] for side, _ in sides)
            found[name] = effective(self.frozen[name], both, indices, self.order)
        return found

    def gradients(self, *batch: Any) -> tuple[float, dict[Any, Tensor]]:
        """The loss, and dL of every skew and scalar."""
        leaves = {k: p.clone().requires_grad_() for k, p in {**self.skews, **self.scalars}.items()}
        weights = {f"{k}.weight": w for k, w in self.effective(leaves).items()}
        rest = {k: leaves[k] for k in self.scalars}
        loss = functional_call(self.model, {**weights, **rest}, batch)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return loss.item(), dict(zip(leaves, grads, strict=True))

    @torch.no_grad()
    def step(self, *batch: Any, factor: float = 1.0) -> float:
        """One step, and the merge if it is due; the loss."""
        with torch.enable_grad():
            loss, grads = self.gradients(*batch)
        for key, p in {**self.skews, **self.scalars}.items():
            self.adams[key].step(p, grads[key], factor)
        self.since += 1
        if self.since == self.o["merge_every"]:
            self.merge()
        return loss

    @torch.no_grad()
    def merge(self) -> None:
        """W <- R_o W R_i; skews and their Adam to zero; the next permutations."""
        self.frozen = self.effective(self.skews)
        for key, skew in self.skews.items():
            skew.zero_()
            self.adams[key].restart()
        self.merges, self.since = self.merges + 1, 0

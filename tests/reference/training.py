"""One process, one step at a time: Muon and AdamW written out from specs/muon.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests import models

MATRIX_NAMES = ("qkv", "out.weight", "up.weight", "down", "experts", "unused")


def is_matrix(name: str) -> bool:
    return any(part in name for part in MATRIX_NAMES)


def jordan(x: Tensor) -> Tensor:
    """Five steps of Muon's quintic, unbatched, in x's dtype."""
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def muon(w: Tensor, g: Tensor, m: Tensor, o: dict[str, Any]) -> None:
    beta = o.get("momentum", 0.95)
    m.mul_(beta).add_(g, alpha=1 - beta)
    u = jordan((1 - beta) * g + beta * m)
    w.mul_(1 - o["lr"] * o["weight_decay"]).add_(u, alpha=-o["lr"] * 0.2 * math.sqrt(max(w.shape)))


def train(
    options: dict[str, Any],
    count: int = 10,
    clip: float = 0.0,
    factors: Sequence[float] | None = None,
    **model_options: Any,
) -> dict[str, Tensor]:
    """Parameters after ``count`` steps on the global batches of ``models.tokens``.

    ``factors``: of both learning rates, step by step.
    """
    model = models.build(**model_options)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    momenta = {n: torch.zeros_like(p) for n, p in named.items() if is_matrix(n)}
    adam = torch.optim.AdamW(
        [p for n, p in named.items() if not is_matrix(n)],
        lr=options["scalar_lr"], weight_decay=options["scalar_weight_decay"],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for step in range(count):
        model.zero_grad()
        model(models.tokens(step)).backward()
        for p in named.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if clip:
            torch.nn.utils.clip_grad_norm_(named.values(), clip)
        factor = factors[step] if factors else 1.0
        adam.param_groups[0]["lr"] = options["scalar_lr"] * factor
        with torch.no_grad():
            for name, momentum in momenta.items():
                w, g = named[name].data, named[name].grad
                for k in range(len(w)) if w.ndim == 3 else [...]:
                    muon(w[k], g[k], momentum[k], {**options, "lr": options["lr"] * factor})
        adam.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}

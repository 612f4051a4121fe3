"""One process, one step at a time: a rule on matrices and AdamW, written out from the specs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference import rules
from tests.support import models

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


def parts(w: Tensor, split: int) -> list[Tensor]:
    """The matrices of a parameter: each of a stack, and of those that many equal blocks of rows."""
    return [part for matrix in (w if w.ndim == 3 else [w]) for part in matrix.chunk(split)]


def part_name(name: str, i: int, w: Tensor, split: int) -> str:
    """What the package calls the i-th of ``parts``."""
    stack = f"{name}[{i // split}]" if w.ndim == 3 else name
    return stack if split == 1 else f"{stack}/{i % split}"


def train(
    options: dict[str, Any],
    count: int = 10,
    clip: float = 0.0,
    factors: Sequence[float] | None = None,
    *,
    rule: str = "muon",
    oracle: rules.Oracle | None = None,
    split: dict[str, int] | None = None,
    skip_missing: bool = False,
    take: Callable[[str, Tensor, Tensor, dict[str, Any]], None] | None = None,
    make: Callable[..., torch.nn.Module] = models.build,
    tokens: Callable[[int], Tensor] = models.tokens,
    **model_options: Any,
) -> dict[str, Tensor]:
    """Parameters after ``count`` steps on the global batches of ``tokens``.

    ``factors``: of both learning rates, step by step. ``rule``: a name in ``rules.RULES``, with its
    options among ``options``, or 'muon', which is Muon with jordan here. ``split``: part of a
    name -> equal blocks of rows. ``skip_missing``: a parameter without gradient stays as it is,
    where else its gradient is zero. ``take``: in place of ``rule``, one step on a matrix by name.
    """
    model = make(**model_options)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    momenta = {n: torch.zeros_like(p) for n, p in named.items() if is_matrix(n)}
    splits = {n: max([k for part, k in (split or {}).items() if part in n], default=1)
              for n in momenta}  # fmt: skip
    adam = torch.optim.AdamW(
        [p for n, p in named.items() if not is_matrix(n)],
        lr=options["scalar_lr"], weight_decay=options["scalar_weight_decay"],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for step in range(count):
        model.zero_grad()
        model(tokens(step)).backward()
        for p in named.values():
            p.grad = torch.zeros_like(p) if p.grad is None and not skip_missing else p.grad
        if clip:
            torch.nn.utils.clip_grad_norm_(named.values(), clip)
        factor = factors[step] if factors else 1.0
        adam.param_groups[0]["lr"] = options["scalar_lr"] * factor
        with torch.no_grad():
            for name, momentum in momenta.items():
                if named[name].grad is None:
                    continue
                values = (named[name].data, named[name].grad, momentum)
                found = zip(*(parts(x, splits[name]) for x in values), strict=True)
                for i, wgm in enumerate(found):
                    changed = {**options, "lr": options["lr"] * factor}
                    if take:
                        take(part_name(name, i, momentum, splits[name]), *wgm[:2], changed)
                    elif rule == "muon" and oracle is None:
                        muon(*wgm, changed)
                    else:
                        rules.RULES[rule](*wgm, changed, oracle)
        adam.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}

"""Small models with every kind of parameter that the optimizers must tell apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 61


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Tiny(nn.Module):
    """An untied (or tied) language model; one frozen weight and one that never gets a gradient."""

    def __init__(
        self,
        width: int = 24,
        hidden: int = 56,
        layers: int = 2,
        tied: bool = False,
        odd: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, hidden + 5 * i) for i in range(layers))
        self.experts = nn.Parameter(torch.randn(3, width, 7) * 0.1) if odd else None
        self.frozen = nn.Linear(width, width, bias=False) if odd else None
        self.unused = nn.Linear(width, 3, bias=False) if odd else None
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if self.frozen is not None:
            self.frozen.weight.requires_grad_(False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        if self.experts is not None:
            x = x + 0.1 * self.frozen(x)
            for expert in self.experts:
                x = x + 0.3 * torch.tanh(x @ expert) @ expert.mT
        logits = self.head(x)[:, :-1].flatten(0, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return nn.functional.cross_entropy(logits.to(wide), tokens[:, 1:].flatten())


class Dot(nn.Linear):
    """A weight whose gradient is the tensor that its forward is given."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[-1], weight.shape[0], bias=False)
        self.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        self.shape = weight.shape  # under ZeRO-3 the weight is empty outside of forward

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient.to(self.weight.dtype)).sum()


class GivenGradients(nn.Module):
    """The parameters of ``Tiny``, each with a gradient drawn from the tokens.

    No product is rounded on the way to them: what CPUs add in an order that hangs on their kind,
    and on where an engine put the operands, is not in the gradients.
    """

    def __init__(self, like: Tiny) -> None:
        super().__init__()
        self.dots = nn.ModuleDict(
            {name.replace(".", "-"): Dot(p) for name, p in like.named_parameters()}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(tokens.sum()))
        loss = torch.zeros(())
        for name, dot in self.dots.items():
            gradient = torch.randn(dot.shape, generator=generator) / 64
            if dot.weight.requires_grad and not name.startswith("unused"):
                loss = loss + dot(gradient).float()
        return loss


def build(seed: int = 0, **kwargs: object) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(**kwargs)  # type: ignore[arg-type]


def tokens(step: int, sequences: int = 12, length: int = 9) -> Tensor:
    """The global batch of a step; 12 sequences divide over 1, 2, 3 and 4 ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCABULARY, (sequences, length), generator=generator)

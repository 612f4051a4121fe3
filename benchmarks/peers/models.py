"""The models that all contenders train: Llama-like, in four forms that shard differently."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

VOCABULARY, HEAD = 512, 32


@dataclass(frozen=True)
class Form:
    """Sizes of a model.

    Attributes:
        kv: heads of keys and of values; 0: as many as of queries.
        ff: width of the feed-forward part, of each expert if there are any.
        experts: their number; 0: one feed-forward part without a router.
        stacked: whether a layer's experts lie in one 3-D parameter.
    """

    width: int = 128
    layers: int = 2
    kv: int = 0
    ff: int = 512
    experts: int = 0
    stacked: bool = False


FORMS = {
    "homogeneous": Form(),
    "gqa": Form(kv=1, ff=344),
    "experts": Form(ff=64, experts=8),
    "stacked": Form(ff=64, experts=8, stacked=True),
}
"""gqa: k and v have a quarter of q's rows. experts: 16 small matrices a layer beside attention;
stacked: the same as two parameters of 8 matrices."""


def form(name: str, scale: int, tiny: bool) -> Form:
    """Return a form with ``scale`` times its layers, or as small as it can be."""
    found = FORMS[name]
    if tiny:
        found = replace(found, width=64, layers=1, kv=min(found.kv, 1), ff=min(found.ff, 96))
    return replace(found, layers=scale * found.layers)


class StackedExperts(nn.Module):
    """Feed-forward parts whose weights are two 3-D parameters."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        up, down = (form.experts, form.ff, form.width), (form.experts, form.width, form.ff)
        self.up = nn.Parameter(torch.randn(up) / form.width**0.5)
        self.down = nn.Parameter(torch.randn(down) / form.ff**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(length, width) to (experts, length, width)."""
        return nn.functional.silu(x @ self.up.mT) @ self.down.mT


class FeedForward(nn.Module):
    """A plain feed-forward part."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.up = nn.Linear(form.width, form.ff, bias=False)
        self.down = nn.Linear(form.ff, form.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(length, width), the same."""
        return self.down(nn.functional.silu(self.up(x)))


class SeparateExperts(nn.ModuleList):
    """Feed-forward parts that are modules."""

    def forward(self, x: Tensor) -> Tensor:
        """(length, width) to (experts, length, width)."""
        return torch.stack([expert(x) for expert in self])


class Layer(nn.Module):
    """Attention, then a feed-forward part or the weighted sum of all experts."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(form.width) for _ in range(2))
        width, kv = form.width, HEAD * form.kv or form.width
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, rows, bias=False) for rows in (width, kv, kv, width)
        )
        self.router_embedding = nn.Embedding(form.experts, width) if form.experts else None
        if not form.experts:
            self.feed_forward: nn.Module = FeedForward(form)
        elif form.stacked:
            self.experts: nn.Module = StackedExperts(form)
        else:
            self.experts = SeparateExperts(FeedForward(form) for _ in range(form.experts))

    def forward(self, x: Tensor) -> Tensor:
        """(length, width), the same."""
        y = self.norms[0](x)
        heads = [p(y).unflatten(-1, (-1, HEAD)).transpose(0, 1)[None]
                 for p in (self.q_proj, self.k_proj, self.v_proj)]  # fmt: skip
        y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(y[0].transpose(0, 1).flatten(-2))
        y = self.norms[1](x)
        if self.router_embedding is None:
            return x + self.feed_forward(y)
        shares = (y @ self.router_embedding.weight.mT).softmax(-1)
        return x + torch.einsum("le,eld->ld", shares, self.experts(y))


class Model(nn.Module):
    """Layers between an embedding and a head; ``forward`` is the loss of a run of tokens."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, form.width)
        self.layers = nn.ModuleList(Layer(form) for _ in range(form.layers))
        self.lm_head = nn.Linear(form.width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of each token's successor."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.lm_head(x)[:-1], tokens[1:])


def build(form: Form) -> Model:
    """Return a model of a form, always with the same numbers."""
    torch.manual_seed(0)
    return Model(form)


def matrix_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are orthogonalized; call it before wrapping."""
    return [
        name
        for name, p in model.named_parameters()
        if p.ndim > 1 and not any(part in name for part in ("embedding", "lm_head"))
    ]

"""Models of Llama's shapes that are never called: weights by name, and random gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a Llama follow from; ``kv``: the width of keys and of values."""

    width: int
    inner: int
    kv: int
    layers: int
    vocabulary: int


LLAMA_1B = Sizes(2048, 8192, 512, 16, 32000)
LLAMA_8B = Sizes(4096, 14336, 1024, 32, 128256)
LLAMA_70B = Sizes(8192, 28672, 1024, 80, 128256)
TINY = Sizes(32, 64, 16, 2, 96)


class Layer(nn.Module):
    """The weights of one layer, named as Llama's."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, inner, kv = sizes.width, sizes.inner, sizes.kv
        sides = {"q_proj": (width, width), "k_proj": (width, kv), "v_proj": (width, kv),
                 "o_proj": (width, width), "gate_proj": (width, inner),
                 "up_proj": (width, inner), "down_proj": (inner, width)}  # fmt: skip
        for name, (n, m) in sides.items():
            setattr(self, name, nn.Linear(n, m, bias=False))
        self.input_layernorm = nn.RMSNorm(width)
        self.post_attention_layernorm = nn.RMSNorm(width)


class Llama(nn.Module):
    """Embedding, layers, norm and head, without a forward pass."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        self.lm_head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)


class Small(nn.Module):
    """Many small matrices of a few shapes, side x side and then wider."""

    def __init__(self, count: int, side: int, shapes: int = 1) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            nn.Linear(side + i % shapes, side, bias=False) for i in range(count)
        )


def build(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the model on a device, with random weights of standard deviation 0.02."""
    with torch.device("meta"):
        model = Llama(sizes)
    model.to(dtype).to_empty(device=device)
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give weights random values: of one dimension ones."""
    for p in model.parameters():
        local = p.to_local() if hasattr(p, "to_local") else p
        if p.ndim > 1:
            local.normal_(std=0.02)
        else:
            local.fill_(1.0)


def give_gradients(model: nn.Module, scale: float = 1e-3) -> None:
    """Give every parameter a random gradient."""
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(scale)

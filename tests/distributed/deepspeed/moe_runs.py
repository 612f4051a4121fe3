"""A small model with deepspeed.moe's layers, and in one process; called through the harness."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.deepspeed import engine as engines
from tests.distributed.torch import layouts

EXPERTS = 8
EP = 2
EXPERT = re.compile(r"(.*deepspeed_experts\.)(\d+)(\..*)")
"""It matches a parameter's name: what is before an expert's number, the number, the rest."""


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 20)
        self.down = nn.Linear(20, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class Routed(nn.Module):
    """In one process: each token through the expert of its largest probability, times that."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = nn.Module()
        inner.gate, inner.experts = nn.Module(), nn.Module()
        inner.gate.wg = nn.Linear(width, EXPERTS, bias=False)
        experts = (Expert(width) for _ in range(EXPERTS))
        inner.experts.deepspeed_experts = nn.ModuleList(experts)
        self.deepspeed_moe = inner

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        flat = x.reshape(-1, x.shape[-1])
        largest, chosen = torch.softmax(self.deepspeed_moe.gate.wg(flat), -1).max(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.deepspeed_moe.experts.deepspeed_experts):
            (tokens,) = torch.where(chosen == index)
            out = out.index_add(0, tokens, expert(flat[tokens]) * largest[tokens, None])
        return out.view_as(x), None, None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        model = layouts.conditioned(odd=False)
        self.embed, self.layers, self.head = model.embed, model.layers, model.head
        self.moe = nn.ModuleList(Routed(24) for _ in self.layers)
        for expert in (e for e in self.moe.modules() if isinstance(e, Expert)):
            nn.init.orthogonal_(expert.up.weight)
            nn.init.orthogonal_(expert.down.weight)
        gate = self.moe[0].deepspeed_moe.gate.wg.weight.data
        gate[1] = -gate[0]  # one of the two is above 0, so that no token goes to the last expert
        gate[-1] = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer, moe in zip(self.layers, self.moe, strict=True):
            x = layer(x)
            x = x + 0.5 * moe(x)[0]
        logits = self.head(x)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())


def distributed(ep_size: int = EP) -> tuple[Model, dict[str, str]]:
    """The model with DeepSpeed's layers, and this rank's names of parameters -> global ones."""
    from deepspeed.moe.layer import MoE

    model = Model()
    whole = copy.deepcopy(model.state_dict())
    model.moe = nn.ModuleList(
        MoE(24, Expert(24), EXPERTS, ep_size, k=1, drop_tokens=False, use_rts=False)
        for _ in model.layers
    )
    first = dist.get_rank() % ep_size * (EXPERTS // ep_size)
    names = {
        name: EXPERT.sub(lambda m: f"{m[1]}{int(m[2]) + first}{m[3]}", name)
        for name in model.state_dict()
    }
    model.load_state_dict({name: whole[wanted] for name, wanted in names.items()})
    return model, names


def muon(model: nn.Module) -> Any:
    import spectral_dist

    return spectral_dist.Muon(spectral_dist.param_groups(model), lr=0.02)


def build(configuration: dict[str, Any], client: bool) -> None:
    engine_of(configuration, optimizer=muon if client else None)


def engine_of(
    configuration: dict[str, Any], ep_size: int = EP, optimizer: Any = None
) -> tuple[Any, dict[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        from spectral_dist.integrations.deepspeed import _compat

        _compat.without_compiling()
        deepspeed.init_distributed("gloo", verbose=False)
        model, names = distributed(ep_size)
        return engines.engine_for(configuration, model=model, optimizer=optimizer), names


def train(
    configuration: dict[str, Any],
    first: int = 0,
    last: int = 4,
    folder: str = "",
    load: str | None = None,
    save: str | None = None,
    ep_size: int = EP,
) -> dict[str, Any]:
    """Train, and return what a test looks at, by global names."""
    running, names = engine_of(configuration, ep_size)
    if load is not None:
        path, _ = running.load_checkpoint(folder, tag=load)
        assert path is not None
    losses = []
    for step in range(first, last):
        batch = layouts.tokens(step).chunk(dist.get_world_size())[dist.get_rank()]
        loss = running(batch)
        running.backward(loss)
        running.step()
        losses.append(float(loss.detach()))
    if save is not None:
        running.save_checkpoint(folder, tag=save)
    base = running.basic_optimizer
    routes = getattr(base, "all_routes", ())
    parameters = running.module.named_parameters()
    result = {
        "parameters": {names[n]: p.detach().float().clone() for n, p in parameters},
        "losses": losses,
        "polar_calls": getattr(base, "polar_calls", 0),
        "kinds": {names[r.name]: r.kind for r in routes},
        "matrices": {names[r.name]: [m.name for m in r.matrices] for r in routes},
        "groups": [(g.get("name"), g.get("moe")) for g in base.param_groups],
        "wrapper": type(running.optimizer).__name__,
    }
    running.destroy()
    return result

"""Ulysses: each sequence on two of four ranks, two of them data-parallel, as one process."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.deepspeed import engine
from tests.distributed.torch import layouts
from tests.support import harness, models

STEPS = 4
SP = 2
HEADS = 2
SCALARS = {"weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01}
RULES: dict[str, dict[str, Any]] = {
    "SpectralMuon": {"lr": 0.02},
    "SpectralPolarGrad": {"lr": 0.1},
    "SpectralROOT": {"lr": 0.02},
    "SpectralSUMO": {"lr": 0.01, "rank": 0.5, "period": 2},
}
MATRICES = 2 * 4


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention's output; all tensors are (batch, sequence, heads, width of a head)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Model(nn.Module):
    """The usual model, whose attention is a function of the whole sequence's heads."""

    def __init__(self, attend: Any = attention) -> None:
        super().__init__()
        model = layouts.conditioned(odd=False)
        self.embed, self.layers, self.head = model.embed, model.layers, model.head
        self.attend = attend

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            q, k, v = layer.qkv(layer.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
            x = x + layer.out(self.attend(q, k, v).flatten(-2))
            x = x + layer.down(nn.functional.silu(layer.up(x)))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = models.tokens(step)
    return tokens[:, :-1], tokens[:, 1:]


def config(stage: int, kind: str, way: str, **changes: Any) -> dict[str, Any]:
    result = engine.config(stage, 4 // SP, **changes)
    result["optimizer"] = {"type": kind, "params": {**SCALARS, **RULES.get(kind, {})}}
    if kind == "AdamW":
        result["optimizer"]["params"] = {"lr": 0.01, "torch_adam": True}
    if way == "mesh":
        result.update(sequence_parallel_size=SP, data_parallel_size=4 // SP)
    return result


def start(configuration: dict[str, Any], way: str) -> tuple[Any, Any]:
    """An engine, and the group of the ranks that share its sequences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.sequence.layer import DistributedAttention
        from deepspeed.utils import groups

        from spectral_dist.integrations.deepspeed import _compat

        _compat.without_compiling()
        deepspeed.init_distributed("gloo", verbose=False)
        model = Model()
        if way == "mpu" and parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
            parallel_state_sp.initialize_sequence_parallel(SP)
        mpu = parallel_state_sp if way == "mpu" else None
        running = deepspeed.initialize(model=model, config=configuration, mpu=mpu)[0]
        group = groups._get_sequence_parallel_group()
        ulysses = DistributedAttention(attention, group, scatter_idx=2, gather_idx=1)
        model.attend = lambda q, k, v: ulysses(q, k, v, 0)
        return running, group


def build(configuration: dict[str, Any], way: str) -> None:
    start(configuration, way)


def train(
    configuration: dict[str, Any],
    way: str,
    first: int = 0,
    last: int = STEPS,
    folder: str = "",
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    running, group = start(configuration, way)
    if load is not None:
        assert running.load_checkpoint(folder, tag=load)[0] is not None
    sharing = dist.get_rank(group)
    data = dist.get_rank() // SP
    losses = []
    for step in range(first, last):
        part = [x.chunk(4 // SP)[data].chunk(SP, 1)[sharing] for x in batch(step)]
        loss = running(*part) / SP  # DeepSpeed adds gradients up over the ranks of a sequence
        running.backward(loss)
        running.step()
        losses.append(float(loss.detach()))
    if save is not None:
        running.save_checkpoint(folder, tag=save)
    base = running.basic_optimizer
    result = {
        "parameters": engine.full_parameters(running), "losses": losses,
        "polar_calls": getattr(base, "polar_calls", 0),
        "shards": dist.get_world_size(running.seq_data_parallel_group),
    }  # fmt: skip
    running.destroy()
    return result


@functools.cache
def alone(kind: str, clip: float = 0.0) -> dict[str, torch.Tensor]:
    """The optimizer in one process of plain torch."""
    import spectral_dist

    model = Model()
    if kind == "AdamW":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        cls = getattr(spectral_dist, kind.removeprefix("Spectral"))
        optimizer = cls(spectral_dist.param_groups(model), **SCALARS, **RULES[kind])
    for step in range(STEPS):
        optimizer.zero_grad()
        model(*batch(step)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def apart(ranks: list[dict[str, Any]], wanted: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(largest difference among matrices, among the rest)."""
    errors = [engine.errors(result["parameters"], wanted) for result in ranks]
    return max(e[0] for e in errors), max(e[1] for e in errors)


# DeepSpeed keeps the groups in globals, for later engines too
run = functools.partial(harness.run, 4, train, pool="ulysses")


@pytest.mark.slow  # on ranks of its own
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", RULES)
def test_ulysses_equals_one_process(kind: str, stage: int) -> None:
    """Clipped, as stage 3 averages gradients over the ranks of a sequence, where others add."""
    ranks = run(config(stage, kind, "mpu", gradient_clipping=0.3), "mpu")
    matrix, rest = apart(ranks, alone(kind, 0.3))
    assert matrix < 1e-6
    assert rest < 1e-5
    assert ranks[0]["shards"] == 4
    assert sum(result["polar_calls"] for result in ranks) == STEPS * MATRICES


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_resumed_is_uninterrupted(stage: int, tmp_path: Path) -> None:
    configuration = functools.partial(config, stage, "SpectralSUMO", "mpu")
    whole = run(configuration(), "mpu")
    run(configuration(), "mpu", last=2, folder=str(tmp_path), save="two")
    rest = run(configuration(), "mpu", first=2, folder=str(tmp_path), load="two")
    for result, wanted in zip(rest, whole, strict=True):
        assert result["losses"] == wanted["losses"][2:]
        for name, value in wanted["parameters"].items():
            assert torch.equal(result["parameters"][name], value), name


@pytest.mark.slow
def test_a_mesh_in_the_json_is_wrong_in_deepspeed_itself() -> None:
    """Where this fails, DeepSpeed adds up gradients of a sequence, and our refusal can go."""
    ranks = harness.run(4, train, config(1, "AdamW", "mesh"), "mesh", pool="mesh")
    assert ranks[0]["shards"] == 2
    assert max(apart(ranks, alone("AdamW"))) > 1e-2


@pytest.mark.slow
def test_a_mesh_in_the_json_is_refused() -> None:
    configuration = config(1, "SpectralMuon", "mesh")
    harness.run_refused(4, "pass mpu=", build, configuration, "mesh", pool="mesh", within=20)

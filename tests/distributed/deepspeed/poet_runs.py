"""Runs of POET under DeepSpeed, and in one process."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn

import spectral_dist
from spectral_dist import poet
from spectral_dist.poet.layer import PoetLayer
from tests.distributed.deepspeed import engine
from tests.support import harness, models

CONVERSION: dict[str, Any] = {
    "block": 8, "blocks": {"up": [8, 5], "down": [5, 8], "unused": [8, 3]}, "scalars": ["1.out"],
    "init": "normalized",
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "lr": 0.02, "scalar_lr": 0.005, "weight_decay": 0.1, "merge_every": 3, "clip_ramp": 2,
    "eps": 1e-4,  # above the rounding of gradients, which Adam would take for a direction
}  # fmt: skip
STEPS = 8
CLIP = 0.05


def built() -> models.Tiny:
    return models.build(hidden=30)


def configured(stage: int, world: int, way: str = "json", **changes: Any) -> dict[str, Any]:
    zero = {**({"sub_group_size": 300} if stage == 3 else {}), **changes.pop("zero", {})}
    options = {**OPTIONS, **changes.pop("options", {})}
    changes.setdefault("gradient_clipping", CLIP)
    result = engine.config(stage, world, zero=zero, **changes)
    params = {**options, **(CONVERSION if way != "code" else {})}
    result["optimizer"] = {"type": "SpectralPOET", "params": params}
    if way == "client":
        del result["optimizer"]
    return result


def start(configuration: dict[str, Any], way: str = "json", zero_init: bool = False) -> Any:
    """An engine; ``way``: who converts, and what parameters DeepSpeed is given."""
    import deepspeed

    model, parameters, client = None, None, None
    if zero_init:
        with deepspeed.zero.Init(config_dict_or_path=configuration):
            model = built()
    else:
        model = built()
    if way == "listed":
        parameters = [p for p in model.parameters() if p.requires_grad]
    elif way == "groups":
        flat = [p for p in model.parameters() if p.ndim < 2]
        rest = [p for p in model.parameters() if p.ndim > 1]
        parameters = [{"params": rest, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.1}]
    elif way in ("code", "client"):
        poet.convert(model, **CONVERSION)

    def make(model: nn.Module) -> Any:
        return spectral_dist.POET(spectral_dist.param_groups(model), **OPTIONS)

    client = make if way == "client" else None
    return engine.engine_for(
        configuration, model=model, parameters=parameters, optimizer=client, zero_init=zero_init
    )


def layers(model: nn.Module) -> list[PoetLayer]:
    return [m for m in model.modules() if isinstance(m, PoetLayer)]


def stepped_on(base: Any) -> dict[str, list[torch.Tensor]]:
    """What this rank's optimizer steps on, by kind."""
    found: dict[str, list[torch.Tensor]] = {"skew": [], "scalar": []}
    for group, tensors in base.placement.param_batches(base):
        found[group["kind"]] += tensors
    return found


def everything(running: Any) -> dict[str, Any]:
    base = running.basic_optimizer
    flats = stepped_on(base)
    return {
        "parameters": engine.full_parameters(running),
        "masters": {kind: [p.detach().clone() for p in found] for kind, found in flats.items()},
        "states": [
            {name: torch.as_tensor(value).clone() for name, value in base.state[p].items()}
            for found in flats.values()
            for p in found
        ],
        "merges": [layer.merges for layer in layers(running.module)],
        "wrapper": type(running.optimizer).__name__,
    }


def train(
    configuration: dict[str, Any],
    way: str = "json",
    zero_init: bool = False,
    folder: str = "",
    first: int = 0,
    last: int = STEPS,
    load: str | None = None,
    saves: tuple[int, ...] = (),
    export: bool = False,
) -> dict[str, Any]:
    running = start(configuration, way, zero_init)
    mine: Any = None
    if load is not None:
        path, mine = running.load_checkpoint(folder, tag=load)
        assert path is not None
    losses, frozen = [], []
    for step in range(first, last):
        for batch in engine.micro_batches(step, running.gradient_accumulation_steps(), False):
            loss = running(batch)
            running.backward(loss)
            frozen += [layer.weight.grad is None for layer in layers(running.module)]
            running.step()
            losses.append(float(loss.detach()))
        if step + 1 in saves:
            running.save_checkpoint(folder, tag=f"s{step + 1}", client_state={"mine": 3})
    result = {**everything(running), "losses": losses, "client_state": mine, "frozen": all(frozen)}
    result["flat"] = sum(p.numel() for found in result["masters"].values() for p in found)
    if export:
        result["exported"] = poet.export(running.module, running.basic_optimizer)
    running.destroy()
    return result


@functools.cache
def alone(accumulation: int = 1, clip: float = CLIP) -> dict[str, Any]:
    """One process with ``spectral_dist.POET`` and torch's own clipping."""
    model = poet.convert(built(), **CONVERSION)
    optimizer = spectral_dist.POET(spectral_dist.param_groups(model), **OPTIONS)
    losses = []
    for step in range(STEPS):
        for batch in models.tokens(step).chunk(accumulation):
            loss = model(batch) / accumulation
            loss.backward()
            losses.append(float(loss.detach()) * accumulation)
        limit = clip * optimizer.clip_factor()
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        with warnings.catch_warnings():  # of a layer that no gradient reaches
            warnings.simplefilter("ignore")
            optimizer.step()
        optimizer.zero_grad()
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "merges": [layer.merges for layer in layers(model)],
        "losses": losses,
        "exported": poet.export(model),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference; the values are up to 4."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - value).abs().max()) for name, value in wanted.items())


def check(ranks: list[dict[str, Any]], bound: float = 1e-6) -> None:
    wanted = alone()
    for result in ranks:
        assert result["merges"] == wanted["merges"] == [STEPS // 3] * 8
        assert apart(result["parameters"], wanted["parameters"]) < bound
        assert result["frozen"]


BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}


def refused(configuration: dict[str, Any], match: str, way: str = "json", **kwargs: Any) -> None:
    harness.run_refused(1, match, train, configuration, way, last=1, **kwargs)

"""Megatron runs with spectral_poet, on a rank; what the tests compare comes back as plain data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.megatron.megatron_runs import DISTRIBUTED, content, restore
from tests.support import megatron_cpu
from tests.support import megatron_model as models

GATHERING = {**DISTRIBUTED, "overlap_param_gather": True, "overlap_grad_reduce": True}
EVERY, STEPS = 3, 8  # two merges, and steps after them
SETTINGS = {"block": 8, "segments": 4}
MODEL = {"query_groups": 4}  # for TP 4


def build(
    version: str,
    groups: dict[str, Any] | None = None,
    wrapping: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[int, int], Any, Any]:
    """(data rank, ranks), the wrapped converted model (or list of parts), Megatron's optimizer."""
    megatron_cpu.install(version)
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer, poet

    data = models.parallel(**(groups or {}))
    stages = (groups or {}).get("virtual_pipeline_model_parallel_size") or 1
    parts = [
        models.gpt(vp_stage=s if stages > 1 else None, **{**MODEL, **(model or {})})
        for s in range(stages)
    ]
    for part in parts:
        fill_biases(part)
    chosen_settings = {**SETTINGS, **(settings or {})}
    if stages > 1:
        ddp = [models.wrap(m, **(wrapping or {})) for m in poet.convert(parts, **chosen_settings)]
    else:
        ddp = models.wrap(poet.convert(parts[0], **chosen_settings), **(wrapping or {}))
    given = {"adam_eps": 1e-4, "adam_beta2": 0.999, **(config or {})}
    chosen = {"merge_every": EVERY, **(options or {})}
    asked = models.optimizer_config(ddp, optimizer="spectral_poet", **given)
    return data, ddp, get_spectral_megatron_optimizer(asked, models.chunks_of(ddp), **chosen)


def fill_biases(gpt: Any) -> None:
    """By their names, like weights."""
    for name, p in models.named_parameters(gpt):
        if name.endswith(".bias") and "norm" not in name:
            values = models.weight(name, [1, *models.full_shape(p)])[0]
            p.data.copy_(models.shard(values, p))


def layers(ddp: Any) -> dict[str, Any]:
    parts = [models.gpt_of(chunk) for chunk in models.chunks_of(ddp)]
    return {m.key: m for part in parts for m in part.modules() if hasattr(m, "rotations")}


def inner(optimizer: Any) -> Any:
    return optimizer.chained_optimizers[0].optimizer


def whole(ddp: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Every parameter (or gradient) of the whole model: fused ones with their ranks' rows."""
    if not gradients:
        return models.full_parameters(ddp)
    found = {
        name: models.gathered(p.main_grad, p)
        for name, p in models.named_parameters(ddp)
        if p.requires_grad
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    merged: dict[str, Tensor] = {}
    for theirs in everyone:
        for name, value in theirs.items():
            first = merged.setdefault(name, value)
            assert torch.equal(first, value), f"ranks differ in the gradient of {name}"
    return merged


def diverge(ddp: Any) -> None:
    """The mistake: rotations of the dimension that is not cut differ from rank to rank."""
    for layer in layers(ddp).values():
        sides = [
            tuple(replace(r, seed=dist.get_rank()) if r.ranks == 1 else r for r in side)
            for side in (layer.inner, layer.outer)
        ]
        layer.inner, layer.outer = sides
        layer.drop_indices()


def spectra(ddp: Any) -> dict[str, Tensor]:
    """Singular values of the whole matrices, as they are merged."""
    found = {key: layer.full_weight(layer.weight.detach()) for key, layer in layers(ddp).items()}
    return {key: torch.linalg.svdvals(w.double()) for key, w in found.items()}


def tile_spectra(ddp: Any) -> dict[str, Tensor]:
    return {k: torch.linalg.svdvals(m.weight.detach().double()) for k, m in layers(ddp).items()}


def drift(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((after[k] / s - 1).abs().max()) for k, s in before.items())


def train(
    *args: Any, steps: int = STEPS, monitored: bool = False, independent: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Losses, norms, the parameters after the steps, the last gradients, and what merges did."""
    data, ddp, optimizer = build(*args, **kwargs)
    reports = []
    if monitored:
        from spectral_dist.monitor import Monitor

        sinks = [lambda step, report: reports.append((step, report))]
        inner(optimizer).monitor = Monitor(1, sinks)
    if independent:
        diverge(ddp)
    before, tiles = spectra(ddp), tile_spectra(ddp)
    grads: dict[str, Tensor] = {}
    step = optimizer.step

    def look() -> Any:
        config = models.chunks_of(ddp)[0].ddp_config
        if not independent and not config.use_distributed_optimizer:  # no rank has all
            grads.update(whole(ddp, gradients=True))
        return step()

    optimizer.step = look
    found = [models.train_step(ddp, optimizer, models.batch(s, *data)) for s in range(steps)]
    return {
        "losses": [loss for loss, _ in found],
        "norms": [norm for _, norm in found],
        "parameters": {} if independent else whole(ddp),
        "spectra": spectra(ddp),
        "drift": drift(before, spectra(ddp)),
        "tile drift": drift(tiles, tile_spectra(ddp)),
        "reports": reports,
        "gradients": grads,
        "merges": {layer.merges for layer in layers(ddp).values()},
        "since": inner(optimizer).num_steps_since_merge,
        "bytes": inner(optimizer).comm_bytes,
    }


def schedule_free(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def after_a_merge(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The largest of skew parameters, masters and moments: before a merge, then lr = 0 after it."""
    data, ddp, optimizer = build(*args, **kwargs)
    found: dict[str, Any] = {"before": {}, "after": {}}
    ours = inner(optimizer)
    losses = []
    for s in range(EVERY + 1):
        for when, at in (("before", EVERY - 1), ("after", EVERY)):
            if s == at:
                found[when] = {"model": largest(skews(ddp)), "master": largest(masters(ours))}
        if s == EVERY:
            found["moments"] = largest([v for p in masters(ours) for k, v in ours.state[p].items()])
            schedule_free(optimizer, 0.0)
        losses.append(models.train_step(ddp, optimizer, models.batch(s, *data))[0])
    if ddp.ddp_config.overlap_param_gather:
        ddp.start_param_sync(force_sync=True)
    found["last"] = {"model": largest(skews(ddp)), "master": largest(masters(ours))}
    found["dtypes"] = {str(p.dtype) for p in skews(ddp)}, {str(p.dtype) for p in masters(ours)}
    states = [v for p in masters(ours) for k, v in ours.state[p].items()]
    return {**found, "losses": losses, "states": {str(v.dtype) for v in states}}


def skews(ddp: Any) -> list[Tensor]:
    return [p.detach() for layer in layers(ddp).values() for p in layer.skews.values()]


def masters(ours: Any) -> list[Tensor]:
    """What the optimizer steps on."""
    return [p for g in ours.param_groups if g["kind"] == "skew" for p in g["params"]]


def largest(tensors: list[Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


# -- checkpoints

SAVED = 4  # in mid-cycle: one step after the first merge


def proceed(data: Any, ddp: Any, optimizer: Any) -> dict[str, Any]:
    steps = range(SAVED, SAVED + 4)  # with the second merge
    losses = [models.train_step(ddp, optimizer, models.batch(s, *data))[0] for s in steps]
    merges = {layer.merges for layer in layers(ddp).values()}
    since = inner(optimizer).num_steps_since_merge
    return {"losses": losses, "parameters": whole(ddp), "merges": merges, "since": since}


def save(folder: str, *args: Any, steps: int = SAVED, **kwargs: Any) -> dict[str, Any]:
    """Some steps, a checkpoint, and how it goes on."""
    data, ddp, optimizer = build(*args, **kwargs)
    from megatron.core import dist_checkpointing

    for s in range(steps):
        models.train_step(ddp, optimizer, models.batch(s, *data))
    dist.barrier()
    dist_checkpointing.save(content(ddp, optimizer, False, None), folder)
    return proceed(data, ddp, optimizer)


def load(folder: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The checkpoint, and how it goes on from there."""
    data, ddp, optimizer = build(*args, **kwargs)
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(content(ddp, optimizer, True, None), folder)
    restore(ddp, optimizer, state)
    leaves = [leaf.optimizer for leaf in optimizer.chained_optimizers]
    steps = {float(ours.state[p]["step"]) for ours in leaves for p in masters(ours)}
    assert {ours.num_steps_since_merge for ours in leaves} == {1} or len(leaves) == 1
    return {**proceed(data, ddp, optimizer), "steps": steps}


def exported(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The model after some steps, and a plain one with what ``export`` gave: outputs, names."""
    data, ddp, optimizer = build(*args, **kwargs)
    from spectral_dist.integrations.megatron import poet

    for s in range(SAVED):
        models.train_step(ddp, optimizer, models.batch(s, *data))
    state = poet.export(ddp)
    plain = models.gpt(**{**MODEL, **(kwargs.get("model") or {})})
    names = [n for n in plain.state_dict() if "_extra_state" not in n]
    tensors = [n for n, v in state.items() if isinstance(v, Tensor)]
    plain.load_state_dict(state)
    tokens, labels = models.batch(9, *data)
    positions = torch.arange(models.LENGTH).expand_as(tokens)
    with torch.no_grad():
        ours, theirs = (m(tokens, positions, None, labels=labels) for m in (ddp, plain))
    frozen = [p for layer in layers(ddp).values() for p in [layer.weight]]
    return {
        "error": float((ours - theirs).abs().max()),
        "names": sorted(names) == sorted(tensors),
        "dtypes": {str(state[n].dtype) for n in tensors},
        "buffers": [hasattr(p, "main_grad") or p.grad is not None for p in frozen],
    }


def attempt(function: str, *args: Any, **kwargs: Any) -> str:
    """The text of the error, and of the first warning."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            globals()[function](*args, **kwargs)
        except (ValueError, AssertionError) as error:
            return str(error)
        finally:
            told = [str(w.message) for w in caught if "poet" in str(w.message)]
    return "\n".join(told)


def muon_on_rotations(version: str) -> None:
    _, ddp, _ = build(version)
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    get_spectral_megatron_optimizer(models.optimizer_config(ddp, optimizer="spectral_muon"), [ddp])


def poet_on_weights(version: str, **options: Any) -> None:
    megatron_cpu.install(version)
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    models.parallel()
    ddp = models.wrap(models.gpt())
    asked = models.optimizer_config(ddp, optimizer="spectral_poet")
    get_spectral_megatron_optimizer(asked, [ddp], **options)


def convert_wrapped(version: str) -> None:
    _, ddp, _ = build(version)
    from spectral_dist.integrations.megatron import poet

    poet.convert(ddp)


def convert_again(version: str) -> None:
    _, ddp, _ = build(version)
    from spectral_dist.integrations.megatron import poet

    poet.convert(models.gpt_of(ddp))


def scheduled(version: str) -> list[tuple[str, float, float]]:
    """lr and decay of each group, as Megatron's scheduler writes them."""
    _, _, optimizer = build(version, {}, DISTRIBUTED)
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=0.01, min_lr=0.0, lr_warmup_steps=2, lr_decay_steps=10,
        lr_decay_style="linear", start_wd=0.1, end_wd=0.1, wd_incr_steps=1,
        wd_incr_style="constant",
    )  # fmt: skip
    schedule.step(1)
    return sorted((g["kind"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups)


def limits(version: str, ramp: int) -> dict[str, Any]:
    """The limit of clipping in each step; of skipped ones, too, which do not count."""
    data, ddp, optimizer = build(version, options={"clip_ramp": ramp}, config={"clip_grad": 0.5})
    seen, prepare = [], optimizer.prepare_grads
    skipped = {1, EVERY + 1}

    for s in range(EVERY + 4):

        def look(s: int = s) -> Any:
            seen.append(optimizer.config.clip_grad)
            return prepare() or s in skipped

        optimizer.prepare_grads = look
        try:
            models.train_step(ddp, optimizer, models.batch(s, *data))
        except TypeError:  # the norm of a skipped step is None
            assert s in skipped
    return {
        "limits": seen,
        "after": optimizer.config.clip_grad,
        "since": inner(optimizer).num_steps_since_merge,
    }

"""Run a model under a real DeepSpeed engine on this rank; called through the harness."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
import torch.distributed as dist

from spectral_dist.core.units import MatrixUnit
from tests.reference import training
from tests.support import models

OPTIONS: dict[str, Any] = {
    "lr": 0.02, "weight_decay": 0.1, "scalar_lr": 0.005, "scalar_weight_decay": 0.01,
}  # fmt: skip


def config(stage: int, world: int, **changes: Any) -> dict[str, Any]:
    accumulation = changes.pop("accumulation", 1)
    micro = 12 // world // accumulation
    result: dict[str, Any] = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **changes.pop("zero", {})},
        "optimizer": {"type": "SpectralMuon", "params": {**OPTIONS, **changes.pop("options", {})}},
    }
    result.update(changes)
    return result


def quietly(module: str) -> Any:
    """A module whose import makes older releases of DeepSpeed warn of what torch renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def engine_for(
    configuration: dict[str, Any],
    *,
    model: torch.nn.Module | None = None,
    zero_init: bool = False,
    optimizer: Any = None,
    parameters: Any = None,
    **model_options: Any,
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        from spectral_dist.integrations.deepspeed import _compat

        _compat.without_compiling()
        _compat.allow_fp16_on_cpu()
        deepspeed.init_distributed("gloo", verbose=False)
        if model is None and zero_init:
            with deepspeed.zero.Init(config_dict_or_path=configuration):
                model = models.build(**model_options)
        elif model is None:
            model = models.build(**model_options)
        chosen = optimizer(model) if optimizer else None
        return deepspeed.initialize(
            model=model, config=configuration, optimizer=chosen, model_parameters=parameters
        )[0]


def micro_batches(step: int, accumulation: int, same: bool) -> list[torch.Tensor]:
    """This rank's part of the step's global batch; ``same``: everyone gets all of it."""
    batch = models.tokens(step)
    if same:
        return list(batch.chunk(accumulation))
    return list(batch.chunk(dist.get_world_size() * accumulation))[
        dist.get_rank() :: dist.get_world_size()
    ]


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    """The whole model on every rank, float32."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().float().clone() for name, p in named.items()}


def steps(engine: Any, first: int, last: int, same: bool = False, hook: Any = None) -> list[float]:
    losses = []
    accumulation = engine.gradient_accumulation_steps()
    for step in range(first, last):
        if hook:
            hook(engine)
        for batch in micro_batches(step, accumulation, same):
            loss = engine(batch)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    return losses


def train(
    configuration: dict[str, Any],
    *,
    count: int = 10,
    same: bool = False,
    zero_init: bool = False,
    client: bool = False,
    given_gradients: bool = False,
    **model_options: Any,
) -> dict[str, Any]:
    """Train and return what a test looks at.

    Args:
        given_gradients: of models.GivenGradients, the same bits in any engine and on any CPU.
    """
    import spectral_dist

    def make(model: torch.nn.Module) -> Any:
        return spectral_dist.Muon(spectral_dist.param_groups(model), **OPTIONS)

    assert not (given_gradients and (zero_init or model_options))  # they build another model
    model = models.GivenGradients(models.build()) if given_gradients else None
    engine = engine_for(
        configuration, model=model, zero_init=zero_init, optimizer=make if client else None,
        **model_options,
    )  # fmt: skip
    losses = steps(engine, 0, count, same)
    base = engine.basic_optimizer
    result = {
        "parameters": full_parameters(engine),
        "losses": losses,
        "polar_calls": base.polar_calls,
        "meter": dict(base.meter.bytes),
        "calls": dict(base.meter.calls),
        "kinds": {r.name: r.kind for r in base.all_routes},
        "state_bytes": matrix_state_bytes(base),
        "stage": engine.zero_optimization_stage(),
        "wrapper": type(engine.optimizer).__name__,
        "owners": {
            layout.matrix.name: owner
            for unit in base.all_units
            if isinstance(unit, MatrixUnit)
            for layout, owner in zip(unit.located.layouts, unit.plan.owners, strict=True)
        },
    }
    engine.destroy()
    return result


def matrix_state_bytes(base: Any) -> int:
    """Bytes of momentum on this rank, each storage once."""
    storages = {}
    for group in base.param_groups:
        if group["kind"] != "matrix":
            continue
    for state in base.state.values():
        if "exp_avg" in state and "exp_avg_sq" not in state:
            storage = state["exp_avg"].untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def interrupted(
    configuration: dict[str, Any],
    folder: str,
    *,
    first: int,
    last: int,
    load: str | None = None,
    save: str | None = None,
    **model_options: Any,
) -> dict[str, Any]:
    """Load tag ``load`` if given, take steps [first, last), save tag ``save`` if given."""
    engine = engine_for(configuration, **model_options)
    if load is not None:
        path, _ = engine.load_checkpoint(folder, tag=load)
        assert path is not None
    lrs: list[float] = []
    losses = steps(
        engine, first, last, hook=lambda e: lrs.append(e.basic_optimizer.param_groups[0]["lr"])
    )
    if save is not None:
        engine.save_checkpoint(folder, tag=save)
    result = {
        "parameters": full_parameters(engine),
        "losses": losses,
        "state_bytes": matrix_state_bytes(engine.basic_optimizer),
        "groups": [
            {k: v for k, v in group.items() if k != "params"}
            for group in engine.basic_optimizer.param_groups
        ],
        "lrs": lrs,
        "second_moments": sum(  # that ZeRO still keeps of matrices, beside the optimizer
            "exp_avg_sq" in (getattr(r.parameter, "_hp_mapping", None).optim_fragment or {})
            for r in engine.basic_optimizer.all_routes
            if r.kind == "matrix" and getattr(r.parameter, "_hp_mapping", None)
        ),
        "adam_steps": [
            float(s["step"]) for s in engine.basic_optimizer.state.values() if "exp_avg_sq" in s
        ],
    }
    engine.destroy()
    return result


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(largest difference among matrices, among the rest)."""
    assert found.keys() == wanted.keys()
    difference = {n: float((found[n] - wanted[n]).abs().max()) for n in wanted}
    return (
        max(e for n, e in difference.items() if training.is_matrix(n)),
        max(e for n, e in difference.items() if not training.is_matrix(n)),
    )

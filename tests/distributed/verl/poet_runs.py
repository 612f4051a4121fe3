"""What leaves verl's engine of a model that POET trains; for ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from tests.distributed.verl import engine_runs
from tests.support import verl_cpu
from tests.support.quiet import quiet

OPTIONS = engine_runs.OPTIONS["POET"]
STEPS = 3
"""A merge after two of them: the rotations of the third are beside the weights."""
FILES = (*engine_runs.CONTENTS, "hf_model")


def engine_of(folder: str, **others: Any) -> Any:
    return engine_runs.engine_of(folder, "POET", OPTIONS, **others)


def whole(engine: Any) -> dict[str, Tensor]:
    """What a rollout gets, of an engine that has just been asked for log-probabilities."""
    with engine.eval_mode(), torch.no_grad():
        engine_runs.loss_of(engine.module, *engine_runs.batch(0, 0, 0))
    tensors, adapters = engine.get_per_tensor_param()
    assert adapters is None
    return {name: tensor.clone() for name, tensor in tensors}


DEFAULTS = {"enable_gradient_checkpointing": True, "use_remove_padding": True}
CASES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "verl's defaults": {"model": DEFAULTS},
    "whole after forward": {"settings": {"reshard_after_forward": False}},
    "hsdp": {"settings": {"fsdp_size": 1}},
    "params on the cpu": {"settings": {"offload_policy": True}},
    "moved": {"offload": True},
}


def sent(folder: str, case: str) -> tuple[dict[str, Tensor], list[float]]:
    """What a rollout gets of the trained model, and all losses, of steps after that as well."""
    engine = engine_of(folder, **CASES[case])
    losses = engine_runs.train(engine, range(STEPS))
    tensors = whole(engine)
    engine.module._checkpoint_conversion_mapping = {"^decoder": "model"}  # as models of images do
    for name, tensor in whole(engine).items():
        assert torch.equal(tensor, tensors[name.replace("decoder", "model")])
    del engine.module._checkpoint_conversion_mapping
    return tensors, losses + engine_runs.train(engine, range(STEPS, engine_runs.STEPS))


def sent_by_deltas(folder: str, offload: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights in bf16, once as they are and once by what has changed of the first ones."""
    for name in ("uvicorn", "fastapi"):  # servers, imported beside what compares weights
        sys.modules.setdefault(name, MagicMock())
    engine = engine_of(folder, offload=offload)
    held = {name: tensor.bfloat16() for name, tensor in whole(engine).items()}
    engine.prime_delta_snapshots()
    for step in range(STEPS):
        engine_runs.train(engine, range(step, step + 1))
        for slots, _, counts, places, values, group in engine.get_per_tensor_param_delta_shard()[0]:
            add_changes(held, slots, counts, places, values, group)
    return held, {name: tensor.bfloat16() for name, tensor in whole(engine).items()}


def add_changes(
    held: Mapping[str, Tensor], slots: Any, counts: Any, places: Tensor, values: Tensor, group: Any
) -> None:
    """Write what all ranks say has changed of one parameter."""
    import torch.distributed as dist

    [(name, shape)] = slots
    assert tuple(held[name].shape) == tuple(shape)
    changes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(changes, (places, values))
    for where, what in changes:
        held[name].view(-1)[where.long()] = what


def saved(folder: str) -> None:
    """A checkpoint with the files of transformers."""
    engine = engine_of(folder, contents=FILES)
    engine_runs.train(engine, range(STEPS))
    engine.save_checkpoint(f"{folder}/checkpoint", global_step=STEPS)


def resumed_from_files(folder: str) -> list[float]:
    """The losses after that, of an engine that has loaded the checkpoint beside these files."""
    engine = engine_of(folder)
    engine.load_checkpoint(f"{folder}/checkpoint", del_local_after_load=False)
    return engine_runs.train(engine, range(STEPS, engine_runs.STEPS))


LORA = {"lora_rank": 4, "target_modules": "all-linear"}
WRONG: dict[str, dict[str, Any]] = {
    "ramp": {"options": {"clip_ramp": 2}},
    "init": {"options": {"init": "normalized"}},
    "unknown": {"options": {"blok": 8}},
    "matrix": {"options": {"split": {"up_proj": 2}}},
    "blocks": {"options": {"block": 24}},
    "lora": {"options": OPTIONS, "model": LORA},
    "dtype": {"options": OPTIONS, "settings": {"model_dtype": "bf16"}},
}


def errors(folder: str) -> dict[str, str]:
    """What is said of each wrong config."""
    verl_cpu.install()
    from verl.workers.config.engine import QATEngineConfig

    said = {}
    quantized = {"options": OPTIONS, "settings": {"qat": QATEngineConfig(enable=True)}}
    for case, wrong in {**WRONG, "quantized": quantized}.items():
        try:
            engine_runs.engine_of(folder, "POET", **wrong)
            said[case] = "nothing was raised"
        except ValueError as raised:
            said[case] = str(raised)
    engine = engine_of(folder)
    with quiet():
        engine.save_checkpoint(f"{folder}/checkpoint", global_step=0)
    other = engine_runs.engine_of(folder, "POET", {**OPTIONS, "seed": 1})
    try:
        other.load_checkpoint(f"{folder}/checkpoint", del_local_after_load=False)
    except (ValueError, RuntimeError) as raised:
        said["seed"] = str(raised)
    return said


def reference(folder: str) -> dict[str, Tensor]:
    """The state of an engine that only reads, beside a config that names POET."""
    engine = engine_of(folder, settings={"forward_only": True})
    assert engine.optimizer is None
    return whole(engine)

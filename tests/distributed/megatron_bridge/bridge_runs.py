"""A tiny GPT trained by what Megatron-Bridge sets up, and by Megatron alone; for ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tests.support import bridge_cpu
from tests.support import megatron_model as models
from tests.support.quiet import quiet

STEPS, SAVED_AT = 6, 3
SETTINGS: dict[str, Any] = {
    "lr": 0.02, "min_lr": 0.0, "weight_decay": 0.1, "clip_grad": 1.0, "adam_eps": 1e-4,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "spectral_muon": {"momentum": 0.9, "polar_dtype": "float32", "scalars": ["linear_proj"]},
    "spectral_sumo": {"rank": 4, "period": 2},
    "spectral_poet": {"merge_every": 2},
}


def wrapped(name: str, distributed: bool) -> tuple[tuple[int, int], Any]:
    """(data rank, ranks), the model as Bridge wraps it."""
    data = models.parallel()
    model = models.gpt()
    if name == "spectral_poet":
        from spectral_dist.integrations.megatron import poet

        poet.convert(model, block=4)  # in Bridge: a pre-wrap hook of the model's provider
    return data, models.wrap(model, distributed)


def by_megatron(name: str) -> list[float]:
    """The losses of Megatron on this one rank, without Bridge."""
    bridge_cpu.install()
    from spectral_dist.integrations.megatron import get_spectral_megatron_optimizer

    data, ddp = wrapped(name, False)
    config = models.optimizer_config(ddp, name, **SETTINGS)
    with quiet():
        optimizer = get_spectral_megatron_optimizer(config, [ddp], **OPTIONS[name])
    for group in optimizer.param_groups:
        group["weight_decay"] *= group["wd_mult"]  # as Megatron's scheduler does
    return [models.train_step(ddp, optimizer, models.batch(s, *data))[0] for s in range(STEPS)]


def config_of(name: str, **changes: Any) -> Any:
    """The config, after a way through YAML, as in Bridge's checkpoints."""
    from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
    from megatron.bridge.utils.instantiate_utils import instantiate

    from spectral_dist.integrations.megatron_bridge import SpectralOptimizerConfig

    settings = {"options": OPTIONS.get(name, {}), **SETTINGS, **changes}
    config = SpectralOptimizerConfig(optimizer=name, **settings)
    again = instantiate(_ConfigContainerBase._convert_value_to_dict(config))
    assert type(again) is SpectralOptimizerConfig
    assert again.options == settings["options"]
    again.finalize()
    return again


def set_up(name: str, plain: bool = False) -> tuple[tuple[int, int], Any, Any, Any]:
    """(data rank, ranks), model, and what Bridge's setup_optimizer returns."""
    bridge_cpu.install()
    from megatron.bridge.training.config import OptimizerConfig, SchedulerConfig
    from megatron.bridge.training.optim import setup_optimizer

    schedule = SchedulerConfig(lr_decay_style="cosine", lr_decay_iters=10, lr_warmup_iters=0)
    schedule.lr_warmup_steps, schedule.lr_decay_steps, schedule.wd_incr_steps = 0, 10, 10
    schedule.start_weight_decay = schedule.end_weight_decay = SETTINGS["weight_decay"]
    schedule.lr_decay_style = "constant"
    sharded = {"use_distributed_optimizer": True}
    if plain:
        config = OptimizerConfig(optimizer=name, **SETTINGS, **sharded)
        config.finalize()
    else:
        config = config_of(name, **sharded)
    data, ddp = wrapped(name, True)
    with quiet():
        return data, ddp, *setup_optimizer(config, schedule, [ddp])


def train(data: Any, ddp: Any, optimizer: Any, schedule: Any, steps: range) -> list[float]:
    found = []
    for step in steps:
        found.append(models.train_step(ddp, optimizer, models.batch(step, *data))[0])
        schedule.step(1)
    return found


def content(ddp: Any, optimizer: Any, schedule: Any, loading: bool) -> dict[str, Any]:
    """What Bridge's checkpoints hold, as Bridge makes it."""
    from megatron.bridge.training.checkpointing import generate_state_dict
    from megatron.bridge.training.config import CheckpointConfig

    return generate_state_dict(
        CheckpointConfig(ckpt_format="torch_dist"), [models.gpt_of(ddp)], optimizer, schedule,
        None, optim_sd_kwargs={"is_loading": loading},
    )  # fmt: skip


def by_bridge(folder: str, name: str) -> list[float]:
    """All losses, with a checkpoint on the way."""
    data, ddp, optimizer, schedule = set_up(name)
    from megatron.core import dist_checkpointing

    losses = train(data, ddp, optimizer, schedule, range(SAVED_AT))
    dist.barrier()
    dist_checkpointing.save(content(ddp, optimizer, schedule, False), folder)
    return losses + train(data, ddp, optimizer, schedule, range(SAVED_AT, STEPS))


def resumed(folder: str, name: str) -> list[float]:
    """The losses after the checkpoint."""
    data, ddp, optimizer, schedule = set_up(name)
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(content(ddp, optimizer, schedule, True), folder)
    models.gpt_of(ddp).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["opt_param_scheduler"])
    return train(data, ddp, optimizer, schedule, range(SAVED_AT, STEPS))


def by_name(name: str) -> list[float]:
    """The losses with Bridge's own config."""
    bridge_cpu.install()
    import spectral_dist.integrations.megatron  # noqa: F401

    return train(*set_up(name, plain=True), range(STEPS))


def by_name_options(name: str) -> list[float]:
    """The same with our config, and no options."""
    OPTIONS[name] = {}
    return train(*set_up(name), range(STEPS))


def refusals() -> list[str]:
    """What finalize says of wrong names and values, before there is a model."""
    bridge_cpu.install()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("spectral_muon", {"options": {"momentun": 0.9}}),
        ("spectral_muon", {"options": {"momentum": 2.0}}),
        ("spectral_muon", {"options": {"lr": 0.1}}),
        ("spectral_moun", {}),
        ("adam", {}),
    ]
    texts = []
    for name, changes in wrong:
        try:
            config_of(name, **changes)
        except ValueError as error:
            texts.append(str(error))
    return texts


def versions() -> list[str]:
    """What is said of other versions of Bridge."""
    bridge_cpu.install()
    from spectral_dist.integrations import megatron_bridge

    texts = []
    for version in (megatron_bridge.KNOWN, "0.5.0", "0.7.0"):
        try:
            megatron_bridge.require(
                "megatron-bridge", "megatron-bridge", version, megatron_bridge.KNOWN
            )
        except ImportError as error:
            texts.append(str(error))
    return texts

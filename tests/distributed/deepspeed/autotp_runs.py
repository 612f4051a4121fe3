"""Transformers under DeepSpeed's tensor parallelism (AutoTP), on a rank; and in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_dist.core.units import MatrixUnit
from tests.distributed.deepspeed import engine

VOCABULARY, LENGTH, BATCH = 64, 6, 8


def build(name: str = "llama") -> Any:
    """Return a tiny model of an architecture, random but the same in every process."""
    import transformers

    torch.manual_seed(1)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16,
        "attn_implementation": "eager", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if name == "neox":
        config: Any = transformers.GPTNeoXConfig(
            **common, tie_word_embeddings=False, hidden_dropout=0.0, attention_dropout=0.0
        )
        return transformers.GPTNeoXForCausalLM(config)
    heads = {"llama": 4, "gqa": 2, "tied": 2, "uneven": 3}.get(name, 2)
    if name == "uneven":
        common.update(num_attention_heads=6, hidden_size=48)
    common.update(num_key_value_heads=heads, tie_word_embeddings=name == "tied")
    if name == "phi3":
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**common))
    if name == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, head_dim=8))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))


def batch(step: int) -> Tensor:
    """Return the whole job's token ids of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def alone(
    name: str, make: Any, steps: int, clip: float = 0.0
) -> tuple[list[float], dict[str, Tensor]]:
    """Train in this process, without DeepSpeed; ``make`` builds the optimizer of the model."""
    model = build(name)
    optimizer = make(model)
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(step))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


def config(stage: int, tensor: int, world: int, **changes: Any) -> dict[str, Any]:
    """Return a JSON with AutoTP; a batch of ``BATCH`` sequences over the data-parallel ranks."""
    accumulation = changes.pop("accumulation", 1)
    section = {"autotp_size": tensor, **changes.pop("tensor_parallel", {})}
    found = engine.config(stage, world, **changes)
    del found["train_batch_size"]  # which DeepSpeed counts over tensor-parallel ranks too
    found["train_micro_batch_size_per_gpu"] = BATCH // (world // tensor) // accumulation
    found["gradient_accumulation_steps"] = accumulation
    if tensor > 1:
        found["tensor_parallel"] = section
    return found


def forget_groups() -> None:
    """Forget DeepSpeed's tensor-parallel groups: a rank of a test serves jobs of several sizes."""
    from deepspeed.utils import groups

    groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = None
    groups._DATA_PARALLEL_GROUP = groups.mpu = groups.mesh_device = None


def steps(running: Any, first: int, last: int) -> list[float]:
    """Take steps [first, last); return each micro-batch's loss."""
    group = running.data_parallel_group
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    accumulation = running.gradient_accumulation_steps()
    losses = []
    for step in range(first, last):
        for tokens in batch(step).chunk(size * accumulation)[rank::size]:
            loss = loss_of(running, tokens)
            running.backward(loss)
            running.step()
            losses.append(loss.item())
    return losses


def full_parameters(running: Any) -> dict[str, Tensor]:
    """Return the whole model, from each rank's tiles as DeepSpeed itself puts them together."""
    from deepspeed.checkpoint.affine import ParamAffineMap
    from deepspeed.utils import groups

    found = {}
    for name, p in running.module.named_parameters():
        meta = getattr(p, "ds_autotp_universal_checkpoint_meta", None)
        if meta is None:
            found[name] = p.detach().float().clone()
            continue
        group = groups.get_tensor_model_parallel_group()
        tiles: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(tiles, p.detach().float().clone(), group=group)
        layout = ParamAffineMap.from_dict(meta["conversion"]["affine_map"])
        found[name] = layout.rebuild(dict(enumerate(tiles)))
    return found


def train(
    configuration: dict[str, Any], name: str = "llama", count: int = 3, **keywords: Any
) -> dict[str, Any]:
    """Take steps, and return what a test looks at."""
    forget_groups()
    running = engine.engine_for(configuration, model=build(name), **keywords)
    losses = steps(running, 0, count)
    result = {"losses": losses, "parameters": full_parameters(running)}
    base = running.basic_optimizer
    result["polar_calls"] = base.polar_calls
    result["kinds"] = {r.name: (r.kind, [m.shape for m in r.matrices]) for r in base.all_routes}
    result["strategies"] = {
        strategy
        for unit in base.all_units
        if isinstance(unit, MatrixUnit)
        for strategy in unit.plan.strategies
    }
    running.destroy()
    return result


def trained(configuration: dict[str, Any], name: str, count: int) -> dict[str, Tensor]:
    """Return the parameters after some steps, with any optimizer."""
    forget_groups()
    running = engine.engine_for(configuration, model=build(name))
    steps(running, 0, count)
    parameters = full_parameters(running)
    running.destroy()
    return parameters


def train_with_client(configuration: dict[str, Any], name: str) -> dict[str, Any]:
    """Train with an optimizer that was built before, and sizes given to ``tp_model_init``."""
    import deepspeed
    from deepspeed.runtime.tensor_parallel import init_utils

    import spectral_dist

    def make(model: nn.Module) -> Any:
        optimizer = spectral_dist.Muon(spectral_dist.param_groups(model), **engine.OPTIONS)
        deepspeed.tp_model_init(model, tp_size=2, dtype=torch.float32)
        return optimizer

    section = configuration.pop("tensor_parallel")
    try:
        configuration["tensor_parallel"] = {
            key: value for key, value in section.items() if key != "autotp_size"
        }
        return train(configuration, name, optimizer=make)
    finally:
        init_utils._TP_MODEL_INIT_ARGS = None


def interrupted(
    configuration: dict[str, Any],
    folder: str,
    *,
    first: int,
    last: int,
    name: str = "gqa",
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    """Load tag ``load`` if given, take steps [first, last), save tag ``save`` if given."""
    forget_groups()
    running = engine.engine_for(configuration, model=build(name))
    if load is not None:
        path, _ = running.load_checkpoint(folder, tag=load)
        assert path is not None
    losses = steps(running, first, last)
    if save is not None:
        running.save_checkpoint(folder, tag=save)
    parameters = full_parameters(running)
    rates = [group["lr"] for group in running.basic_optimizer.param_groups]
    running.destroy()
    return {"losses": losses, "parameters": parameters, "rates": rates}

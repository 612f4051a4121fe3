"""verl: VERL_USE_EXTERNAL_MODULES=spectral_dist.integrations.verl in its environment, and then

actor_rollout_ref.actor.strategy=fsdp2
actor_rollout_ref.actor.optim.optimizer_impl=spectral_dist
actor_rollout_ref.actor.optim.optimizer=Muon

Every process of verl imports the modules that the variable names. verl has no registry of
optimizers, and no hook of it has the model: methods of its FSDP engine are wrapped here, of the
version ``KNOWN``, and do what they did for any other ``optimizer_impl``. For POET the model is
converted before it is sharded; what leaves the engine has R_o W R_i as each weight.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import verl
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from spectral_dist._error_help import explained
from spectral_dist._errors import suggest
from spectral_dist.core.named import class_of
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.after_import import after_import
from spectral_dist.integrations.huggingface.section import split_rotation
from spectral_dist.integrations.versions import require
from spectral_dist.params.param_groups import param_groups
from spectral_dist.params.spec import TAGS
from spectral_dist.poet.convert import convert
from spectral_dist.poet.layer import PoetLayer
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING

KNOWN = "0.9.1"
"""The version that the tests run."""
ENGINE = "verl.workers.engine.fsdp.transformer_impl"
CHECKPOINTS = "verl.utils.checkpoint.fsdp_checkpoint_manager"
MERGER = "verl.model_merger.fsdp_model_merger"
IMPLEMENTATION = "spectral_dist"
"""``optimizer_impl`` of our optimizers."""
OPTIONS = "override_optimizer_config"
"""Where options stand in verl's config."""


class Asked(NamedTuple):
    """What a config asks for, checked."""

    made_of: Any
    """class of the optimizer"""
    options: dict[str, Any]
    """of the optimizer"""
    routing: dict[str, Any]
    """options of ``param_groups``"""
    rotation: dict[str, Any] | None
    """keywords of ``spectral_dist.poet.convert``; None: the optimizer is not POET"""


def read(config: Any, strategy: str) -> Asked:
    """Return what a config asks for.

    Args:
        config: verl's FSDPOptimizerConfig. ``optimizer`` is the name of our class; lr, weight_decay
            and betas are options of ours, and ``override_optimizer_config`` has others, those of
            ``param_groups`` (matrices, scalars, split, one_sided), and POET's of
            ``spectral_dist.poet.convert`` (block, order, ...).
        strategy: of the engine, "fsdp2".

    Raises:
        ValueError: an unknown optimizer or option, or another strategy.
    """
    if strategy != "fsdp2":
        raise ValueError(
            f"strategy is {strategy!r}: every matrix was flattened to 1-D by FSDP1, which verl uses"
            " then; write strategy=fsdp2 (actor_rollout_ref.actor.strategy=fsdp2,"
            " critic.strategy=fsdp2)"
        )
    by_title = {entry.title: entry for entry in registry.entries()}
    entry = by_title.get(config.optimizer)
    if entry is None:
        raise ValueError(
            f"unknown optimizer {config.optimizer!r}{suggest(str(config.optimizer), by_title)}"
        )
    regular = importlib.import_module("verl.utils.py_functional").convert_to_regular_types
    written = dict(regular(config.override_optimizer_config) or {})
    routing: dict[str, Any] = {}
    rotation = None
    made_of: Any = POET
    if entry.rule is None:
        written, rotation = split_rotation(written, OPTIONS)
    else:
        made_of = class_of(entry)
        routing = {name: written.pop(name) for name in ROUTING if name in written}
    own = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": config.betas}
    options = {**own, **written}
    made_of.options_type.from_user(options, entry.title)
    return Asked(made_of, options, routing, rotation)


def build(module: nn.Module, config: Any, strategy: str) -> ShardedOptimizer:
    """Return the optimizer that a config asks for.

    Args:
        module: the engine's model, sharded already, and converted for POET.
        config: see ``read``.
        strategy: see ``read``.

    Raises:
        ValueError: as ``read`` does.
    """
    asked = read(config, strategy)
    optimizer: ShardedOptimizer = asked.made_of(
        param_groups(module, **asked.routing), **asked.options
    )
    _drop_references(module, optimizer)
    return optimizer


def _drop_references(module: nn.Module, optimizer: ShardedOptimizer) -> None:
    """Drop the weak references to parameters, which nothing needs any more.

    With ``param_offload`` verl moves the model to the CPU and back, for which torch swaps the
    contents of DTensors, and refuses to if there is a weak reference to one.
    """
    for parameter in module.parameters():
        TAGS.pop(parameter, None)  # type: ignore[no-untyped-call]
    optimizer.routes = [
        [replace(route, reference=None) for route in routes] for routes in optimizer.routes
    ]


def _with_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap FSDPEngine's ``_build_optimizer``: it builds ours, of the model, where it is asked."""

    @functools.wraps(original)
    @explained
    def _build_optimizer(self: Any, module: nn.Module) -> Any:
        if self.optimizer_config.optimizer_impl != IMPLEMENTATION:
            return original(self, module)
        return build(module, self.optimizer_config, self.engine_config.strategy)

    return _build_optimizer


def _converting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap FSDPEngine's ``_build_fsdp_module``: it converts the model for POET, and shards it."""

    @functools.wraps(original)
    @explained
    def _build_fsdp_module(self: Any, module: nn.Module) -> Any:
        config = self.optimizer_config  # None of a reference model
        is_ours = getattr(config, "optimizer_impl", None) == IMPLEMENTATION
        if is_ours and not self.engine_config.forward_only:
            asked = read(config, self.engine_config.strategy)
            if asked.rotation is not None:
                _check(self, module, asked)
                convert(module, **asked.rotation)
        return original(self, module)

    return _build_fsdp_module


def _check(engine: Any, module: nn.Module, asked: Asked) -> None:
    """Raise a ValueError if an engine's config has what POET does not do.

    Args:
        engine: verl's FSDPEngine.
        module: its model, not sharded yet.
        asked: by its config.
    """
    if any(p.dtype != torch.float32 for p in module.parameters()):
        raise ValueError(
            f"model_dtype is {engine.engine_config.model_dtype!r}, but FSDP2 takes one dtype of all"
            " that trains in a module, and POET's skew parameters are float32: write"
            " model_dtype=fp32, and param_dtype=bf16 in mixed_precision to compute in bfloat16"
        )
    if "init" in (asked.rotation or ()):
        raise ValueError(
            f"{OPTIONS} has init, but W is what verl has loaded, by its first rank alone: leave it"
            " out"
        )
    if asked.options.get("clip_ramp"):
        raise ValueError(
            f"clip_ramp is {asked.options['clip_ramp']}, but nobody asks for clip_factor(): verl's"
            " engine clips to clip_grad in every step; leave clip_ramp out"
        )
    rank = engine.model_config.lora_rank
    if rank > 0:
        raise ValueError(
            f"lora_rank is {rank}, but POET rotates the weights themselves: write"
            " actor_rollout_ref.model.lora_rank=0, or take another optimizer"
        )
    if engine._qat_enabled:
        raise ValueError(
            "qat.enable is True, but POET rotates the weights themselves: leave qat out, or take"
            " another optimizer"
        )


def _rotated(layer: PoetLayer, weight: Tensor) -> Tensor:
    """Return R_o W R_i in the dtype of W, of skew parameters that are gathered for it.

    Args:
        layer: whose skew parameters are sharded; this is a collective call.
        weight: all of W, on the device to compute on.
    """
    skews = {leaf: _whole(skew, weight.device) for leaf, skew in layer.skews.items()}
    return layer.rotated_weight(weight, skews).to(weight.dtype).contiguous()


def _whole(tensor: Tensor, device: torch.device) -> Tensor:
    """Return all of a parameter on a device, as verl gathers those that it has offloaded."""
    tensor = tensor.detach().to(device)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _parts(module: nn.Module) -> dict[str, tuple[PoetLayer, str]]:
    """Return the layer and the leaf of the names in a state dict that rotated layers have."""
    return {
        f"{key}.{leaf}": (layer, leaf)
        for key, layer in module.named_modules()
        if isinstance(layer, PoetLayer)
        for leaf in ("weight", *layer.skews, "_extra_state")
    }


def _exported_parts(module: nn.Module) -> dict[str, tuple[PoetLayer, str]]:
    """Return the ``_parts`` under the names that weights have outside of the engine."""
    convert_keys = importlib.import_module("verl.utils.model").convert_weight_keys
    parts: dict[str, tuple[PoetLayer, str]] = convert_keys(_parts(module), module)
    return parts


def _exporting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap FSDPEngine's ``get_per_tensor_param``: weights are R_o W R_i, and there is no skew."""

    def tensors(
        every: Iterator[tuple[str, Tensor]], parts: Mapping[str, tuple[PoetLayer, str]]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in every:
            layer, leaf = parts.get(name, (None, ""))
            if layer is None:
                yield name, tensor
            elif leaf == "weight":
                yield name, _rotated(layer, tensor)

    @functools.wraps(original)
    def get_per_tensor_param(self: Any, *args: Any, **kwargs: Any) -> Any:
        every, adapters = original(self, *args, **kwargs)
        parts = _exported_parts(self.module)
        return (tensors(every, parts) if parts else every), adapters

    return get_per_tensor_param


def _exporting_shards(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap FSDPEngine's ``get_per_tensor_param_shard``: shards are those of R_o W R_i.

    A shard of it needs all of W, which is gathered, one weight after the other.
    """

    def shards(
        every: Iterator[tuple[str, Tensor, Any]], parts: Mapping[str, tuple[PoetLayer, str]]
    ) -> Iterator[tuple[str, Tensor, Any]]:
        for name, local, spec in every:
            layer, leaf = parts.get(name, (None, ""))
            if layer is None:
                yield name, local, spec
            elif leaf == "weight":
                rotated = _rotated(layer, _whole(layer.weight, local.device))
                copies = [Replicate()] * spec.mesh.ndim
                whole = DTensor.from_local(rotated, spec.mesh, copies, run_check=False)
                shard = whole.redistribute(spec.mesh, spec.placements).to_local()
                yield name, shard.to(local.dtype).reshape(-1), spec

    @functools.wraps(original)
    def get_per_tensor_param_shard(self: Any, *args: Any, **kwargs: Any) -> Any:
        every, adapters = original(self, *args, **kwargs)
        parts = _exported_parts(self.module)
        return (shards(every, parts) if parts else every), adapters

    return get_per_tensor_param_shard


def _exporting_files(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``get_fsdp_full_state_dict``, of which checkpoints write the model for transformers."""

    @functools.wraps(original)
    def get_fsdp_full_state_dict(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = original(model, *args, **kwargs)
        parts = _parts(model)
        values = {name: state.pop(name) for name in parts if name in state}  # of rank 0 alone
        for name, weight in values.items():
            layer, leaf = parts[name]
            if leaf == "weight":
                key = name.removesuffix("weight")
                skews = {skew: values[key + skew] for skew in layer.skews}
                state[name] = layer.rotated_weight(weight, skews).to(weight.dtype).contiguous()
        return state

    return get_fsdp_full_state_dict


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap FSDPModelMerger's ``_load_and_merge_state_dicts``: it refuses what POET has saved."""

    @functools.wraps(original)
    @explained
    def _load_and_merge_state_dicts(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        skews = [name for name in state if name.rpartition(".")[2].startswith("skew_")]
        if skews:
            raise ValueError(
                f"{self.config.local_dir} has {skews[0]}: POET has saved it, and verl.model_merger"
                " would write weights without their rotations; add hf_model to the trainer's"
                " checkpoint.save_contents, which writes the rotated weights to huggingface/"
            )
        return state

    return _load_and_merge_state_dicts


def _wrap(engine: Any) -> None:
    """Wrap the methods in the engine's module, once it is imported."""
    wrapped = engine.FSDPEngine
    wrapped._build_fsdp_module = _converting(wrapped._build_fsdp_module)
    wrapped._build_optimizer = _with_model(wrapped._build_optimizer)
    wrapped.get_per_tensor_param = _exporting(wrapped.get_per_tensor_param)
    wrapped.get_per_tensor_param_shard = _exporting_shards(wrapped.get_per_tensor_param_shard)


def _wrap_checkpoints(manager: Any) -> None:
    """Wrap the function in the checkpoint manager's module, once it is imported."""
    manager.get_fsdp_full_state_dict = _exporting_files(manager.get_fsdp_full_state_dict)


def _wrap_merger(merger: Any) -> None:
    """Wrap the method in the merger's module, once it is imported."""
    wrapped = merger.FSDPModelMerger
    wrapped._load_and_merge_state_dicts = _refusing(wrapped._load_and_merge_state_dicts)


require("verl", "verl", verl.__version__, KNOWN)
after_import(ENGINE, _wrap)
after_import(CHECKPOINTS, _wrap_checkpoints)
after_import(MERGER, _wrap_merger)

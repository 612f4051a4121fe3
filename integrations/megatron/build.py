"""Megatron's optimizer built around ours: all but the torch optimizer inside is Megatron's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import nn

from spectral_dist.integrations.megatron import _compat
from spectral_dist.integrations.megatron.checkpoint import wrap_checkpointing
from spectral_dist.integrations.megatron.config import (
    check_marks,
    refuse,
    refuse_adaptation,
    refuse_overrides,
    spectral_options,
)
from spectral_dist.integrations.megatron.names import global_names, joined, stage_copies
from spectral_dist.integrations.megatron.optimizer import (
    TYPES,
    MegatronInnerOptimizer,
    SpectralPOET,
)
from spectral_dist.integrations.megatron.placement import MegatronPlacement
from spectral_dist.integrations.megatron.poet_merge import merge_after_steps
from spectral_dist.integrations.megatron.ranks import MegatronRanks
from spectral_dist.integrations.megatron.reader import MegatronReader
from spectral_dist.params.classify import classify
from spectral_dist.params.param_groups import EXACT
from spectral_dist.params.spec import ParamSpec
from spectral_dist.params.table import show
from spectral_dist.placement.ranks import group_or_none
from spectral_dist.placement.tiles import FlatRange
from spectral_dist.rules.options import ROUTING
from spectral_dist.sharding import collectives

KIND_KEY = "spectral_kind"
"""The key by which Megatron keeps parameters of different kinds in different groups."""
ONE_SIDED = "one_sided"
"""The kind of matrices whose polar factor is taken exactly, beside those of ``ParamSpec.kind``."""


def build(
    original: Callable[..., Any],
    name: str,
    options: Mapping[str, Any],
    config: OptimizerConfig,
    model_chunks: Sequence[nn.Module],
    config_overrides: Mapping[Any, Any] | None = None,
    *,
    pg_collection: Any = None,
    **kwargs: Any,
) -> Any:
    """Build what ``get_megatron_optimizer`` builds for Adam, with ours in Adam's place.

    Args:
        original: Megatron's ``get_megatron_optimizer``.
        name: of our optimizer, a key of ``TYPES``.
        options: our options, and those of ``param_groups`` (``ROUTING``).
        config, model_chunks, config_overrides, pg_collection, kwargs: Megatron's arguments.

    Raises:
        ValueError: an unknown or bad option, or a configuration that is not supported.
    """
    all_options, routing = checked_options(config, options, name)  # before the table is shown
    refuse(config, model_chunks)
    refuse_overrides(config_overrides or {})
    refuse_adaptation(options, model_chunks)
    ranks = parallel_ranks(pg_collection)
    check_marks(
        model_chunks,
        ranks[0].tensor_size,
        expert_parallel_size(pg_collection),
        ranks[1].tensor_size,
        on_any_stage,
    )
    reader = MegatronReader(*ranks, global_names(model_chunks))
    routes = _routes(model_chunks, reader, routing)
    if issubclass(TYPES[name], SpectralPOET):
        has_skews = on_any_stage([any(route.kind == "skew" for route in routes.values())])[0]
        _check_poet(name, config, options, has_skews)
    if config_overrides is None:
        config_overrides = _compat.standard_overrides(config)
    adam_config = copy.copy(config)
    adam_config.optimizer = "adam"
    overrides = {**config_overrides, **_kind_overrides(routes)}
    chunks = list(model_chunks)
    built = original(adam_config, chunks, overrides, pg_collection=pg_collection, **kwargs)
    for leaf in _compat.leaves(built):
        leaf.config = config
        if leaf.optimizer is not None:
            members = _group_members(leaf, adam_config, overrides)
            inner = _replace_adam(leaf, members, TYPES[name], all_options, routes, reader)
            copies = stage_copies(model_chunks)
            copied_routes = [route for route in routes.values() if id(route.parameter) in copies]
            wrap_checkpointing(leaf, inner, {m.name for r in copied_routes for m in r.matrices})
    built.config = config
    if issubclass(TYPES[name], SpectralPOET):
        merge_after_steps(built, config, model_chunks)
    return built


def checked_options(
    config: OptimizerConfig, options: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (all options of our optimizer, those of ``param_groups``) of what a user has given.

    Args:
        config: Megatron's, which sets some of the options.
        options: ours, and those of ``param_groups`` (``ROUTING``).
        name: of our optimizer, a key of ``TYPES``.

    Raises:
        ValueError: an unknown or bad option.
    """
    known = {option.name for option in fields(TYPES[name].options_type)}
    routing = {k: v for k, v in options.items() if k in ROUTING}
    unrouted = {k: v for k, v in options.items() if k not in ROUTING}
    all_options = spectral_options(config, unrouted, name, known)
    TYPES[name].options_type.from_user(all_options, name)
    return all_options, routing


def _check_poet(name: str, config: Any, options: Mapping[str, Any], has_skews: bool) -> None:
    """Raise a ValueError if POET has nothing to train, or ``clip_ramp`` nothing to clip.

    Args:
        name: of the optimizer, for the message.
        config: Megatron's OptimizerConfig.
        options: ours.
        has_skews: whether the part of the model on any pipeline stage has skew parameters.
    """
    if not has_skews:
        raise ValueError(
            f"{name} trains the rotations of a model that"
            " spectral_dist.integrations.megatron.poet.convert(model) has converted before it was"
            " wrapped; this one has none. In scripts that make a model_cfg (Megatron-LM's from 0.19"
            " on, which then call no model_provider) write"
            " model_cfg.pre_wrap_hooks.append(poet.convert); in others return"
            " poet.convert(model) from the model_provider"
        )
    if options.get("clip_ramp") and not config.clip_grad:
        raise ValueError(
            f"clip_ramp is {options['clip_ramp']}, but clip_grad is {config.clip_grad}: nothing is"
            " clipped; write clip_grad=..., or --clip-grad, or leave clip_ramp out"
        )


def parallel_ranks(collection: Any) -> tuple[MegatronRanks, MegatronRanks]:
    """Return (the ranks that hold dense parameters, the ranks that hold experts).

    Args:
        collection: Megatron's ``pg_collection``; None for the groups of ``parallel_state``.
    """
    if collection is None:
        tensor = parallel_state.get_tensor_model_parallel_group()
        data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        expert_tensor = parallel_state.get_expert_tensor_parallel_group()
        expert_data = parallel_state.get_expert_data_parallel_group()
    else:
        tensor, data = collection.tp, getattr(collection, "dp_cp", collection.dp)
        expert_tensor = getattr(collection, "expt_tp", None) or tensor
        expert_data = getattr(collection, "expt_dp", None) or data
    return (
        MegatronRanks(group_or_none(tensor), group_or_none(data)),
        MegatronRanks(group_or_none(expert_tensor), group_or_none(expert_data)),
    )


def expert_parallel_size(collection: Any) -> int:
    """Return the number of ranks over which Megatron distributes experts."""
    if collection is None:
        return int(parallel_state.get_expert_model_parallel_world_size())
    group = getattr(collection, "ep", None)
    return 1 if group is None else int(group.size())


def _routes(
    chunks: Sequence[nn.Module], reader: MegatronReader, routing: Mapping[str, Any]
) -> dict[int, ParamSpec]:
    """Return the route of every parameter of all chunks, by its id, and show the table of them.

    Args:
        chunks: this rank's parts of the model.
        reader: says what each parameter is.
        routing: options of ``param_groups``.
    """
    routes = classify(joined(chunks), make_inspector=reader, any_stage=on_any_stage, **routing)
    show(routes)
    return {id(route.parameter): route for route in routes}


def on_any_stage(flags: list[bool]) -> list[bool]:
    """Return, for each flag, whether it is set on any pipeline stage. A collective call.

    Args:
        flags: of this stage's part of the model; equally many on every stage.
    """
    group = group_or_none(parallel_state.get_pipeline_model_parallel_group(check_initialized=False))
    texts = collectives.gather_texts("".join(str(int(flag)) for flag in flags), group)
    return [any(text[i] == "1" for text in texts) for i in range(len(flags))]


def _kind_overrides(routes: Mapping[int, ParamSpec]) -> dict[ParamKey, dict[str, Any]]:
    """Return ``config_overrides`` that make Megatron put each kind of parameters into own groups.

    The kinds are matrices, matrices whose polar factor is taken exactly, skew parameters, and the
    rest, which has no override.
    """

    def matches(kind: str) -> Callable[[Any], bool]:
        return lambda parameter: _group_kind(routes[id(parameter)]) == kind

    predicates = {
        kind: ParamPredicate(name=f"spectral_dist {kind}", fn=matches(kind))
        for kind in ("matrix", ONE_SIDED, "skew")
    }
    overrides: dict[ParamKey, dict[str, Any]] = {
        ParamKey(predicate=predicate): {KIND_KEY: kind} for kind, predicate in predicates.items()
    }
    # Megatron's scheduler multiplies the weight decay by it
    overrides[ParamKey(predicate=predicates["skew"])]["wd_mult"] = 0.0
    return overrides


def _group_kind(route: ParamSpec) -> str:
    """Return the kind by which a parameter is put into a group."""
    return ONE_SIDED if route.kind == "matrix" and route.one_sided else route.kind


def _replace_adam(
    leaf: Any,
    members: Sequence[Sequence[nn.Parameter]],
    cls: type[MegatronInnerOptimizer],
    options: Mapping[str, Any],
    routes: Mapping[int, ParamSpec],
    reader: MegatronReader,
) -> MegatronInnerOptimizer:
    """Replace the Adam inside one of Megatron's optimizers by ours, and return ours.

    Args:
        leaf: Megatron's optimizer of one kind of parameters (dense ones, or experts).
        members: the model's parameters in each of its groups.
        cls: the class of our optimizer.
        options: for it.
        routes: of every parameter of the model, by its id.
        reader: says how weights are cut.
    """
    adam = leaf.optimizer
    groups, keys = [], []
    for index, group in enumerate(adam.param_groups):
        params = members[index]
        specific = {k: v for k, v in group.items() if _is_group_specific(k, v, adam.defaults)}
        keys.append([*specific, "lr", "weight_decay"])
        kind = group.get(KIND_KEY, "scalar")
        exact = EXACT if kind == ONE_SIDED else {}
        kind = "matrix" if kind == ONE_SIDED else kind
        group_routes = [routes[id(p)] for p in params]
        groups.append(
            {**exact, **specific, "kind": kind, "routes": group_routes, "params": list(params)}
        )
    ranges = None
    param_index = {id(p): (i, k) for i, params in enumerate(members) for k, p in enumerate(params)}
    if isinstance(leaf, DistributedOptimizer):
        ranges = _ranges(leaf)
        param_index = _compat.group_places(leaf)
    replicate = options.get("replicate_momentum", False)
    placement = MegatronPlacement(reader, param_index, ranges, replicate)
    inner = cls(groups, placement=placement, **options)
    for group, adam_group in zip(inner.param_groups, adam.param_groups, strict=True):
        # set afterwards: torch refuses tensors that are no leaves, as some master shards are
        group["params"] = adam_group["params"]
    inner.set_megatron_keys(keys)
    _compat.replace_inner(leaf, inner, lambda optimizer: optimizer.prepare())
    return inner


def _is_group_specific(key: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    """Return whether our group has to take over an entry of one of Adam's groups.

    Such entries are the scheduler's, Megatron's own, and values that are not Adam's defaults, for
    example another eps.
    """
    if key in ("params", "lr", "weight_decay"):  # ours are set elsewhere
        return False
    return key not in defaults or value != defaults[key]


def _group_members(
    leaf: Any, config: OptimizerConfig, overrides: Mapping[Any, Any]
) -> list[list[nn.Parameter]]:
    """Return the model's parameters in each group of one of Megatron's optimizers.

    With the distributed optimizer too they are those of all ranks, not of this rank's ranges only.
    """
    groups = leaf.optimizer.param_groups
    if isinstance(leaf, DistributedOptimizer):  # its groups hold this rank's parameters only
        all_groups = _compat.param_groups(leaf.model_chunks, config, overrides)
        is_expert = groups[0]["is_expert_parallel"]
        return [list(g["params"]) for g in all_groups if g["is_expert_parallel"] == is_expert]
    return _compat.model_parameters(leaf)


def _ranges(leaf: Any) -> dict[int, FlatRange]:
    """Return where each parameter lies in the distributed optimizer's buckets, by its id."""
    return {id(p): FlatRange(start, numel) for p, start, numel in _compat.bucket_places(leaf)}

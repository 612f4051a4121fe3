"""Builds Megatron's optimizer around ours: everything but the torch optimizer inside is its own."""

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
from spectral_dist.integrations.megatron.checkpoint import keep_checkpoints
from spectral_dist.integrations.megatron.config import (
    check_marks,
    refuse,
    refuse_adapting,
    refuse_overrides,
    spectral_options,
)
from spectral_dist.integrations.megatron.names import copies, global_names, unwrap
from spectral_dist.integrations.megatron.optimizer import TYPES, InsideMegatron, SpectralPOET
from spectral_dist.integrations.megatron.placement import FlatRange, MegatronPlacement
from spectral_dist.integrations.megatron.poet_merge import keep_merging
from spectral_dist.integrations.megatron.ranks import Ranks, alone
from spectral_dist.integrations.megatron.reader import MegatronReader
from spectral_dist.params.classify import classify
from spectral_dist.params.param_groups import EXACT
from spectral_dist.params.spec import ParamSpec
from spectral_dist.params.table import show
from spectral_dist.rules.options import ROUTING
from spectral_dist.sharding import collectives

KIND = "spectral_kind"
"""Key that Megatron keeps in the groups it makes: matrices and the rest are never in one."""
ONE_SIDED = "one_sided"


def build(
    original: Callable[..., Any],
    name: str,
    given: Mapping[str, Any],
    config: OptimizerConfig,
    model_chunks: Sequence[nn.Module],
    config_overrides: Mapping[Any, Any] | None = None,
    *,
    pg_collection: Any = None,
    **kwargs: Any,
) -> Any:
    """What ``get_megatron_optimizer`` returns for Adam, with ours in Adam's place."""
    known = {option.name for option in fields(TYPES[name].options_type)}
    own = {k: v for k, v in given.items() if k not in ROUTING}
    options = spectral_options(config, own, name, known)
    TYPES[name].options_type.from_user(options, name)  # before the table: it stands out
    refuse(config, model_chunks)
    refuse_overrides(config_overrides or {})
    refuse_adapting(given, model_chunks)
    ranks = ranks_of(pg_collection)
    check_marks(model_chunks, ranks[0].tensor, expert_ranks(pg_collection), on_any_stage)
    reader = MegatronReader(*ranks, global_names(model_chunks))
    routes = _routes(model_chunks, reader, {k: v for k, v in given.items() if k in ROUTING})
    if issubclass(TYPES[name], SpectralPOET):
        rotated = on_any_stage([any(route.kind == "skew" for route in routes.values())])[0]
        _check_converted(name, config, given, rotated)
    if config_overrides is None:
        config_overrides = _compat.standard_overrides(config)
    as_adam = copy.copy(config)
    as_adam.optimizer = "adam"
    overrides = {**config_overrides, **_kinds(routes)}
    built = original(as_adam, list(model_chunks), overrides, pg_collection=pg_collection, **kwargs)
    for leaf in _compat.leaves(built):
        leaf.config = config
        if leaf.optimizer is not None:
            members = _members(leaf, as_adam, overrides)
            inner = _swap(leaf, members, TYPES[name], options, routes, reader)
            again = copies(model_chunks)
            twice = {
                m.name for r in routes.values() if id(r.parameter) in again for m in r.matrices
            }
            keep_checkpoints(leaf, inner, twice)
    built.config = config
    if issubclass(TYPES[name], SpectralPOET):
        keep_merging(built, config, model_chunks)
    return built


def _check_converted(name: str, config: Any, given: Mapping[str, Any], rotated: bool) -> None:
    """ValueError: POET has nothing to rotate, on any stage, or nothing to clip."""
    if not rotated:
        raise ValueError(
            f"{name} trains the rotations of a model that"
            " spectral_dist.integrations.megatron.poet.convert(model) has converted before it was"
            " wrapped; this one has none. In scripts that make a model_cfg (Megatron-LM's from 0.19"
            " on, which then call no model_provider) write model_cfg.pre_wrap_hooks.append(lambda"
            " models: [poet.convert(model) for model in models]); in others return"
            " poet.convert(model) from the model_provider"
        )
    if given.get("clip_ramp") and not config.clip_grad:
        raise ValueError(
            f"clip_ramp is {given['clip_ramp']}, but clip_grad is {config.clip_grad}: nothing is"
            " clipped; write clip_grad=..., or --clip-grad, or leave clip_ramp out"
        )


def ranks_of(collection: Any) -> tuple[Ranks, Ranks]:
    """Of dense parameters, and of experts."""
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
        Ranks(alone(tensor), alone(data)),
        Ranks(alone(expert_tensor), alone(expert_data)),
    )


def expert_ranks(collection: Any) -> int:
    """How many ranks experts are spread over."""
    if collection is None:
        return int(parallel_state.get_expert_model_parallel_world_size())
    group = getattr(collection, "ep", None)
    return 1 if group is None else int(group.size())


def _routes(
    chunks: Sequence[nn.Module], reader: MegatronReader, given: Mapping[str, Any]
) -> dict[int, ParamSpec]:
    """The route of every parameter of all chunks, by its id."""
    model = nn.Module()
    for index, chunk in enumerate(chunks):
        inside = unwrap(chunk)
        if len(chunks) == 1:
            model = inside
        else:
            model.add_module(f"chunk{index}", inside)
    found = classify(model, make_inspector=reader, any_stage=on_any_stage, **given)
    show(found)
    return {id(route.parameter): route for route in found}


def on_any_stage(here: list[bool]) -> list[bool]:
    """What is true of the part of the model on any pipeline stage. A collective call."""
    group = alone(parallel_state.get_pipeline_model_parallel_group(check_initialized=False))
    texts = collectives.gather_texts("".join(str(int(x)) for x in here), group)
    return [any(text[i] == "1" for text in texts) for i in range(len(here))]


def _kinds(routes: Mapping[int, ParamSpec]) -> dict[ParamKey, dict[str, Any]]:
    """Overrides that keep matrices, those whose polar factor is exact, and skews in own groups."""

    def among(wanted: str) -> Callable[[Any], bool]:
        return lambda parameter: _kind(routes[id(parameter)]) == wanted

    predicates = {
        kind: ParamPredicate(name=f"spectral_dist {kind}", fn=among(kind))
        for kind in ("matrix", ONE_SIDED, "skew")
    }
    overrides: dict[ParamKey, dict[str, Any]] = {
        ParamKey(predicate=found): {KIND: kind} for kind, found in predicates.items()
    }
    overrides[ParamKey(predicate=predicates["skew"])]["wd_mult"] = 0.0  # the scheduler's
    return overrides


def _kind(route: ParamSpec) -> str:
    return ONE_SIDED if route.kind == "matrix" and route.one_sided else route.kind


def _swap(
    leaf: Any,
    members: Sequence[Sequence[nn.Parameter]],
    cls: type[InsideMegatron],
    options: Mapping[str, Any],
    routes: Mapping[int, ParamSpec],
    reader: MegatronReader,
) -> InsideMegatron:
    """Put ours in the place of the Adam of one of Megatron's optimizers; it."""
    adam = leaf.optimizer
    groups, keys = [], []
    for number, group in enumerate(adam.param_groups):
        kind = group.get(KIND, "scalar")
        own = {k: v for k, v in group.items() if k != "params" and _is_own(k, v, adam.defaults)}
        keys.append([*own, "lr", "weight_decay"])
        found = [routes[id(p)] for p in members[number]]
        settings = EXACT if kind == ONE_SIDED else {}
        kind = "matrix" if kind == ONE_SIDED else kind
        groups.append(
            {**settings, **own, "kind": kind, "routes": found, "params": list(members[number])}
        )
    ranges = None
    home = {id(p): (i, k) for i, found in enumerate(members) for k, p in enumerate(found)}
    if isinstance(leaf, DistributedOptimizer):
        ranges = _ranges(leaf)
        home = _compat.group_places(leaf)
    placement = MegatronPlacement(reader, home, ranges, options.get("replicate_momentum", False))
    inner = cls(groups, placement=placement, **options)
    for mine, theirs in zip(inner.param_groups, adam.param_groups, strict=True):
        mine["params"] = theirs["params"]  # masters or shards, not all of which are leaves
    inner.keep_keys(keys)
    _compat.put_in(leaf, inner, lambda optimizer: optimizer.prepare())
    return inner


def _is_own(key: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether a group has a key of its own: the scheduler's, Megatron's, or another eps."""
    if key in ("lr", "weight_decay"):  # ours from the start, and then the scheduler's
        return False
    return key not in defaults or value != defaults[key]


def _members(
    leaf: Any, config: OptimizerConfig, overrides: Mapping[Any, Any]
) -> list[list[nn.Parameter]]:
    """The model's parameters in each group of one of Megatron's optimizers, whichever rank's."""
    groups = leaf.optimizer.param_groups
    if isinstance(leaf, DistributedOptimizer):  # its own lists hold this rank's only
        made = _compat.param_groups(leaf.model_chunks, config, overrides)
        mine = [g for g in made if g["is_expert_parallel"] == groups[0]["is_expert_parallel"]]
        return [list(g["params"]) for g in mine]
    return _compat.model_parameters(leaf)


def _ranges(leaf: Any) -> dict[int, FlatRange]:
    """Where each parameter lies in the buckets of the distributed optimizer."""
    return {id(p): FlatRange(start, share) for p, start, share in _compat.bucket_places(leaf)}

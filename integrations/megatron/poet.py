"""POET for Megatron: convert a model before it is wrapped, export plain weights at the end."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from spectral_dist._error_help import explained
from spectral_dist.integrations.megatron import _compat
from spectral_dist.integrations.megatron.build import on_any_stage, parallel_ranks
from spectral_dist.integrations.megatron.names import global_names, joined, unwrap
from spectral_dist.integrations.megatron.poet_layers import KINDS
from spectral_dist.integrations.megatron.poet_merge import gather_parameters
from spectral_dist.integrations.megatron.reader import GATE_AND_UP, MegatronReader, fused_splits
from spectral_dist.params.classify import classify
from spectral_dist.params.spec import ParamSpec
from spectral_dist.params.splits import Split
from spectral_dist.placement.ranks import group_or_none
from spectral_dist.poet.convert import initial, rotations, settings_of
from spectral_dist.poet.layer import PoetLayer, Settings
from spectral_dist.poet.rotation import Span
from spectral_dist.sharding import collectives

RowPart: TypeAlias = tuple[str, tuple[Span, ...]]
"""A matrix in the rows of a layer's tile: its name ('' if it is the only one), and its rows."""


Model = TypeVar("Model", nn.Module, list[nn.Module])


@explained
def convert(
    model: Model,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    **settings: Any,
) -> Model:
    """Rotate every Column- and RowParallelLinear but the output layer, in place.

    Call it on the model as built, before it is wrapped, and on all ranks: Megatron's
    DistributedDataParallel then makes no gradient buffers for frozen weights. The place for that is
    a hook in ``pre_wrap_hooks`` of a script's ``model_cfg`` (Megatron-LM's scripts have one from
    0.19 on), or else the model_provider.

    q, k, v (or gate and up) in one weight are each rotated by itself. ``blocks`` matches names of
    layers in the whole model (layers are counted from 0), and those of such parts: the layer's name
    and '.q', '.k', '.v', '.gate' or '.up', as in {r"linear_qkv\\.[kv]$": 64}. If ``segments`` is a
    multiple of several tensor-parallel sizes, runs with all of these sizes are the same.

    Args:
        model: this rank's part of the model; the list of its parts with virtual pipeline stages.
        matrices, scalars: regular expressions of weights' names, as this rank has them: those to
            rotate although they would not be, and those not to rotate.
        settings: as of ``spectral_dist.poet.convert``.

    Returns:
        The model, or the list.

    Raises:
        ValueError: as of ``spectral_dist.poet.convert``; or a layer that is not supported.
    """
    chosen = settings_of(settings)
    chunks: list[nn.Module] = model if isinstance(model, list) else [model]
    for chunk in chunks:
        _check_plain(chunk)
    names = global_names(chunks)
    reader = MegatronReader(*parallel_ranks(None), names)
    whole = joined(chunks)
    routes = classify(
        whole, matrices=matrices, scalars=scalars, make_inspector=reader, any_stage=on_any_stage
    )
    linears = _layers_to_rotate(whole, routes)
    if not on_any_stage([bool(linears)])[0]:
        raise ValueError(
            "poet.convert: the model has no ColumnParallelLinear or RowParallelLinear to rotate."
            " Transformer Engine's layers are not supported: build it with"
            " get_gpt_layer_local_spec"
        )
    splits = fused_splits(whole)
    layers = {names[id(m.weight)].removesuffix(".weight"): m for m in linears}
    parts = {key: _matrix_parts(m, splits.get(id(m.weight))) for key, m in layers.items()}
    sides = {key: _rotation_sides(m, parts[key]) for key, m in layers.items()}
    rotations_of = rotations(chosen, sides, on_any_stage)
    for key, layer in layers.items():
        _initialize(layer, key, parts[key], chosen)
        layer.__class__ = KINDS[type(layer)]
        layer.rotate_by(key, rotations_of[key][:1], rotations_of[key][1:], chosen)
        _mark_skews(layer)
    if _layers_differ(whole, layers):
        # or Megatron would stack, over layers, tensors of other shapes, or that some do not have
        for chunk in chunks:
            _compat.save_layers_separately(chunk)
    return model


@explained
@torch.no_grad()
def export(model: nn.Module) -> dict[str, Any]:
    """Return this rank's state dict with the keys that it had before ``convert``.

    Tiles of R_o W R_i, computed in float32, stand in the place of tiles of W. All tensors are on
    the CPU, in the dtypes of the model, which is not changed. Load it by ``load_state_dict`` of a
    model that was built alike and not converted. With overlap_param_gather this is a collective
    call of the data-parallel ranks.
    """
    gather_parameters([model])
    model = unwrap(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PoetLayer)}
    exported: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        key, _, leaf = name.rpartition(".")
        layer = layers.get(key)
        if layer is not None and (leaf in layer.skews or leaf == "_extra_state"):
            continue
        if layer is not None and leaf == "weight":
            value = layer.rotated_weight(value, layer.skews).to(value.dtype)
        exported[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
    return exported


def _check_plain(model: nn.Module) -> None:
    """Raise a ValueError if the model is wrapped or converted already."""
    if unwrap(model) is not model:
        raise ValueError(
            f"poet.convert: the model is wrapped in {type(model).__name__} already; call it on the"
            " GPTModel before, in a hook of model_cfg.pre_wrap_hooks or, in scripts without a"
            " model_cfg, in the model_provider"
        )
    if any(isinstance(module, PoetLayer) for module in model.modules()):
        raise ValueError("poet.convert: this model has been converted already")


def _layers_to_rotate(model: nn.Module, routes: Sequence[ParamSpec]) -> list[Any]:
    """Return the layers to rotate, in the model's order; warn of matrices that are left to AdamW.

    Raises:
        ValueError: a layer, or a weight that a pattern of ``matrices`` names, is not supported.
    """
    chosen, unrotated = [], []
    for route in routes:
        if route.kind != "matrix":
            continue
        key, _, leaf = route.name.rpartition(".")
        module = model.get_submodule(key)
        is_head = _compat.is_embedding_or_output(route.parameter)
        if leaf == "weight" and type(module) in KINDS and not is_head:
            _check_layer(route.name, module)
            chosen.append(module)
        elif route.reason.startswith("matrices:"):
            raise ValueError(
                f"poet.convert: {route.reason} matches {route.name} of {type(module).__name__};"
                " only hidden layers that are a ColumnParallelLinear or RowParallelLinear are"
                " rotated"
            )
        else:
            unrotated.append(f"{route.name} ({type(module).__name__})")
    if chosen and unrotated and collectives.is_first():
        rest = f" and {len(unrotated) - 3} more" * (len(unrotated) > 3)
        warnings.warn(
            f"poet.convert leaves to AdamW what is no ColumnParallelLinear or RowParallelLinear:"
            f" {', '.join(unrotated[:3])}{rest}",
            stacklevel=3,
        )
    return chosen


def _check_layer(name: str, module: Any) -> None:
    """Raise a ValueError if a layer communicates in a way that does not commute with rotations."""
    problem = None
    if module.is_expert and module.tp_group.size() > 1:
        problem = (
            "an expert that is cut over ranks, whose sum is left to the token dispatcher; write"
            " expert_tensor_parallel_size=1"
        )
    elif _compat.leaves_gradient(module):
        problem = "a layer whose input's gradient others reduce (disable_grad_reduce)"
    elif _compat.cuts_input(module):
        problem = "a RowParallelLinear that cuts its input itself (input_is_parallel=False)"
    if problem:
        raise ValueError(f"poet.convert: {name} is {problem}; or leave it out: scalars=[{name!r}]")


def _matrix_parts(layer: Any, split: Split | None) -> list[RowPart]:
    """Return the matrices in the rows of a layer's tile, in order.

    Args:
        layer: the parallel linear layer.
        split: how its weight is split into matrices, as ``fused_splits`` returns it.

    Raises:
        ValueError: tensor parallelism has cut a query group.
    """
    rows = layer.weight.shape[0]
    if split is None:
        return [("", ((0, rows),))]
    if split == GATE_AND_UP:
        return [("gate", ((0, rows // 2),)), ("up", ((rows // 2, rows // 2),))]
    sizes = list(split) if isinstance(split, Sequence) else [split]
    period = sum(sizes)
    if rows % period:
        raise ValueError(
            f"poet.convert: {rows} rows of linear_qkv are no whole query groups of {period}; use"
            " num_query_groups that are a multiple of tensor_model_parallel_size, or"
            " scalars=['linear_qkv']"
        )
    names = ("q", "gate", "k", "v") if len(sizes) == 4 else ("q", "k", "v")
    parts: list[RowPart] = []
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        first = sum(sizes[:i])
        parts.append((name, tuple((start + first, size) for start in range(0, rows, period))))
    return parts


def _rotation_sides(
    layer: Any, parts: Sequence[RowPart]
) -> list[tuple[str, tuple[Span, ...], int, int]]:
    """Return (name, spans, rank, ranks) of each rotation of a layer, the inner one first.

    Spans are those of the rank's part of the dimension. ``ranks`` is 1 if it is not cut.
    """
    cut, uncut = (layer.tp_group.rank(), layer.tp_group.size()), (0, 1)
    inner, outer = (uncut, cut) if KINDS[type(layer)].axis == 0 else (cut, uncut)
    outer_sides = [("out" + f"_{name}" * bool(name), spans, *outer) for name, spans in parts]
    return [("in", ((0, layer.weight.shape[1]),), *inner), *outer_sides]


@torch.no_grad()
def _initialize(layer: Any, key: str, parts: Sequence[RowPart], settings: Settings) -> None:
    """Write this rank's tile of the initial W; fused matrices are drawn one by one.

    Args:
        layer: its weight is written.
        key: its name in the whole model, from which random numbers follow.
        parts: the matrices in its rows.
        settings: ``settings.init`` says which W; for "own" nothing is written.
    """
    if settings.init == "own" or layer.weight.is_meta:
        return
    rank, ranks = layer.tp_group.rank(), layer.tp_group.size()
    axis = KINDS[type(layer)].axis
    for name, spans in parts:
        shape = [sum(count for _, count in spans), layer.weight.shape[1]]
        shape[axis] *= ranks
        full = initial(f"{key}.{name}" if name else key, (shape[0], shape[1]), settings)
        tile = full.chunk(ranks, axis)[rank]
        for (first, count), rows in zip(spans, tile.split([c for _, c in spans]), strict=True):
            layer.weight[first : first + count] = rows.to(layer.weight)


def _mark_skews(layer: Any) -> None:
    """Set the attributes by which Megatron knows skew parameters, and move the bias after R_o."""
    layer.group = group_or_none(layer.tp_group)
    layer.adds_bias = layer.bias is not None and not layer.skip_bias_add
    layer.skip_bias_add = True
    for rotation in layer.rotations:
        skew = getattr(layer, rotation.skew)
        is_cut = layer.group is not None and (layer.axis == 0) == (rotation in layer.outer)
        _compat.mark_parameter(skew, 0 if is_cut else None, layer.weight)
        # layers of experts have no group: the other ranks have other experts
        if not is_cut and layer.group is not None:
            _compat.sum_over_sequence(skew, layer)


def _layers_differ(model: nn.Module, layers: Mapping[str, Any]) -> bool:
    """Return whether layers that differ only in their numbers have different skew parameters.

    A layer that is not rotated has none. A collective call of the pipeline stages.

    Args:
        model: this rank's part of the model, converted.
        layers: the rotated layers by name in the whole model.
    """
    skews_of: dict[str, set[str]] = {}
    for key, layer in layers.items():
        skews = skews_of.setdefault(_without_numbers(key), set())
        skews.add(str([(r.skew, r.block) for r in layer.rotations]))
    for name, module in model.named_modules():
        if type(module) in KINDS and _without_numbers(name) in skews_of:
            skews_of[_without_numbers(name)].add("")
    group = group_or_none(parallel_state.get_pipeline_model_parallel_group(check_initialized=False))
    text = str([(name, sorted(skews_of[name])) for name in sorted(skews_of)])
    texts = collectives.gather_texts(text, group)
    return len(set(texts)) > 1 or any(len(skews) > 1 for skews in skews_of.values())


def _without_numbers(name: str) -> str:
    """Return a name without the numbers of layers and experts."""
    return re.sub(r"\.\d+\b", "", name)

"""Conversion of a model's nn.Linears to rotated ones, as the same function; and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from spectral_dist import polar
from spectral_dist._error_help import explained
from spectral_dist._errors import suggest
from spectral_dist._log import logger
from spectral_dist.params import classify as classifying
from spectral_dist.params.patterns import Patterns
from spectral_dist.params.spec import ParamSpec, plain_name
from spectral_dist.placement.dtensor import MeshPlacement
from spectral_dist.poet.layer import Block, PoetLayer, PoetLinear, Settings
from spectral_dist.poet.permutation import generator
from spectral_dist.poet.rotation import Rotation, Span
from spectral_dist.sharding import collectives

SETTINGS = tuple(f.name for f in fields(Settings))
PRETRAINED = (
    "what save_pretrained writes of this model resumes as it is, but from_pretrained reads the"
    " frozen weights in it alone, without the rotations since the last merge. SpectralFactory of"
    " spectral_dist.integrations.huggingface mends that, and so does its export_on_save(model); or"
    " write model.save_pretrained(folder, state_dict=spectral_dist.poet.export(model))"
)
"""Logged when a model of transformers is converted."""


@explained
def convert(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    **settings: Any,
) -> nn.Module:
    """Convert every nn.Linear but the output head to a rotated one, in place, and return the model.

    The model stays the same function. The layers' weights are frozen, and keep their names; each
    layer gets two skew parameters. Convert the model before it is sharded, wrapped or given to a
    framework, on every rank.

    Args:
        model: unsharded and not wrapped.
        matrices, scalars: regular expressions of weights' names to rotate as well, or not to.
        settings: see ``spectral_dist.poet.Settings``: block, blocks, segments, order, form,
            variant, init, seed.

    Raises:
        ValueError: unknown or bad settings; blocks that do not fit (all layers where they do not
            are named); tied weights; a model that is sharded or converted already.
    """
    return rotate(model, {nn.Linear: PoetLinear}, matrices, scalars, settings)


def rotate(
    model: nn.Module,
    classes: Mapping[type[nn.Module], type[PoetLayer]],
    matrices: Iterable[str],
    scalars: Iterable[str],
    settings: Mapping[str, Any],
) -> nn.Module:
    """Convert a model as ``convert`` does, and return it.

    Args:
        model: unsharded and not wrapped.
        classes: {class of layers to rotate: its class when they are}.
        matrices, scalars, settings: as ``convert`` has them.

    Raises:
        ValueError: as ``convert`` does.
    """
    poet_settings = settings_of(settings)
    routes = _linears(model, classes, matrices, scalars)
    shapes = {route.name.removesuffix(".weight"): route.shape for route in routes}
    sides = {
        key: (("in", ((0, n),), 0, 1), ("out", ((0, m),), 0, 1)) for key, (m, n) in shapes.items()
    }
    rotations_by_layer = rotations(poet_settings, sides)
    for key, (inner, *outer) in rotations_by_layer.items():
        layer: Any = model.get_submodule(key)
        initialize(layer.weight, key, poet_settings, shapes[key])
        layer.__class__ = classes[type(layer)]
        layer.rotate_by(key, [inner], outer, poet_settings)
    if hasattr(model, "save_pretrained") and collectives.is_first():
        logger.info(PRETRAINED)
    return model


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Build settings from keywords or JSON.

    Raises:
        ValueError: an unknown name or a bad value.
    """
    for name in values:
        if name not in SETTINGS:
            raise ValueError(f"poet.convert: unknown setting {name!r}{suggest(name, SETTINGS)}")
    try:
        return Settings(**values)
    except ValueError as error:
        raise ValueError(f"poet.convert: {error}") from None


def rotations(
    settings: Settings,
    layers: Mapping[str, Sequence[tuple[str, tuple[Span, ...], int, int]]],
    any_stage: Callable[[list[bool]], list[bool]] = list,
) -> dict[str, list[Rotation]]:
    """Build the rotations of the sides of every layer.

    Args:
        settings: of the model.
        layers: of each layer the sides (side, spans, rank, ranks), 'in' first, as ``Rotation``
            takes them. A side 'out_k' is that of part k of a fused weight; ``blocks`` may name it
            as the layer's name and '.k'.
        any_stage: from flags that are set on this pipeline stage, those that are set on any.

    Returns:
        The rotations of each layer's sides, in the order of ``layers``.

    Raises:
        ValueError: names every layer whose blocks do not fit, and patterns that match none.
    """
    patterns = Patterns("blocks", settings.blocks)
    rotations_by_layer: dict[str, list[Rotation]] = {}
    errors = []
    for key, sides in layers.items():
        rotations_by_layer[key] = []
        for side, spans, rank, ranks in sides:
            try:
                block = _block(settings, patterns, key, side)
                if isinstance(block, float):
                    block = round(block * ranks * sum(count for _, count in spans))
                rotations_by_layer[key].append(
                    Rotation(
                        f"{key}/{side}", f"skew_{side}", spans, block, settings.segments,
                        settings.seed, settings.fully, rank, ranks,
                    )
                )  # fmt: skip
            except ValueError as error:
                errors.append(str(error))
    used = any_stage(list(patterns.used.values()))
    patterns.used = dict(zip(patterns.used, used, strict=True))
    if errors:
        raise ValueError(_join_similar(errors))
    patterns.check(list(layers))
    return rotations_by_layer


def _join_similar(problems: Iterable[str]) -> str:
    """Return a line for each problem; layers whose names differ in numbers only share one."""
    similar: dict[str, list[str]] = {}
    for text in problems:
        name, _, what = text.partition(": ")
        similar.setdefault(re.sub(r"\d+", "*", name) + what, []).append(text)
    lines = []
    for first, *others in similar.values():
        name, _, what = first.partition(": ")
        more = f" and {len(others)} like it" * bool(others)
        lines.append(f"{name}{more}: {what}")
    return "\n".join(lines)


def _block(settings: Settings, patterns: Patterns, key: str, side: str) -> Block:
    """Return the size of one side's blocks.

    Raises:
        ValueError: two sizes for a part of a fused weight, which has one side.
    """
    part = side.partition("_")[2]
    pattern = patterns.find(f"{key}.{part}" if part else key, unique=True)
    size = settings.block if pattern is None else settings.blocks[pattern]
    if isinstance(size, int | float):
        return size
    if part and not re.search(str(pattern), key):
        raise ValueError(
            f"blocks: {pattern!r} is {size!r}, but {key}.{part} is a part of the outputs, and its"
            " inputs are the layer's; write one size"
        )
    return size[side != "in"]


def _linears(
    model: nn.Module,
    classes: Collection[type[nn.Module]],
    matrices: Iterable[str],
    scalars: Iterable[str],
) -> list[ParamSpec]:
    """Return the weights to rotate: those matrices that are of a layer of one of the classes.

    Raises:
        ValueError: the model is not as ``convert`` needs it.
    """
    unwrapped, _ = classifying.unwrap(model)
    if unwrapped is not model:
        raise ValueError("poet.convert: convert the model before it is wrapped or compiled")
    if any(isinstance(module, PoetLayer) for module in model.modules()):
        raise ValueError("poet.convert: this model has been converted already")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):  # a DTensor
            raise ValueError(f"poet.convert: {name} is sharded already; convert the model first")
    linears = []
    for route in classifying.classify(model, matrices=matrices, scalars=scalars):
        if route.kind != "matrix":
            continue
        key, _, leaf = route.name.rpartition(".")
        # a subclass may never call forward: that of nn.MultiheadAttention does not
        is_plain = leaf == "weight" and type(model.get_submodule(key)) in classes
        if not is_plain and route.reason.startswith("matrices:"):
            raise ValueError(f"poet.convert: {route.reason} matches {route.name}, no nn.Linear")
        if not is_plain:
            continue
        linears.append(route)
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        other = owners.setdefault(id(weight), name)
        if other != name and any(weight is route.parameter for route in linears):
            raise ValueError(
                f"poet.convert: {other} and {name} have one weight, which cannot be rotated in"
                f" two layers; leave it out: scalars=[{other!r}]"
            )
    if not linears:
        raise ValueError("poet.convert: the model has no nn.Linear to rotate")
    return linears


@torch.no_grad()
def initialize(
    weight: Any, key: str, settings: Settings, shape: tuple[int, ...] | None = None
) -> None:
    """Write the W to start from, the same on every rank and device (arXiv 2506.08001, section 3).

    Args:
        weight: all of it, (m, n); or partitioned by DeepSpeed's ``zero.Init``.
        key: the layer's name, of which random numbers are made.
        settings: of the model.
        shape: (m, n) of a weight that is partitioned.

    Raises:
        ValueError: the weight has no memory yet to write to.
    """
    if settings.init == "own":
        return
    if weight.is_meta:
        raise ValueError(
            f"poet.convert: init is {settings.init!r}, but {key} is on the meta device; convert"
            " with init='own', or give the model memory first (model.to_empty(device=...))"
        )
    is_partitioned = hasattr(weight, "ds_id")  # then it has the methods all_gather and partition
    if is_partitioned:
        weight.all_gather([weight])
    weight.copy_(initial(key, tuple(weight.shape) if shape is None else shape, settings))
    if is_partitioned:
        weight.partition([weight], has_been_updated=True)


def initial(key: str, shape: tuple[int, ...], settings: Settings) -> Tensor:
    """Return the (m, n) of ``settings.init``, float32 on the CPU."""
    random = generator("poet init", settings.seed, key)
    gaussian = torch.randn(shape, generator=random, dtype=torch.float32)
    if settings.init == "normalized":
        gaussian /= torch.linalg.vector_norm(gaussian, dim=1, keepdim=True)
        return gaussian
    return polar.polar(gaussian, method="svd")


@explained
@torch.no_grad()
def export(model: nn.Module, optimizer: Any = None) -> dict[str, Tensor]:
    """Return the state dict of the model as it was before ``convert``, with W_eff = R_o W R_i as W.

    The tensors are on the CPU, in the dtypes the model has; W_eff is computed in float32. The model
    is not changed. If the model is sharded this is a collective call, and every rank gets all of
    it.

    Args:
        model: converted, and wrapped or not.
        optimizer: the POET that trains the model, if a framework shards it in a way of its own
            (DeepSpeed's stage 3).
    """
    model, _ = classifying.unwrap(model)
    gathered = (MeshPlacement() if optimizer is None else optimizer.placement).gathered
    layers = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, PoetLayer)}
    left_out = {
        f"{name}.{leaf}" for name, m in layers.items() for leaf in (*m.skews, "_extra_state")
    }
    exported: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        name = plain_name(name)
        if name in left_out:
            continue
        key, _, leaf = name.rpartition(".")
        if key in layers and leaf == "weight":
            layer = layers[key]
            with gathered([value, *layer.skews.values()]) as (weight, *skews):
                named_skews = dict(zip(layer.skews, skews, strict=True))
                exported[name] = layer.rotated_weight(weight, named_skews).to(weight.dtype).cpu()
        else:
            with gathered([value]) as (tensor,):
                exported[name] = tensor.detach().cpu().clone()
    assert all(f"{name}.weight" in exported for name in layers)
    return exported

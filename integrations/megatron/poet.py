"""POET's rotated layers for Megatron: convert a model before it is wrapped, export it at the end.

W's tiles and the blocks that rotate a cut dimension are a rank's own; the rotation of the other
dimension is the same on all tensor-parallel ranks, and acts outside of Megatron's communication:
before the gather of a ColumnParallelLinear's input, after the reduction of a RowParallelLinear's
output. So its gradient is complete on every rank, or under sequence parallelism that of the rank's
tokens, which Megatron sums as it does those of norms. Merging exchanges nothing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from spectral_dist.integrations.megatron import _compat
from spectral_dist.integrations.megatron.build import on_any_stage, ranks_of
from spectral_dist.integrations.megatron.names import global_names, unwrap
from spectral_dist.integrations.megatron.poet_merge import gather_parameters
from spectral_dist.integrations.megatron.ranks import alone
from spectral_dist.integrations.megatron.reader import GATE_AND_UP, MegatronReader, fused
from spectral_dist.params.classify import classify
from spectral_dist.params.spec import ParamSpec
from spectral_dist.params.splits import Split
from spectral_dist.poet.convert import initial, rotations, settings_of
from spectral_dist.poet.layer import PoetLayer, Settings
from spectral_dist.poet.rotation import Span
from spectral_dist.sharding import collectives

Part: TypeAlias = tuple[str, tuple[Span, ...]]
"""A matrix among the rows of a tile: its name ('' if it is the only one), and where it lies."""


class PoetParallelLinear(PoetLayer):
    """What both kinds of layers share: checkpoints, and the whole matrix for reports."""

    axis: int
    """of the weight that tensor parallelism cuts"""
    adds_bias: bool
    """whether the layer is to add its bias itself; Megatron's forward pass no longer does"""
    bias: Any
    tp_group: Any

    def assembled(self, weight: Tensor) -> Tensor:
        """The whole matrix, of fused ones rank by rank. A collective call of the tensor ranks."""
        if self.group is None:
            return weight
        tiles = collectives.all_gather(weight.flatten(), self.group, collectives.Meter()).wait()
        parts = tiles.view(collectives.size(self.group), *weight.shape)
        return torch.cat(list(parts), self.axis)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Any = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As Megatron's; blocks of the cut dimension are cut over ranks, the others on all."""
        axes = {"weight": self.axis} | {r.skew: 0 for r in self.rotations if r.ranks > 1}
        if self.axis == 0:
            axes["bias"] = 0
        found: dict[str, Any] = _compat.make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )  # fmt: skip
        return found

    def set_extra_state(self, state: Any) -> None:
        """ValueError if there is none, or the layer was built with other settings."""
        if not isinstance(state, Tensor):
            raise ValueError(
                f"{self.key}: the checkpoint is of a model without rotations; load it before"
                " spectral_dist.integrations.megatron.poet.convert"
            )
        super().set_extra_state(state)

    def _fixed(self) -> dict[str, int]:
        blocks = {f"the block of {r.skew}": r.block for r in self.rotations}
        return {**super()._fixed(), **blocks}


class PoetColumnParallelLinear(PoetParallelLinear, ColumnParallelLinear):  # type: ignore[misc]
    """ColumnParallelLinear, rotated: R_i before the gather of the sequence, R_o of its own rows."""

    axis = 0

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: (output, the bias if it is left to others)."""
        if weight is not None:
            raise ValueError(f"{self.key}: a rotated layer multiplies by its own weight only")
        found, bias = self.maybe_again(self._rotated, input_), self.bias
        if self.adds_bias:
            found, bias = found + bias, None
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            found = _compat.gather_from_tensor_model_parallel_region(found, group=self.tp_group)
        return found, bias

    def _rotated(self, x: Tensor) -> Tensor:
        turned = self.turn(x, self.inner)
        product, _ = super().forward(turned, runtime_gather_output=False)
        return self.turn(product, self.outer)


class PoetRowParallelLinear(PoetParallelLinear, RowParallelLinear):  # type: ignore[misc]
    """RowParallelLinear, rotated: R_i of its own columns, R_o after the sum over ranks."""

    axis = 1

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: (output, the bias if it is left to others)."""
        found = self.maybe_again(self._rotated, input_)
        return (found + self.bias, None) if self.adds_bias else (found, self.bias)

    def _rotated(self, x: Tensor) -> Tensor:
        product, _ = super().forward(self.turn(x, self.inner))
        return self.turn(product, self.outer)


KINDS: dict[type[nn.Module], type[PoetParallelLinear]] = {
    ColumnParallelLinear: PoetColumnParallelLinear,
    RowParallelLinear: PoetRowParallelLinear,
}


def convert(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    **settings: Any,
) -> nn.Module:
    """Rotate every Column- and RowParallelLinear but the output layer, in place; the model.

    Call it on the model as built, on all ranks: Megatron's DistributedDataParallel then makes no
    gradient buffers for what is frozen. In scripts that have a ``model_cfg`` (Megatron-LM's from
    0.19 on) that is in one of its ``pre_wrap_hooks``; in others, in the model_provider.

    q, k, v (gate, up) in one weight are rotated each by itself. ``blocks`` names a layer as the
    whole model does (layers from 0), and such a part by the layer's name and '.q', '.k', '.v',
    '.gate' or '.up': {r"linear_qkv\\.[kv]$": 64}. ``segments``: a multiple of every
    tensor-parallel size to be used, which then all give the same run.

    Args:
        matrices, scalars: regular expressions of weights' names, as this rank has them, to rotate
            as well, or not to.
        settings: as of ``spectral_dist.poet.convert``.

    Raises:
        ValueError: as of ``spectral_dist.poet.convert``; a layer that is not supported.
    """
    chosen = settings_of(settings)
    _check_plain(model)
    names = global_names([model])
    reader = MegatronReader(*ranks_of(None), names)
    routes = classify(
        model, matrices=matrices, scalars=scalars, make_inspector=reader, any_stage=on_any_stage
    )
    found = _linears(model, routes)
    if not on_any_stage([bool(found)])[0]:
        raise ValueError(
            "poet.convert: the model has no ColumnParallelLinear or RowParallelLinear to rotate."
            " Transformer Engine's layers are not supported: build it with"
            " get_gpt_layer_local_spec"
        )
    splits = fused(model)
    layers = {names[id(m.weight)].removesuffix(".weight"): m for m in found}
    parts = {key: _parts(m, splits.get(id(m.weight))) for key, m in layers.items()}
    sides = {key: _sides(m, parts[key]) for key, m in layers.items()}
    made = rotations(chosen, sides, on_any_stage)
    for key, layer in layers.items():
        _initialize(layer, key, parts[key], chosen)
        layer.__class__ = KINDS[type(layer)]
        layer.rotate_by(key, made[key][:1], made[key][1:], chosen)
        _finish(layer)
    if _differ(model, layers):
        # else checkpoints would stack what has other shapes, or is not in every layer
        _compat.save_layers_apart(model)
    return model


@torch.no_grad()
def export(model: nn.Module) -> dict[str, Any]:
    """This rank's state dict as it was before ``convert``, tiles of R_o W R_i in place of W's.

    On the CPU, in the dtypes the model has; computed in float32. The model is not changed. For
    ``load_state_dict`` of a model that was built alike and not converted. With
    overlap_param_gather a collective call of data ranks.
    """
    gather_parameters([model])
    model = unwrap(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PoetLayer)}
    found: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        key, _, leaf = name.rpartition(".")
        layer = layers.get(key)
        if layer is not None and (leaf in layer.skews or leaf == "_extra_state"):
            continue
        if layer is not None and leaf == "weight":
            value = layer.effective(value, layer.skews).to(value.dtype)
        found[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
    return found


def _check_plain(model: nn.Module) -> None:
    """ValueError: the model is wrapped or converted already."""
    if unwrap(model) is not model:
        raise ValueError(
            f"poet.convert: the model is wrapped in {type(model).__name__} already; call it on the"
            " GPTModel before, in a hook of model_cfg.pre_wrap_hooks or, in scripts without a"
            " model_cfg, in the model_provider"
        )
    if any(isinstance(module, PoetLayer) for module in model.modules()):
        raise ValueError("poet.convert: this model has been converted already")


def _linears(model: nn.Module, routes: Sequence[ParamSpec]) -> list[Any]:
    """The layers to rotate. ValueError: one that was asked for, or met, is not supported."""
    found, left = [], []
    for route in routes:
        if route.kind != "matrix":
            continue
        key, _, leaf = route.name.rpartition(".")
        module = model.get_submodule(key)
        head = _compat.is_embedding_or_output(route.parameter)
        if leaf == "weight" and type(module) in KINDS and not head:
            _check_layer(route.name, module)
            found.append(module)
        elif route.reason.startswith("matrices:"):
            raise ValueError(
                f"poet.convert: {route.reason} matches {route.name} of {type(module).__name__};"
                " only hidden layers that are a ColumnParallelLinear or RowParallelLinear are"
                " rotated"
            )
        else:
            left.append(f"{route.name} ({type(module).__name__})")
    if found and left and collectives.is_first():
        more = f" and {len(left) - 3} more" * (len(left) > 3)
        warnings.warn(
            f"poet.convert leaves to AdamW what is no ColumnParallelLinear or RowParallelLinear:"
            f" {', '.join(left[:3])}{more}",
            stacklevel=3,
        )
    return found


def _check_layer(name: str, module: Any) -> None:
    """ValueError: the layer communicates in a way that rotations would not commute with."""
    unfit = None
    if module.is_expert and module.tp_group.size() > 1:
        unfit = (
            "an expert that is cut over ranks, whose sum is left to the token dispatcher; write"
            " expert_tensor_parallel_size=1"
        )
    elif _compat.leaves_gradient(module):
        unfit = "a layer whose input's gradient others reduce (disable_grad_reduce)"
    elif _compat.cuts_input(module):
        unfit = "a RowParallelLinear that cuts its input itself (input_is_parallel=False)"
    if unfit:
        raise ValueError(f"poet.convert: {name} is {unfit}; or leave it out: scalars=[{name!r}]")


def _parts(layer: Any, split: Split | None) -> list[Part]:
    """The matrices in the rows of a layer's tile, in order. ValueError: groups are cut."""
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
    found: list[Part] = []
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        first = sum(sizes[:i])
        found.append((name, tuple((at + first, size) for at in range(0, rows, period))))
    return found


def _sides(layer: Any, parts: Sequence[Part]) -> list[tuple[str, tuple[Span, ...], int, int]]:
    """(side, spans, rank, ranks) of each rotation, the inner one first."""
    cut, whole = (layer.tp_group.rank(), layer.tp_group.size()), (0, 1)
    inner, outer = (whole, cut) if KINDS[type(layer)].axis == 0 else (cut, whole)
    outs = [("out" + f"_{name}" * bool(name), spans, *outer) for name, spans in parts]
    return [("in", ((0, layer.weight.shape[1]),), *inner), *outs]


@torch.no_grad()
def _initialize(layer: Any, key: str, parts: Sequence[Part], settings: Settings) -> None:
    """Write this rank's tile of the W to start from; each fused matrix has its own."""
    if settings.init == "own" or layer.weight.is_meta:
        return
    rank, ranks = layer.tp_group.rank(), layer.tp_group.size()
    axis = KINDS[type(layer)].axis
    for name, spans in parts:
        shape = [sum(count for _, count in spans), layer.weight.shape[1]]
        shape[axis] *= ranks
        drawn = initial(f"{key}.{name}" if name else key, (shape[0], shape[1]), settings)
        mine = drawn.chunk(ranks, axis)[rank]
        for (first, count), rows in zip(spans, mine.split([c for _, c in spans]), strict=True):
            layer.weight[first : first + count] = rows.to(layer.weight)


def _finish(layer: Any) -> None:
    """What Megatron needs to know of skew parameters; and the bias, which comes after R_o."""
    layer.group = alone(layer.tp_group)
    layer.adds_bias = layer.bias is not None and not layer.skip_bias_add
    layer.skip_bias_add = True
    for rotation in layer.rotations:
        skew = getattr(layer, rotation.skew)
        local = layer.group is not None and (layer.axis == 0) == (rotation in layer.outer)
        _compat.mark(skew, 0 if local else None, layer.weight)
        if not local and layer.group is not None:  # of experts, others have other ones
            _compat.sum_over_sequence(skew, layer)


def _differ(model: nn.Module, layers: Mapping[str, Any]) -> bool:
    """Whether layers of one kind have other skew parameters, or some none. A collective call."""
    kinds: dict[str, set[str]] = {}
    for key, layer in layers.items():
        found = kinds.setdefault(_kind(key), set())
        found.add(str([(r.skew, r.block) for r in layer.rotations]))
    for name, module in model.named_modules():
        if type(module) in KINDS and _kind(name) in kinds:
            kinds[_kind(name)].add("")
    group = alone(parallel_state.get_pipeline_model_parallel_group(check_initialized=False))
    texts = collectives.gather_texts(str([(k, sorted(kinds[k])) for k in sorted(kinds)]), group)
    return len(set(texts)) > 1 or any(len(found) > 1 for found in kinds.values())


def _kind(name: str) -> str:
    """The same for all layers (and experts)."""
    return re.sub(r"\.\d+\b", "", name)

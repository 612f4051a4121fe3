"""Which parameters are matrices: by module type, tying and tags; patterns only as overrides."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from spectral_dist.group_options import OPTION_NAMES, applies
from spectral_dist.heads import full_shape, output_heads
from spectral_dist.patterns import Patterns
from spectral_dist.sharding import collectives
from spectral_dist.sharding.layout import Matrix
from spectral_dist.splits import Split, matrices_of
from spectral_dist.wrappers import check as check_wrappers

TAG = "spectral_dist_route"
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EXACT = {"polar": "eigh", "polar_steps": None, "polar_dtype": "auto"}
"""What a group of one-sided matrices takes instead of the optimizer's own."""
FSDP1 = (
    "{} was flattened to 1-D by FSDP1 (FullyShardedDataParallel), which loses its matrices; shard"
    " with torch.distributed.fsdp.fully_shard instead"
)


@dataclass(frozen=True)
class Route:
    """What becomes of one parameter: 'matrix', 'scalar' (AdamW), 'skew' (POET's) or 'frozen'."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    kind: str
    reason: str
    matrices: tuple[Matrix, ...] = ()
    replicas: Any = None
    """the process group of the DistributedDataParallel that it was found in"""
    one_sided: bool = False
    """whether its polar factor is to be taken exactly, by the Gram matrix of its short side"""
    stacked: bool = False
    """whether the first of three dimensions counts matrices"""
    layer: Any = None
    """the ``poet.layer.PoetLayer`` whose skew parameter this is"""

    @property
    def stack(self) -> int:
        """Elements of each matrix of a stack, or of the parameter if it is none."""
        return math.prod(self.shape[1:] if self.stacked else self.shape)


@dataclass(frozen=True)
class Reading:
    """What a parameter is by itself, before any pattern: see ``Route``.

    ``shape``: whole and unsharded; ``view``: as its matrices are read, if otherwise. ``split``: how
    it holds several matrices, unless the user says otherwise. ``name``: in the whole model, if a
    rank has a part of it and calls it otherwise; its matrices are called after that.
    """

    shape: tuple[int, ...]
    kind: str
    reason: str
    view: tuple[int, ...] = ()
    split: Split | None = None
    name: str = ""


Reader: TypeAlias = Callable[[str, nn.Parameter, nn.Module], Reading]
"""Of a parameter's name, itself and the module that has it."""


def _kind(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """(kind, reason) by the module's type."""
    name = type(module).__name__
    if len(shape) < 2:
        return "scalar", f"{len(shape)}-D"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "scalar", "embedding"
    if isinstance(module, NORMS):
        return "scalar", name
    if isinstance(module, nn.Linear) and leaf == "weight":
        return "matrix", name
    if isinstance(module, nn.MultiheadAttention) and leaf.endswith("_proj_weight"):
        return "matrix", f"{name}, q, k and v each"
    if isinstance(module, CONVOLUTIONS) and leaf == "weight":
        if module.groups > 1:
            return "scalar", f"{name} with groups"
        return "matrix", f"{name} as out x (in * kernel)"
    if len(shape) == 3 and min(shape) > 1:
        return "matrix", f"stack of {shape[0]} in {name}"
    return "scalar", f"{leaf} of {name} is no known matrix"


def torch_reader(model: nn.Module) -> Reader:
    """Reads parameters of torch's own modules, and of those made of them."""
    heads = output_heads(model)

    def read(name: str, parameter: nn.Parameter, module: nn.Module) -> Reading:
        leaf, shape = name.rsplit(".", 1)[-1], full_shape(parameter)
        kind, reason = _kind(module, leaf, shape)
        if id(parameter) in heads:
            kind, reason = "scalar", heads[id(parameter)]
        view: tuple[int, ...] = ()
        if isinstance(module, CONVOLUTIONS):
            view = shape[0], math.prod(shape[1:])
        packed = isinstance(module, nn.MultiheadAttention) and leaf == "in_proj_weight"
        return Reading(shape, kind, reason, view, 3 if packed else None)

    return read


def classify(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    split: Mapping[str, Split] | None = None,
    one_sided: Iterable[str] = (),
    reader: Callable[[nn.Module], Reader] = torch_reader,
    anywhere: Callable[[list[bool]], list[bool]] = list,
) -> list[Route]:
    """The route of every parameter of ``model``, in its order, tied parameters once.

    Args:
        matrices, scalars: regular expressions (re.search on the name) that override the types.
        split: pattern -> parts, for weights that hold several matrices one above the other.
        one_sided: like matrices, for embeddings, heads and routers: their polar factor is exact, by
            the eigenvalues of the Gram matrix of the short side (arXiv 2505.21799's one-sided form:
            right for (vocabulary, width), left for (experts, width)).
        reader: what tells parameters of this kind of model apart.
        anywhere: of what is true here, what is true of any part of a model that is in several.

    Raises:
        ValueError: a pattern that matches nothing or contradicts another, a split that does not
            fit, FSDP1's flattened parameters, uninitialised parameters, or no matrix at all.
    """
    given_model = model
    model, replicas = unwrap(model)
    if not isinstance(split or {}, Mapping):
        raise ValueError(
            f'split is {split!r}; write pattern and parts, as in {{"qkv": [512, 128, 128]}}'
        )
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(FSDP1.format("the model"))
    given = (("matrices", matrices), ("scalars", scalars), ("one_sided", one_sided))
    forced = {option: Patterns(option, patterns) for option, patterns in given}
    splits = Patterns("split", split or {})
    for name, parameter, _ in _named(model):
        _check_usable(name, parameter)
    read = reader(model)
    routes = []
    rotated = any(_rotated(module) for module in model.modules())
    for name, parameter, module in _named(model):
        found = read(name, parameter, module)
        shape, kind, reason = found.shape, found.kind, found.reason
        layer: Any = module if _rotated(module) and module.is_skew(name) else None  # type: ignore[operator]
        if layer is not None:
            kind, reason = "skew", "rotates a frozen weight"
        elif rotated and kind == "matrix":  # POET does not orthogonalize: spectral_dist.poet
            kind, reason = "scalar", f"{reason}, not rotated"
        asked = [
            (o, hit) for o, patterns in forced.items() if (hit := patterns.find(name)) is not None
        ]
        if len(asked) > 1:
            both = " and ".join(f"{option}: {hit!r}" for option, hit in asked)
            raise ValueError(f"{name} matches both {both}; make one of them narrower")
        for option, matched in asked:
            if option != "scalars" and len(shape) < 2:
                raise ValueError(f"{option}: {matched!r} matches {name}, which is {len(shape)}-D")
            kind = "scalar" if option == "scalars" else "matrix"
            reason = f"{option}: {matched!r}"
        held: tuple[Matrix, ...] = ()
        pattern = splits.find(name, alone=True)
        view = found.view or shape
        if not parameter.requires_grad:
            kind, reason = "frozen", "requires_grad is False"
        elif kind == "matrix":
            parts = split[pattern] if split and pattern is not None else found.split
            held = matrices_of(found.name or name, view, parts)
        elif pattern is not None:
            raise ValueError(f"split: {pattern!r} matches {name}, which is no matrix ({reason})")
        exact = kind == "matrix" and any(option == "one_sided" for option, _ in asked)
        stacked = bool(held) and len(view) == 3
        routes.append(
            Route(name, parameter, shape, kind, reason, held, replicas, exact, stacked, layer)
        )
    names = [route.name for route in routes if route.kind != "frozen"]
    every = (*forced.values(), splits)
    here = [used for patterns in every for used in patterns.used.values()]
    *used, some = anywhere([*here, any(route.kind in ("matrix", "skew") for route in routes)])
    for patterns in every:
        patterns.used = {pattern: used.pop(0) for pattern in patterns.used}
        patterns.check(names)
    if not some:
        _check_some_matrix(routes)
    if rotated:
        check_wrappers(given_model, {r.name: r.parameter for r in routes if r.kind == "skew"})
    return routes


def _rotated(module: nn.Module) -> bool:
    """Whether it is a ``poet.layer.PoetLayer``, which this file is imported by."""
    return hasattr(module, "is_skew")


def unwrap(model: nn.Module) -> tuple[nn.Module, Any]:
    """The user's module inside DistributedDataParallel and torch.compile; DDP's process group."""
    replicas = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, replicas = model.module, model.process_group
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model, replicas


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{prefix}.{leaf}" if prefix else leaf
                yield name.replace("_orig_mod.", ""), parameter, module


def _check_usable(name: str, parameter: nn.Parameter) -> None:
    if nn.parameter.is_lazy(parameter):
        raise ValueError(f"{name} has no shape yet; run one forward before building the optimizer")
    if type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "_is_flat_param"):
        raise ValueError(FSDP1.format(name))
    if hasattr(parameter, "_st_info"):
        raise ValueError(
            f"{name} is a tile that DistributedDataParallel has made of a DTensor, so its matrix"
            " is not known; wrap a tensor-parallel model with torch.distributed.fsdp.fully_shard"
            " over the other dimension of its mesh"
        )
    if parameter.requires_grad and not parameter.is_floating_point():
        raise ValueError(f"{name} is {parameter.dtype}; only real floating-point can be trained")


def _check_some_matrix(routes: Sequence[Route]) -> None:
    if not any(route.kind != "frozen" for route in routes):
        raise ValueError("no parameter is trainable: requires_grad is False for every one of them")
    if not any(route.kind == "matrix" for route in routes):
        raise ValueError(
            "no parameter is a matrix, so all would train with AdamW. Name the weights to be"
            ' orthogonalized with matrices=["pattern"], or use AdamW itself.\n' + table(routes)
        )


def param_groups(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    split: Mapping[str, Split] | None = None,
    one_sided: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Groups for our optimizers: the matrices, then the rest. Options as in ``classify``.

    Groups may be given options of their own (``groups[1]["lr"] = 3e-4``) before they are used.
    """
    routes = classify(model, matrices=matrices, scalars=scalars, split=split, one_sided=one_sided)
    show(routes)
    return grouped([r.parameter for r in routes if r.kind != "frozen"], routes)


def tag(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    split: Mapping[str, Split] | None = None,
    one_sided: Iterable[str] = (),
) -> None:
    """Write each parameter's route on it, for frameworks that pass on bare parameters."""
    routes = classify(model, matrices=matrices, scalars=scalars, split=split, one_sided=one_sided)
    show(routes)
    for route in routes:
        setattr(route.parameter, TAG, route)


def _route_of(item: Any, known: dict[int, Route]) -> Route:
    name, parameter = item if isinstance(item, tuple) else ("", item)
    route: Route | None = known.get(id(parameter)) or getattr(parameter, TAG, None)
    if route is None:
        what = name or f"a parameter of shape {tuple(parameter.shape)}"
        raise ValueError(
            f"{what}: bare parameters do not tell matrices from embeddings and heads; pass"
            " spectral_dist.param_groups(model), or call spectral_dist.tag(model) first"
        )
    if route.kind == "frozen" or not parameter.requires_grad:
        raise ValueError(
            f"{route.name} is frozen (requires_grad is False); leave it out, as param_groups"
            " does, or build the optimizer after unfreezing it"
        )
    return route


def grouped(params: Iterable[Any], routes: Sequence[Route] = ()) -> list[dict[str, Any]]:
    """Split parameters, or groups of them, into groups of one kind, by ``routes`` or tags.

    A group's own options stay with both of its halves.

    Raises:
        ValueError: a frozen parameter, or one whose route is not known.
    """
    known = {id(route.parameter): route for route in routes}
    items = list(params)
    groups = [item for item in items if isinstance(item, dict)]
    loose = [item for item in items if not isinstance(item, dict)]
    result = []
    for group in (*groups, {"params": loose}) if loose else groups:
        if "routes" in group:
            result.append(group)
            continue
        parameters = group["params"]
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        halves: dict[tuple[str, torch.dtype, bool], list[Route]] = {}
        for item in parameters:
            route = _route_of(item, known)
            # float64 parameters keep float64 states, so they are exchanged on their own
            wide = torch.promote_types(route.parameter.dtype, torch.float32)
            halves.setdefault((route.kind, wide, route.one_sided), []).append(route)
        own = {k: v for k, v in group.items() if k != "params"}
        for name in own.keys() & OPTION_NAMES:
            if halves and not any(applies(name, kind) for kind, *_ in halves):
                raise ValueError(
                    f"a parameter group sets {name}, which none of its parameters has"
                    f" ({', '.join(route.name for half in halves.values() for route in half)})"
                )
        for (kind, _, exact), half in sorted(halves.items(), key=lambda item: item[0][::2]):
            mine = {k: v for k, v in own.items() if k not in OPTION_NAMES or applies(k, kind)}
            if exact:
                mine = {**EXACT, **mine}
            mine.update(params=[r.parameter for r in half], routes=half, kind=kind)
            result.append(mine)
    return result


def table(routes: Sequence[Route]) -> str:
    """Which parameters are matrices, and why the others are not, as text."""
    rows: dict[tuple[str, str], list[Route]] = {}
    for route in routes:
        rows.setdefault((route.kind, route.reason), []).append(route)
    lines = [f"{'goes to':<16}{'params':>7}{'matrices':>9}{'numbers':>15}  why (example)"]
    word = {"matrix": "orthogonalized", "scalar": "AdamW", "frozen": "not trained", "skew": "Adam"}
    for (kind, reason), found in sorted(rows.items(), key=lambda row: row[0][0]):
        numbers = sum(torch.Size(route.shape).numel() for route in found)
        count = sum(len(route.matrices) for route in found)
        example = f"{reason} ({found[0].name} {list(found[0].shape)})"
        lines.append(f"{word[kind]:<16}{len(found):>7}{count:>9}{numbers:>15,}  {example}")
    return "\n".join(lines)


def show(routes: Sequence[Route]) -> None:
    """Write the table to stderr on the job's first rank."""
    if collectives.is_first():
        sys.stderr.write(f"spectral_dist: which parameters are matrices\n{table(routes)}\n")

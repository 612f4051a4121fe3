"""Which parameters are matrices: by module type, tying and tags; patterns only as overrides."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.weak import TensorWeakRef

from spectral_dist.params.modules import torch_inspector
from spectral_dist.params.patterns import Overrides
from spectral_dist.params.spec import Inspector, ParamInfo, ParamSpec, plain_name
from spectral_dist.params.splits import Split, matrices_of
from spectral_dist.params.table import table
from spectral_dist.params.wrappers import check_poet_wrapping
from spectral_dist.sharding.matrix import Matrix

NO_HEADS = (
    "heads is 'auto', but no attention module of the model says how many rows each head has"
    " (head_dim) of q, k or v; write the heads in split, as in"
    ' split={"q_proj": 32} for 32 heads one above the other'
)
FSDP1 = (
    "{} was flattened to 1-D by FSDP1 (FullyShardedDataParallel), which loses its matrices; shard"
    " with torch.distributed.fsdp.fully_shard instead"
)


def classify(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    split: Mapping[str, Split] | None = None,
    one_sided: Iterable[str] = (),
    heads: str | None = None,
    make_inspector: Callable[[nn.Module], Inspector] = torch_inspector,
    any_stage: Callable[[list[bool]], list[bool]] = list,
    later: bool = False,
) -> list[ParamSpec]:
    """Return the spec of every parameter of a model, in the model's order, tied parameters once.

    Args:
        model: as the user has it, in its wrappers or not.
        matrices, scalars: regular expressions (re.search on the name) that override what the types
            of modules say.
        split: pattern -> parts, for weights that hold several matrices one above the other; side
            by side, if the weight is stored in x out.
        one_sided: like matrices, for embeddings, heads and routers: their polar factor is exact, by
            the eigenvalues of the Gram matrix of the short side (arXiv 2505.21799's one-sided form:
            right for (vocabulary, width), left for (experts, width)).
        heads: "auto" cuts q, k and v (not o) into one matrix for each attention head, but where
            ``split`` matches; None does not.
        make_inspector: from a model to what tells its parameters apart.
        any_stage: from flags of this rank to those that are set on any pipeline stage, for a model
            whose parts are on several ranks.
        later: whether frozen parameters may be the only matrices, as they will be trained later.

    Raises:
        ValueError: a pattern that matches nothing or contradicts another, a split that does not
            fit, FSDP1's flattened parameters, uninitialised parameters, or no matrix at all.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {model!r:.60}; write the nn.Module itself, as in param_groups(model)"
        )
    wrapped_model, model = model, unwrap(model)[0]
    overrides = Overrides.of_user(
        split, heads, matrices=matrices, scalars=scalars, one_sided=one_sided
    )
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(FSDP1.format("the model"))
    for name, parameter, _ in _named(model):
        _check_usable(name, parameter)
    specs = _specs(wrapped_model, make_inspector(model), overrides)
    names = [spec.name for spec in specs if spec.kind != "frozen"]
    used_here = [used for patterns in overrides.all_patterns for used in patterns.used.values()]
    trains_any = any(spec.kind in ("matrix", "skew") for spec in specs)
    *used, trains_any, has_heads = any_stage([*used_here, trains_any, overrides.has_heads])
    for patterns in overrides.all_patterns:
        patterns.used = {pattern: used.pop(0) for pattern in patterns.used}
        patterns.check(names)
    if overrides.per_head and not has_heads:
        raise ValueError(NO_HEADS)
    if not trains_any:
        _check_some_matrix(specs, later)
    if _has_rotations(model):
        skews = {spec.name: spec.parameter for spec in specs if spec.kind == "skew"}
        check_poet_wrapping(wrapped_model, skews)
    return specs


def _specs(
    wrapped_model: nn.Module,
    inspect: Inspector,
    overrides: Overrides,
) -> list[ParamSpec]:
    """Return the spec of every parameter, by what the inspector says and the patterns override.

    Args:
        wrapped_model: as the user has it.
        inspect: what tells its parameters apart.
        overrides: what the user says.

    Raises:
        ValueError: patterns that contradict each other or do not fit a parameter.
    """
    wrapper = _wrapper(wrapped_model)
    model, replicas = unwrap(wrapped_model)
    has_rotations = _has_rotations(model)
    specs = []
    for name, parameter, module in _named(model):
        info = inspect(name, parameter, module)
        layer: Any = module if _rotated(module) and module.is_skew(name) else None  # type: ignore[operator]
        if layer is not None:
            info = replace(info, kind="skew", reason="rotates a frozen weight")
        elif has_rotations and info.kind == "matrix":  # POET orthogonalizes no matrices
            info = replace(info, kind="scalar", reason=f"{info.reason}, not rotated")
        matched = overrides.matched(name, info)
        make = _trainable_spec if parameter.requires_grad else _frozen_spec
        spec = make(name, parameter, info, matched, overrides)
        if spec.kind == "frozen" and _rotated(module) and layer is None:
            problem = "poet.convert has frozen it, and its rotations are trained"
            spec = replace(spec, later=None, problem=problem)
        specs.append(replace(spec, replicas=replicas, wrapper=wrapper, layer=layer))
    return specs


def _trainable_spec(
    name: str,
    parameter: nn.Parameter,
    info: ParamInfo,
    matched: tuple[str, str] | None,
    overrides: Overrides,
) -> ParamSpec:
    """Return the spec of a parameter that is trained.

    Args:
        name: of the parameter.
        parameter: itself.
        info: what it is by itself.
        matched: the (option, pattern) that overrides that; None: nothing does.
        overrides: what else the user says.

    Raises:
        ValueError: a split that does not fit.
    """
    kind, reason, option = info.kind, info.reason, ""
    if matched is not None:
        option = matched[0]
        kind = "scalar" if option == "scalars" else "matrix"
        reason = f"{option}: {matched[1]!r}"
    matrices: tuple[Matrix, ...] = ()
    pattern = overrides.splits.find(name, unique=True)
    view = info.view or info.shape
    if kind == "matrix":
        parts = overrides.parts(name, info, pattern)
        if pattern is None:
            per_head = "per head" if overrides.cuts_heads(info) else ""
            reason = ", ".join(filter(None, (reason, info.holds, per_head)))
        matrices = matrices_of(info.name or name, view, parts, info.transposed)
    elif pattern is not None:
        raise ValueError(f"split: {pattern!r} matches {name}, which is no matrix ({reason})")
    exact = kind == "matrix" and option == "one_sided"
    stacked = bool(matrices) and len(view) == len(info.shape) == 3
    return ParamSpec(
        name, TensorWeakRef(parameter), info.shape, kind, reason, matrices,
        one_sided=exact, stacked=stacked,
    )  # fmt: skip


def _frozen_spec(
    name: str,
    parameter: nn.Parameter,
    info: ParamInfo,
    matched: tuple[str, str] | None,
    overrides: Overrides,
) -> ParamSpec:
    """Return the spec of a frozen parameter, with its spec or problem for when it is unfrozen.

    Arguments are as in ``_trainable_spec``.
    """
    later, problem = None, ""
    try:
        later = _trainable_spec(name, parameter, info, matched, overrides)
    except ValueError as error:  # it is raised if somebody trains the parameter, which may be never
        problem = str(error)
    return ParamSpec(
        name, TensorWeakRef(parameter), info.shape, "frozen", "requires_grad is False",
        later=later, problem=problem,
    )  # fmt: skip


def _rotated(module: nn.Module) -> bool:
    """Return whether a module is a ``poet.layer.PoetLayer``, which imports this file."""
    return hasattr(module, "is_skew")


def _has_rotations(model: nn.Module) -> bool:
    """Return whether ``poet.convert`` has converted any module of a model."""
    return any(_rotated(module) for module in model.modules())


def unwrap(model: nn.Module) -> tuple[nn.Module, Any]:
    """Return the module inside of DDP and torch.compile, and DDP's process group or None."""
    replicas = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, replicas = model.module, model.process_group
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model, replicas


def _wrapper(model: Any) -> weakref.ref[nn.parallel.DistributedDataParallel] | None:
    """Return a weak reference to the DistributedDataParallel around a model; None without one."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        model = getattr(model, "_orig_mod", None)
        if model is None:
            return None
    return weakref.ref(model)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield (plain name, parameter, module that has it) of every parameter, tied ones once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{prefix}.{leaf}" if prefix else leaf
                yield plain_name(name), parameter, module


def _check_usable(name: str, parameter: nn.Parameter) -> None:
    """Raise a ValueError for a parameter whose shape or matrices are not known, or not floats."""
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


def _check_some_matrix(specs: Sequence[ParamSpec], later: bool) -> None:
    """Raise a ValueError if no parameter is a matrix; ``later``: frozen ones count as well."""
    if later and any(spec.later and spec.later.kind == "matrix" for spec in specs):
        return
    if not any(spec.kind != "frozen" for spec in specs):
        raise ValueError("no parameter is trainable: requires_grad is False for every one of them")
    if not any(spec.kind == "matrix" for spec in specs):
        raise ValueError(
            "no parameter is a matrix, so all would train with AdamW. Name the weights to be"
            ' orthogonalized with matrices=["pattern"], or use AdamW itself.\n' + table(specs)
        )

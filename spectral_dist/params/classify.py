"""Which parameters are matrices: by module type, tying and tags; patterns only as overrides."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.weak import TensorWeakRef

from spectral_dist.params.heads import full_shape, output_heads
from spectral_dist.params.patterns import Patterns
from spectral_dist.params.spec import Inspector, ParamInfo, ParamSpec, plain_name
from spectral_dist.params.splits import Split, matrices_of
from spectral_dist.params.table import table
from spectral_dist.params.wrappers import check as check_wrappers
from spectral_dist.sharding.layout import Matrix

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EXPERTS = re.compile("expert", re.IGNORECASE)
"""What names of 3-D parameters say that are a matrix for each expert."""
EXPERT_CLASSES = re.compile("expert|moe$", re.IGNORECASE)
"""The same of their modules' classes."""
TRANSPOSED_EXPERTS = {"GptOssExperts", "Llama4TextExperts", "AriaGroupedExpertsGemm"}
"""Of releases of transformers whose modules do not say so themselves (``is_transposed``)."""
FSDP1 = (
    "{} was flattened to 1-D by FSDP1 (FullyShardedDataParallel), which loses its matrices; shard"
    " with torch.distributed.fsdp.fully_shard instead"
)


def _kind(module: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """(kind, reason) by the module's type; of a stack of matrices by the words for experts."""
    leaf, kind = name.rsplit(".", 1)[-1], type(module).__name__
    if len(shape) < 2:
        return "scalar", f"{len(shape)}-D"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "scalar", "embedding"
    if isinstance(module, NORMS):
        return "scalar", kind
    if isinstance(module, nn.Linear) and leaf == "weight":
        return "matrix", kind
    if isinstance(module, nn.MultiheadAttention) and leaf.endswith("_proj_weight"):
        return "matrix", f"{kind}, q, k and v each"
    if isinstance(module, CONVOLUTIONS) and leaf == "weight":
        if module.groups > 1:
            return "scalar", f"{kind} with groups"
        return "matrix", f"{kind} as out x (in * kernel)"
    if _stored_transposed(module, leaf):
        if len(shape) == 2:
            return "matrix", f"{kind}, read out x in; what it holds side by side is one"
        return "matrix", f"stack of {shape[0]} in {kind}, read out x in; gate and up are one"
    if len(shape) == 3 and min(shape) > 1:
        if _holds_experts(module, name):
            return "matrix", f"stack of {shape[0]} in {kind}"
        return "scalar", f"{leaf} of {kind} is no known stack of matrices"
    return "scalar", f"{leaf} of {kind} is no known matrix"


def _holds_experts(module: nn.Module, name: str) -> bool:
    """Whether a 3-D parameter is a matrix for each expert, by its name and its module's class."""
    if isinstance(module, nn.ParameterList | nn.ParameterDict) or type(module) is nn.Module:
        classes: list[str] = []
    else:
        classes = [base.__name__ for base in type(module).__mro__]
    return bool(EXPERTS.search(name)) or any(EXPERT_CLASSES.search(c) for c in classes)


def _stored_transposed(module: nn.Module, leaf: str) -> bool:
    """Whether transformers stores it in x out, as in GPT-2's layers and some stacks of experts."""
    for base in type(module).__mro__:
        if not base.__module__.startswith("transformers."):
            continue
        if base.__name__ == "Conv1D":
            return leaf == "weight"
        if base.__name__ in TRANSPOSED_EXPERTS or getattr(module, "is_transposed", False):
            return leaf in ("gate_up_proj", "up_proj", "down_proj", "weight")
    return False


def _plain_class(module: nn.Module) -> str:
    return str(type_before_parametrizations(module).__name__)


def torch_inspector(model: nn.Module) -> Inspector:
    """Reads parameters of torch's own modules, and of those made of them."""
    heads = output_heads(model)
    parametrized = {
        id(each): (module, leaf)
        for module in model.modules()
        for leaf, each in getattr(module, "parametrizations", {}).items()
    }

    def read(name: str, parameter: nn.Parameter, module: nn.Module) -> ParamInfo:
        leaf, shape = name.rsplit(".", 1)[-1], full_shape(parameter)
        kind, reason = _kind(module, name, shape)
        layer, weight = parametrized.get(id(module), (module, leaf))
        if layer is not module and len(shape) > 1:  # what is trained is not what multiplies
            kind, reason = "scalar", f"parametrized {weight} of {_plain_class(layer)}"
        if id(parameter) in heads:
            kind, reason = "scalar", heads[id(parameter)]
        view: tuple[int, ...] = ()
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) and len(shape) > 1:
            view = shape[0], math.prod(shape[1:])
        packed = isinstance(module, nn.MultiheadAttention) and leaf == "in_proj_weight"
        transposed = _stored_transposed(module, leaf)
        return ParamInfo(shape, kind, reason, view, 3 if packed else None, transposed=transposed)

    return read


def classify(
    model: nn.Module,
    *,
    matrices: Iterable[str] = (),
    scalars: Iterable[str] = (),
    split: Mapping[str, Split] | None = None,
    one_sided: Iterable[str] = (),
    make_inspector: Callable[[nn.Module], Inspector] = torch_inspector,
    any_stage: Callable[[list[bool]], list[bool]] = list,
    later: bool = False,
) -> list[ParamSpec]:
    """The route of every parameter of ``model``, in its order, tied parameters once.

    Args:
        matrices, scalars: regular expressions (re.search on the name) that override the types.
        split: pattern -> parts, for weights that hold several matrices one above the other.
        one_sided: like matrices, for embeddings, heads and routers: their polar factor is exact, by
            the eigenvalues of the Gram matrix of the short side (arXiv 2505.21799's one-sided form:
            right for (vocabulary, width), left for (experts, width)).
        make_inspector: what tells parameters of this kind of model apart.
        any_stage: of what is true here, what is true of any part of a model that is in several.
        later: whether what is frozen may be the only matrices, as it will be trained later.

    Raises:
        ValueError: a pattern that matches nothing or contradicts another, a split that does not
            fit, FSDP1's flattened parameters, uninitialised parameters, or no matrix at all.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {model!r:.60}; write the nn.Module itself, as in param_groups(model)"
        )
    given_model, wrapper = model, _wrapper(model)
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
    inspect = make_inspector(model)
    rotated = any(_rotated(module) for module in model.modules())
    routes = []
    for name, parameter, module in _named(model):
        found = inspect(name, parameter, module)
        layer: Any = module if _rotated(module) and module.is_skew(name) else None  # type: ignore[operator]
        if layer is not None:
            found = replace(found, kind="skew", reason="rotates a frozen weight")
        elif rotated and found.kind == "matrix":  # POET does not orthogonalize: spectral_dist.poet
            found = replace(found, kind="scalar", reason=f"{found.reason}, not rotated")
        matched = _matched(name, found, forced)
        make = _route if parameter.requires_grad else _frozen
        route = make(name, parameter, found, matched, splits, split or {})
        if route.kind == "frozen" and _rotated(module) and layer is None:
            problem = "poet.convert has frozen it, and its rotations are trained"
            route = replace(route, later=None, problem=problem)
        routes.append(replace(route, replicas=replicas, wrapper=wrapper, layer=layer))
    names = [route.name for route in routes if route.kind != "frozen"]
    every = (*forced.values(), splits)
    here = [used for patterns in every for used in patterns.used.values()]
    *used, some = any_stage([*here, any(route.kind in ("matrix", "skew") for route in routes)])
    for patterns in every:
        patterns.used = {pattern: used.pop(0) for pattern in patterns.used}
        patterns.check(names)
    if not some:
        _check_some_matrix(routes, later)
    if rotated:
        check_wrappers(given_model, {r.name: r.parameter for r in routes if r.kind == "skew"})
    return routes


def _matched(name: str, found: ParamInfo, forced: Mapping[str, Patterns]) -> tuple[str, str] | None:
    """The option and the pattern of it that overrides a reading, if one does."""
    asked = [(o, hit) for o, patterns in forced.items() if (hit := patterns.find(name)) is not None]
    if len(asked) > 1:
        both = " and ".join(f"{option}: {hit!r}" for option, hit in asked)
        raise ValueError(f"{name} matches both {both}; make one of them narrower")
    for option, matched in asked:
        if option != "scalars" and len(found.shape) < 2:
            what = f"{len(found.shape)}-D"
            raise ValueError(f"{option}: {matched!r} matches {name}, which is {what}")
    return asked[0] if asked else None


def _route(
    name: str,
    parameter: nn.Parameter,
    found: ParamInfo,
    matched: tuple[str, str] | None,
    splits: Patterns,
    split: Mapping[str, Split],
) -> ParamSpec:
    """The route of a parameter that is trained.

    Raises:
        ValueError: a split that does not fit.
    """
    kind, reason, option = found.kind, found.reason, ""
    if matched is not None:
        option = matched[0]
        kind = "scalar" if option == "scalars" else "matrix"
        reason = f"{option}: {matched[1]!r}"
    held: tuple[Matrix, ...] = ()
    pattern = splits.find(name, alone=True)
    view = found.view or found.shape
    if kind == "matrix":
        if pattern is not None and found.transposed:
            raise ValueError(
                f"split: {pattern!r} matches {name}, which is stored in x out: its parts are"
                " columns, and split cuts rows; leave it whole"
            )
        parts = split[pattern] if pattern is not None else found.split
        held = matrices_of(found.name or name, view, parts, found.transposed)
    elif pattern is not None:
        raise ValueError(f"split: {pattern!r} matches {name}, which is no matrix ({reason})")
    exact = kind == "matrix" and option == "one_sided"
    stacked = bool(held) and len(view) == 3
    return ParamSpec(
        name, TensorWeakRef(parameter), found.shape, kind, reason, held,
        one_sided=exact, stacked=stacked,
    )  # fmt: skip


def _frozen(
    name: str,
    parameter: nn.Parameter,
    found: ParamInfo,
    matched: tuple[str, str] | None,
    splits: Patterns,
    split: Mapping[str, Split],
) -> ParamSpec:
    """The route of a parameter that is not trained now, with what it will be if it is later."""
    later, problem = None, ""
    try:
        later = _route(name, parameter, found, matched, splits, split)
    except ValueError as error:  # nobody may ever train it
        problem = str(error)
    return ParamSpec(
        name, TensorWeakRef(parameter), found.shape, "frozen", "requires_grad is False",
        later=later, problem=problem,
    )  # fmt: skip


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


def _wrapper(model: Any) -> weakref.ref[nn.parallel.DistributedDataParallel] | None:
    """The DistributedDataParallel around a model, within torch.compile or not."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        model = getattr(model, "_orig_mod", None)
        if model is None:
            return None
    return weakref.ref(model)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{prefix}.{leaf}" if prefix else leaf
                yield plain_name(name), parameter, module


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


def _check_some_matrix(routes: Sequence[ParamSpec], later: bool) -> None:
    if later and any(route.later and route.later.kind == "matrix" for route in routes):
        return
    if not any(route.kind != "frozen" for route in routes):
        raise ValueError("no parameter is trainable: requires_grad is False for every one of them")
    if not any(route.kind == "matrix" for route in routes):
        raise ValueError(
            "no parameter is a matrix, so all would train with AdamW. Name the weights to be"
            ' orthogonalized with matrices=["pattern"], or use AdamW itself.\n' + table(routes)
        )

"""Models of which each rank has a part: pipeline stages, or some experts of each layer.

PipelineModule numbers its layers over all stages, so parameters have the names that they have in
the whole model. But a stage alone does not show which of its weights is the output head, nor
whether a pattern matches anything. Layers of deepspeed.moe number the experts of each rank from 0
on: their matrices are called after their numbers in the whole layer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.deepspeed import _compat, _compat_groups
from spectral_dist.params.classify import classify
from spectral_dist.params.heads import BY_SIZE, full_shape, vocabulary_head
from spectral_dist.params.modules import torch_inspector
from spectral_dist.params.spec import Inspector, ParamInfo, ParamSpec
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group


def classify_part(engine: Any, routing: Mapping[str, Any]) -> list[ParamSpec]:
    """Return the spec of every parameter of this rank's part of the model.

    A collective call of the pipeline stages, if there are any.

    Args:
        engine: the DeepSpeedEngine, which has its module.
        routing: options of ``param_groups``.

    Raises:
        ValueError: as ``classify`` does, on every rank.
    """
    stages = _compat_groups.pipe_group(engine)
    if stages is None:
        return classify(engine.module, make_inspector=expert_inspector, **routing)
    outputs = _stage_outputs(engine.module, stages)
    has_asked = False

    def any_stage(flags: list[bool]) -> list[bool]:
        """Return, for each flag, whether it is set on any stage."""
        nonlocal has_asked
        has_asked = True
        collectives.raise_together(None, [stages])  # where another stage has an error
        texts = collectives.gather_texts("".join(str(int(flag)) for flag in flags), stages)
        return [any(text[i] == "1" for text in texts) for i in range(len(flags))]

    inspector = functools.partial(expert_inspector, outputs=outputs)
    try:
        return classify(engine.module, make_inspector=inspector, any_stage=any_stage, **routing)
    except ValueError as error:
        if not has_asked:
            collectives.raise_together(error, [stages])
        raise


def expert_inspector(model: nn.Module, outputs: Mapping[int, str] | None = None) -> Inspector:
    """Return ``torch_inspector``, with experts called after their numbers in the whole layer."""
    inspect = torch_inspector(model, outputs)
    offsets = _compat_groups.expert_offsets(model)

    def inspect_expert(name: str, parameter: nn.Parameter, module: nn.Module) -> ParamInfo:
        info = inspect(name, parameter, module)
        for prefix, offset in offsets.items():
            if name.startswith(prefix):
                index, _, leaf = name.removeprefix(prefix).partition(".")
                return replace(info, name=f"{prefix}{int(index) + offset}.{leaf}")
        return info

    return inspect_expert


def _stage_outputs(model: nn.Module, stages: Group) -> dict[int, str]:
    """Return the id of the weight that maps to the vocabulary, if it is on this stage.

    A collective call: the embedding and the head are on different stages.

    Args:
        model: this stage's part.
        stages: the ranks that have the stages.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    here = {
        "entries": [m.num_embeddings for m in model.modules() if isinstance(m, EMBEDDINGS)],
        "linears": [(name, full_shape(m.weight)[0]) for name, m in linears.items()],
    }
    texts = collectives.gather_texts(json.dumps(here), stages)
    of_stages = [json.loads(text) for text in texts]
    entries = [number for stage in of_stages for number in stage["entries"]]
    if not entries:
        return {}
    everywhere = [(name, outputs) for stage in of_stages for name, outputs in stage["linears"]]
    head = vocabulary_head(everywhere, max(entries))
    return {id(linears[head].weight): BY_SIZE} if head in linears else {}


EMBEDDINGS = nn.Embedding | nn.EmbeddingBag


def check_parts(engine: Any, optimizer: ShardedOptimizer) -> None:
    """Raise for matrices and options that pipeline stages would treat apart; a collective call.

    Raises:
        ValueError: on every rank; names the matrix or the option, and what to write.
    """
    stages = _compat_groups.pipe_group(engine)
    if stages is None:
        return
    error: Exception | None = None
    try:
        _check_tied(engine.module, optimizer)
        if isinstance(optimizer, SpectralOptimizer):
            _check_pooling(optimizer)
    except ValueError as raised:
        error = raised
    collectives.raise_together(error, [stages])


def _check_tied(model: nn.Module, optimizer: ShardedOptimizer) -> None:
    """Raise a ValueError for a matrix of a layer that several stages have.

    DeepSpeed gives their copies equal gradients. But each stage would orthogonalize its copy beside
    other matrices, and the copies would drift apart by rounding.
    """
    tied = _compat_groups.tied_layers(model)
    for route in optimizer.all_routes:
        for prefix, key in tied.items():
            if route.kind == "matrix" and route.name.startswith(prefix):
                raise ValueError(
                    f"spectral optimizers do not support {route.name} under DeepSpeed, a matrix in"
                    f" a TiedLayerSpec of several pipeline stages, which would orthogonalize it"
                    f' apart: write "scalars": ["{prefix[:-1]}"], or untie the layer {key}'
                )


def _check_pooling(optimizer: SpectralOptimizer) -> None:
    """Raise a ValueError for an option that would fit numbers to one stage's matrices."""
    for group in optimizer.param_groups:
        if group["kind"] != "matrix":
            continue
        pooling = optimizer.rule.pooling(optimizer.rule_options(group))
        if pooling is not None:
            raise ValueError(
                f"spectral optimizers do not support {pooling.setting} above 0 under DeepSpeed's"
                f" PipelineModule: each stage would fit coefficients of its own; write"
                f" {pooling.setting}=0 and coefficients of `spectral-dist calibrate`"
            )


def fail_with_other_stages(engine: Any) -> None:
    """Make this engine's steps raise on every pipeline stage if they raise on any.

    Otherwise the other stages would wait for activations that never come. They compare one number
    after each step, for which the host waits.
    """
    stages = _compat_groups.pipe_group(engine)
    if stages is None:
        return

    def step(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        error: Exception | None = None
        try:
            original(*args, **kwargs)
        except Exception as raised:
            error = raised
        collectives.raise_together(error, [stages])

    _compat.wrap_step(engine, step)

"""The optimizer that transformers' Trainer builds, by its hook ``optimizer_cls_and_kwargs``."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn

from spectral_dist._error_help import explained
from spectral_dist._errors import suggest
from spectral_dist.core.named import class_of
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.huggingface.callback import SpectralCallback
from spectral_dist.integrations.huggingface.pretrained import export_on_save
from spectral_dist.params.param_groups import param_groups
from spectral_dist.placement.whole_tensors import is_sharded
from spectral_dist.poet.layer import PoetLayer
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.rules.fields import specs_of
from spectral_dist.rules.options import ROUTING

HAVE_SHARDS = (DistributedType.FSDP, DistributedType.DEEPSPEED)
"""How accelerate runs a model whose parameters tell, later, which ranks have what of them."""


class SpectralFactory:
    """Build an optimizer for a model, as transformers' Trainer asks for it.

    The Trainer makes a ``SpectralFactory()`` and calls it with the model and keywords, before it
    wraps or shards the model.

    Example:
        >>> keywords = {"optimizer": "muon", "args": training_args}
        >>> Trainer(..., args=training_args, optimizer_cls_and_kwargs=(SpectralFactory, keywords))
    """

    @explained
    def __call__(
        self, model: nn.Module, args: Any = None, *, optimizer: str = "muon", **options: Any
    ) -> ShardedOptimizer:
        """Return the optimizer of a model.

        Under DistributedDataParallel the Trainer saves rank 0's ``state_dict()``. A
        ``SpectralCallback`` gathers that before; without one every rank keeps all momentum
        (``replicate_momentum``), and rules that keep state of whole matrices are refused.

        Args:
            model: as the Trainer has it: plain, PEFT's, compiled, or sharded by transformers.
            args: the TrainingArguments, from which learning_rate, weight_decay and optim_args are
                read, and adam_beta1, adam_beta2 and adam_epsilon, if they are not the defaults of
                their class; None: none of them. transformers' Trainer passes keywords alone;
                others pass this one by its place.
            optimizer: its name: "muon", "polargrad", "root", "sumo", "normuon", "poet", or that of
                a registered rule.
            options: the optimizer's own, and those of ``spectral_dist.param_groups``; they win over
                what ``args`` says.

        Raises:
            ValueError: an unknown optimizer or option; a state that rank 0 alone cannot save, and
                no ``SpectralCallback`` that would gather it.
        """
        entry = registry.find(optimizer)
        made_of = class_of(entry) if entry.rule is not None else POET
        options = {**_of_arguments(entry, args), **options}
        routing = {name: options.pop(name) for name in ROUTING if name in options}
        checked = made_of.options_type.from_user(options, type(self).__name__)
        parts = _distributed_type()
        if parts == DistributedType.DEEPSPEED:
            importlib.import_module("spectral_dist.integrations.deepspeed")
        replicas = parts not in HAVE_SHARDS and _has_replicas(model)
        if replicas:
            options["process_group"] = dist.group.WORLD
            if entry.rule is not None and entry.rule().has_momentum(checked):
                options.setdefault("replicate_momentum", not SpectralCallback.instances)
        built: ShardedOptimizer = made_of(param_groups(model, **routing), **options)
        if replicas and isinstance(built, SpectralOptimizer):
            _check_saving(built)
        if any(isinstance(module, PoetLayer) for module in model.modules()):
            export_on_save(model)
        return built


def _of_arguments(entry: registry.Entry, args: Any) -> dict[str, Any]:
    """Return an optimizer's options as TrainingArguments say them.

    adam_beta1, adam_beta2 and adam_epsilon count unless they are the defaults of the arguments'
    class: those would hide the optimizer's own ones.

    Raises:
        ValueError: ``optim_args`` has an unknown name, or is not of the form "a=1,b=2".
    """
    if args is None:
        return {}
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    usual = {field.name: field.default for field in fields(args)}
    if (args.adam_beta1, args.adam_beta2) != (usual["adam_beta1"], usual["adam_beta2"]):
        options["betas"] = (args.adam_beta1, args.adam_beta2)
    if args.adam_epsilon != usual["adam_epsilon"]:
        options["eps"] = args.adam_epsilon
    known = specs_of(entry.options)
    for name, value in texts_of(args.optim_args).items():
        if name not in known:
            near = suggest(name, known)
            raise ValueError(f"optim_args: {entry.title} has no option {name!r}{near}")
        options[name] = known[name].parse(value)
    return options


def texts_of(optim_args: str | None) -> dict[str, str]:
    """Return the text of each option of "momentum=0.9,polar=jordan".

    Raises:
        ValueError: it is not of that form.
    """
    texts = {}
    for text in filter(None, (optim_args or "").replace(" ", "").split(",")):
        name, equals, texts[name] = text.partition("=")
        if not equals:
            raise ValueError(f'optim_args: {text!r}; write "name=value", as in "momentum=0.9"')
    return texts


def _distributed_type() -> DistributedType:
    """Return how accelerate runs this process; NO before there is an Accelerator."""
    return AcceleratorState().distributed_type if is_initialized() else DistributedType.NO


def _has_replicas(model: nn.Module) -> bool:
    """Return whether all ranks will hold the model's parameters whole."""
    is_alone = not dist.is_initialized() or dist.get_world_size() == 1
    return not is_alone and not any(map(is_sharded, model.parameters()))


def _check_saving(optimizer: SpectralOptimizer) -> None:
    """Raise a ValueError if the Trainer could not save an optimizer under data parallelism."""
    has_all = getattr(optimizer.options, "replicate_momentum", True) or not optimizer.has_momentum
    if (optimizer.keeps_matrix_state or not has_all) and not SpectralCallback.instances:
        raise ValueError(
            f"under DistributedDataParallel {type(optimizer).__name__} keeps state at the owners of"
            " matrices alone, and the Trainer saves that of rank 0; let it be gathered before:"
            " Trainer(..., callbacks=[SpectralCallback()])"
        )

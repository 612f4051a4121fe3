"""LLaMA-Factory: its YAML with one key more, spectral: {optimizer: muon, momentum: 0.95}.

torchrun --nproc_per_node 8 -m spectral_dist.integrations.llama_factory config.yaml

LLaMA-Factory has no hook for optimizers: one function of the version ``KNOWN``, which its trainers
call, is replaced while it trains.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import llamafactory
from llamafactory.extras.misc import is_env_enabled
from llamafactory.train import tuner

from spectral_dist._error_help import explained
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.huggingface.converting import ConvertingCallback
from spectral_dist.integrations.huggingface.factory import SpectralFactory
from spectral_dist.integrations.huggingface.section import read
from spectral_dist.integrations.versions import require

KNOWN = "0.9.5"
"""The version that the tests run."""
STAGES = ("pt", "sft", "rm", "dpo", "kto")
"""Whose trainers are transformers'."""
OTHERS = (
    "use_muon", "use_galore", "use_apollo", "use_badam", "use_adam_mini", "loraplus_lr_ratio",
    "use_hyper_parallel", "use_mca", "use_kt",
)  # fmt: skip
"""Keys that ask for another optimizer, or another trainer."""
VARIABLES = ("USE_V1", "USE_RAY", "USE_MCA", "USE_KT")
"""Environment variables that ask for another trainer."""


@explained
def run_exp(args: Mapping[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
    """Train as LLaMA-Factory's ``run_exp`` does, with the optimizer that ``spectral`` names.

    Args:
        args: LLaMA-Factory's arguments and ``spectral``: the optimizer's name, its options, and
            those of ``spectral_dist.param_groups``, and POET's of ``spectral_dist.poet.convert``.
            None: those of the YAML (or JSON) and the ``key=value`` on the command line.
        callbacks: as LLaMA-Factory takes them.

    Raises:
        ValueError: a wrong section, or arguments that it contradicts.
    """
    arguments = tuner.read_args(args)
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"the arguments are {arguments!r}; write the YAML first, and the rest as key=value"
        )
    theirs = dict(arguments)
    section = read(theirs.pop("spectral", None))
    _check_others(theirs)
    if section.rotation is not None:
        _check_poet(theirs)

    def create(model: Any, training_args: Any, finetuning_args: Any) -> ShardedOptimizer:
        return SpectralFactory()(model, training_args, **section.keywords)

    with _in_place_of_theirs(create):
        converting = ConvertingCallback("spectral", section.rotation)
        tuner.run_exp(theirs, [*(callbacks or ()), converting])


def _check_others(args: Mapping[str, Any]) -> None:
    """Raise a ValueError if arguments or the environment ask for what has no use of ``create``."""
    for name in OTHERS:
        if args.get(name):
            raise ValueError(f"{name} is {args[name]!r} beside spectral: leave one of them out")
    for name in VARIABLES:
        if is_env_enabled(name):
            raise ValueError(
                f"{name} is {os.environ[name]!r}: spectral runs under the trainers of"
                " transformers alone; unset it"
            )
    stage = args.get("stage", "sft")
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; spectral runs in {', '.join(STAGES)}")


def _check_poet(args: Mapping[str, Any]) -> None:
    """Raise a ValueError if what is trained is not a model's own weights, or not saved by it."""
    kind = args.get("finetuning_type", "lora")
    if kind != "full":
        raise ValueError(
            f"finetuning_type is {kind!r}, but POET rotates the weights themselves: write"
            " finetuning_type: full, or take another optimizer"
        )
    if args.get("stage") == "rm":
        raise ValueError(
            "stage is 'rm'; with POET spectral runs in pt, sft, dpo, kto: LLaMA-Factory saves a"
            " reward model as its state dict, whose weights lack the rotations"
        )


@contextmanager
def _in_place_of_theirs(create: Any) -> Iterator[None]:
    """Let LLaMA-Factory's trainers call ``create`` for their optimizer."""
    modules: list[Any] = [
        importlib.import_module(f"llamafactory.train.{stage}.trainer") for stage in STAGES
    ]
    theirs = [module.create_custom_optimizer for module in modules]
    for module in modules:
        module.create_custom_optimizer = create
    try:
        yield
    finally:
        for module, function in zip(modules, theirs, strict=True):
            module.create_custom_optimizer = function


require("LLaMA-Factory", "llamafactory", llamafactory.__version__, KNOWN)

if __name__ == "__main__":
    run_exp()

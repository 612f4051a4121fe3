"""ms-swift: a plugin file that imports this, and the optimizer's name on the command line.

swift sft ... --external_plugins plugin.py --optimizer spectral_muon --optim_args momentum=0.95
"""

from __future__ import annotations

import copy
from typing import Any

from swift.callbacks import callbacks_map
from swift.optimizers import OptimizerCallback, optimizers_map
from torch import nn

from spectral_dist._error_help import explained
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.huggingface.converting import ConvertingCallback
from spectral_dist.integrations.huggingface.factory import SpectralFactory, texts_of
from spectral_dist.integrations.huggingface.section import split_rotation
from spectral_dist.poet.convert import SETTINGS
from spectral_dist.rules import registry
from spectral_dist.rules.fields import parse_value

RATES = ("vit_lr", "aligner_lr", "use_galore", "lorap_lr_ratio")
"""Arguments of swift that belong to its own optimizers."""
CALLBACK = "spectral"
"""The name of ``TrainerCallback`` in swift's ``callbacks_map``."""


class TrainerCallback(ConvertingCallback):
    """What the trainer has to do beside stepping the optimizer.

    Args:
        args: swift's, for the Trainer.
        trainer: being made, by an ``optimizer_callback`` of ``callback_of``.
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(f"--optimizer {args.optimizer}", trainer.optimizer_callback.rotation)


def callback_of(optimizer: str, **options: Any) -> type[OptimizerCallback]:
    """Return what swift's ``optimizers_map`` has for an optimizer.

    Example:
        >>> optimizers_map["muon_by_heads"] = callback_of("muon", heads="auto")

    Args:
        optimizer: its name: "muon", "sumo", ..., or that of a registered rule.
        options: the optimizer's own, those of ``spectral_dist.param_groups``, and POET's of
            ``spectral_dist.poet.convert``; they win over what the command line says.

    Raises:
        ValueError: an unknown optimizer.
    """
    entry = registry.find(optimizer)

    class SpectralOptimizerCallback(OptimizerCallback):  # type: ignore[misc]
        """Build the optimizer of swift's trainer.

        Attributes:
            rotation: keywords of ``spectral_dist.poet.convert``; None: the optimizer is not POET.
            arguments: ``args``, without those keywords in ``optim_args``.
            keywords: of ``SpectralFactory``.
        """

        @explained
        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(args, trainer)
            self.rotation = None
            self.arguments, self.keywords = args, options
            if entry.rule is None:
                _check_tuner(args)
                self.arguments, settings = _split(args)
                self.keywords, self.rotation = split_rotation(
                    {**settings, **options}, f"--optimizer {args.optimizer}"
                )
            if CALLBACK not in args.callbacks:
                args.callbacks.append(CALLBACK)

        @explained
        def create_optimizer(self, model: nn.Module | None = None) -> ShardedOptimizer:
            """Return the trainer's optimizer, or build it."""
            if self.trainer.optimizer is not None:
                return self.trainer.optimizer  # type: ignore[no-any-return]
            model = self.trainer.model if model is None else model
            _check_rates(self.args, model)
            return SpectralFactory()(model, self.arguments, optimizer=optimizer, **self.keywords)

    return SpectralOptimizerCallback


def _split(args: Any) -> tuple[Any, dict[str, Any]]:
    """Return the arguments without settings of ``convert`` in ``optim_args``, and those."""
    texts = texts_of(args.optim_args)
    settings = {name: parse_value(text) for name, text in texts.items() if name in SETTINGS}
    others = copy.copy(args)
    others.optim_args = ",".join(f"{k}={text}" for k, text in texts.items() if k not in SETTINGS)
    return others, settings


def _check_tuner(args: Any) -> None:
    """Raise a ValueError if something else than the model's own weights is trained."""
    if args.tuner_type != "full":
        raise ValueError(
            f"--tuner_type is {args.tuner_type!r}, but POET rotates the weights themselves: write"
            " --tuner_type full, or take another optimizer"
        )


def _check_rates(args: Any, model: nn.Module) -> None:
    """Raise a ValueError if arguments ask for what swift's own optimizers alone do."""
    adapters = getattr(model, "peft_config", {}).values()
    for name in RATES:
        values = [getattr(holder, name, None) for holder in (args, *adapters)]
        if any(values):
            raise ValueError(
                f"{name} has no effect on --optimizer {args.optimizer}: leave it out, or take an"
                " optimizer of swift's own"
            )


def _register(entry: registry.Entry) -> None:
    """Write an optimizer into swift's map."""
    optimizers_map[entry.megatron_name] = callback_of(entry.name)


callbacks_map[CALLBACK] = TrainerCallback
registry.add_listener(_register)

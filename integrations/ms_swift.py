"""ms-swift: a plugin file that imports this, and the optimizer's name on the command line.

swift sft ... --external_plugins plugin.py --optimizer spectral_muon --optim_args momentum=0.95
"""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map
from torch import nn

from spectral_dist._error_help import explained
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.huggingface.callback import SpectralCallback
from spectral_dist.integrations.huggingface.factory import SpectralFactory
from spectral_dist.integrations.huggingface.section import check_deepspeed
from spectral_dist.rules import registry

RATES = ("vit_lr", "aligner_lr", "use_galore", "lorap_lr_ratio")
"""Arguments of swift that belong to its own optimizers."""


def callback_of(optimizer: str, **options: Any) -> type[OptimizerCallback]:
    """Return what swift's ``optimizers_map`` has for an optimizer.

    Example:
        >>> optimizers_map["muon_by_heads"] = callback_of("muon", heads="auto")

    Args:
        optimizer: its name: "muon", "sumo", ..., or that of a registered rule.
        options: the optimizer's own, and those of ``spectral_dist.param_groups``; they win over
            what the command line says.

    Raises:
        ValueError: an unknown optimizer.
    """
    entry = registry.find(optimizer)

    class SpectralOptimizerCallback(OptimizerCallback):  # type: ignore[misc]
        """Build the optimizer of swift's trainer."""

        @explained
        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(args, trainer)
            where = f"--optimizer {args.optimizer}"
            if entry.rule is None:
                raise ValueError(
                    f"{where}: {entry.title} does not run under ms-swift, which has no place for"
                    " spectral_dist.poet.convert between its model and its trainer"
                )
            check_deepspeed(args, where)

        @explained
        def create_optimizer(self, model: nn.Module | None = None) -> ShardedOptimizer:
            """Return the trainer's optimizer, or build it."""
            if self.trainer.optimizer is not None:
                return self.trainer.optimizer  # type: ignore[no-any-return]
            model = self.trainer.model if model is None else model
            _check_rates(self.args, model)
            self.trainer.add_callback(SpectralCallback())
            return SpectralFactory()(model, self.args, optimizer=optimizer, **options)

    return SpectralOptimizerCallback


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


registry.add_listener(_register)

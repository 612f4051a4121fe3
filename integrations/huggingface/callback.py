"""What transformers' Trainer has to do beside stepping the optimizer."""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakSet

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.monitor import Monitor


class SpectralCallback(TrainerCallback):  # type: ignore[misc]
    """Gather the optimizer's state before the Trainer saves it, and monitor matrices.

    Gathering is needed, and done, where only owners store momentum or matrix state: under
    DistributedDataParallel (see ``SpectralOptimizer.consolidate_state_dict``).

    Args:
        monitor: of the optimizer, from the beginning of the training; None: none.

    Attributes:
        instances: all callbacks that exist.
    """

    instances: ClassVar[WeakSet[SpectralCallback]] = WeakSet()

    def __init__(self, monitor: Monitor | None = None) -> None:
        self.monitor = monitor
        SpectralCallback.instances.add(self)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any
    ) -> None:
        """Set the optimizer's monitor.

        Raises:
            ValueError: the Trainer's optimizer is none of ours.
        """
        ours = unwrapped(optimizer)
        if ours is None:
            raise ValueError(
                f"SpectralCallback: the optimizer is a {type(optimizer).__name__}; give the Trainer"
                " optimizer_cls_and_kwargs=(SpectralFactory, {...}), or leave the callback out"
            )
        if self.monitor is not None:
            ours.monitor = self.monitor

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any
    ) -> None:
        """Gather the optimizer's state if the Trainer is about to save it."""
        if control.should_save:
            _gather(optimizer)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any
    ) -> None:
        """Gather the optimizer's state if the Trainer is about to save it."""
        if control.should_save:
            _gather(optimizer)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any
    ) -> None:
        """Gather the optimizer's state where an evaluation decides whether it is saved."""
        if args.save_strategy == SaveStrategy.BEST:
            _gather(optimizer)


def unwrapped(optimizer: Any) -> ShardedOptimizer | None:
    """Return our optimizer inside of accelerate's and DeepSpeed's wrappers, or None."""
    while optimizer is not None and not isinstance(optimizer, ShardedOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _gather(optimizer: Any) -> None:
    """Make ``state_dict()`` of this rank whole, if it is not; a collective call."""
    ours = unwrapped(optimizer)
    if isinstance(ours, SpectralOptimizer) and ours.needs_consolidation:
        ours.consolidate_state_dict()

"""What transformers' Trainer has to do beside stepping the optimizer."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar
from weakref import WeakSet

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import SaveStrategy

from spectral_dist._error_help import explained
from spectral_dist.core.optimizer import SpectralOptimizer
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.integrations.huggingface.readings import Readings
from spectral_dist.monitor import Monitor


class SpectralCallback(TrainerCallback):  # type: ignore[misc]
    """Gather the optimizer's state before the Trainer saves it, and monitor matrices.

    Gathering is needed, and done, where only owners store momentum or matrix state: under
    DistributedDataParallel (see ``SpectralOptimizer.consolidate_state_dict``).

    Args:
        monitor: of the optimizer, from the beginning of the training; None: none. What it reads is
            also in what the Trainer logs next, as QUANTITY/MATRIX: TensorBoard has it beside the
            loss. It is left out of ``state.log_history``, which every checkpoint holds whole, and
            of what is printed.

    Attributes:
        instances: all callbacks that exist.
    """

    instances: ClassVar[WeakSet[SpectralCallback]] = WeakSet()

    def __init__(self, monitor: Monitor | None = None) -> None:
        self.monitor = monitor
        self._readings = Readings()
        SpectralCallback.instances.add(self)

    @explained
    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any
    ) -> None:
        """Set the optimizer's monitor.

        Raises:
            ValueError: the Trainer's optimizer is none of ours, or one that DeepSpeed's JSON names
                in place of the one that the Trainer was given.
        """
        trainer = _calling_trainer()
        _check_json(trainer)
        ours = unwrapped(optimizer)
        if ours is None:
            raise ValueError(
                f"SpectralCallback: the optimizer is a {_innermost(optimizer)}; give the Trainer"
                " optimizer_cls_and_kwargs=(SpectralFactory, {...}), or leave the callback out"
            )
        if self.monitor is not None:
            ours.monitor = self.monitor
            if trainer is not None:
                self._readings.log(self.monitor, trainer.callback_handler)

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


def _innermost(optimizer: Any) -> str:
    """Return the name of the class inside of all wrappers."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return type(optimizer).__name__


def _calling_trainer() -> Any:
    """Return the Trainer whose event this is, or None.

    transformers passes to its callbacks everything but the Trainer, which alone knows what it was
    given for an optimizer, and the order of its callbacks.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(getattr(caller, "callback_handler", None), CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def _check_json(trainer: Any) -> None:
    """Raise a ValueError if a Trainer has ignored its factory for the optimizer of a JSON."""
    if getattr(trainer, "optimizer_cls_and_kwargs", None) is None:
        return
    if trainer.is_deepspeed_enabled:
        named = trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("optimizer")
        if named is not None:
            raise ValueError(
                f"SpectralCallback: the DeepSpeed JSON names an optimizer ({named.get('type')}), so"
                " the Trainer has ignored its optimizer_cls_and_kwargs; leave out the one or the"
                " other"
            )


def _gather(optimizer: Any) -> None:
    """Make ``state_dict()`` of this rank whole, if it is not; a collective call."""
    ours = unwrapped(optimizer)
    if isinstance(ours, SpectralOptimizer) and ours.needs_consolidation:
        ours.consolidate_state_dict()

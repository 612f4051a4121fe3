"""The callback of a trainer that loads its model itself, which POET has to convert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spectral_dist import poet
from spectral_dist._error_help import explained
from spectral_dist.integrations.huggingface.callback import SpectralCallback
from spectral_dist.integrations.huggingface.section import check_deepspeed


class ConvertingCallback(SpectralCallback):
    """Convert the model for POET as soon as there is a Trainer of it.

    It is plain then: the Trainer loads a checkpoint to resume from, builds the optimizer and wraps
    or shards the model in ``train()``. For other optimizers only their place is checked.

    Args:
        where: the setting that names the optimizer.
        rotation: keywords of ``spectral_dist.poet.convert``; None: the optimizer is not POET.
    """

    def __init__(self, where: str, rotation: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.where = where
        self.rotation = rotation

    @explained
    def on_init_end(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **others: Any
    ) -> None:
        """Convert the model if the optimizer is POET.

        Raises:
            ValueError: DeepSpeed's JSON has an optimizer, too; or blocks do not fit the model.
        """
        check_deepspeed(args, self.where)
        if self.rotation is not None:
            poet.convert(model, **self.rotation)

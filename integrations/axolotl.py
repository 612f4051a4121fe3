"""Axolotl: two keys of its YAML.

plugins: [spectral_dist.integrations.axolotl.Plugin]
spectral: {optimizer: muon, momentum: 0.95}
"""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.mixins import OptimizerMixin
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from spectral_dist.integrations.huggingface.converting import ConvertingCallback
from spectral_dist.integrations.huggingface.factory import SpectralFactory
from spectral_dist.integrations.huggingface.section import read

DEFAULT = "adamw_torch_fused"
"""What Axolotl fills in as ``optimizer`` where the YAML has none."""
RATES = ("embedding_lr", "embedding_lr_scale", "loraplus_lr_ratio", "lr_groups")
"""Keys of Axolotl that no optimizer takes which is built of the whole model."""


if not hasattr(BasePlugin, "post_trainer_create"):
    raise ImportError(
        "this release of spectral_dist works with Axolotl 0.21.0, and what is installed does not"
        " call post_trainer_create: install that one (pip install 'axolotl==0.21.0')"
    )


class SpectralArguments(BaseModel):  # type: ignore[misc]
    """What the plugin adds to Axolotl's keys.

    Attributes:
        spectral: ``optimizer`` is the name; beside it stand the optimizer's options, those of
            ``spectral_dist.param_groups``, and POET's of ``spectral_dist.poet.convert``.
    """

    spectral: dict[str, Any]

    @model_validator(mode="before")  # type: ignore[untyped-decorator]
    @classmethod
    def check(cls, values: Any) -> Any:
        """Return Axolotl's keys and values as they are, if ``spectral`` can train with them.

        Raises:
            ValueError: a wrong section, or keys that it contradicts or would make void.
        """
        section = read(values.get("spectral"))
        named = values.get("optimizer") or DEFAULT
        if named != DEFAULT:
            raise ValueError(
                f"optimizer is {named!r}, and spectral names another: leave out optimizer, or"
                " the plugin and spectral"
            )
        for key in RATES:
            if values.get(key):
                raise ValueError(
                    f"{key} has no effect on spectral's optimizer: leave it out, or write scalar_lr"
                    " in spectral, the rate of all that is no matrix"
                )
        if values.get("relora"):
            raise ValueError(
                "relora resets AdamW's state, by its names, and not spectral's: leave out relora"
            )
        if section.rotation is not None and values.get("adapter"):
            raise ValueError(
                f"adapter is {values['adapter']!r}, but POET rotates the weights themselves: leave"
                " out adapter, or take another optimizer"
            )
        return values


class Plugin(BasePlugin):  # type: ignore[misc]
    """Give Axolotl's trainer the optimizer that the section ``spectral`` names."""

    def get_input_args(self) -> str:
        """Return the path of what the plugin adds to Axolotl's keys."""
        return f"{SpectralArguments.__module__}.{SpectralArguments.__qualname__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[ConvertingCallback]:
        """Return what converts the model for POET, and gathers state before it is saved."""
        return [ConvertingCallback("spectral", read(cfg.spectral.to_dict()).rotation)]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Set how the trainer makes its optimizer."""
        keywords = read(cfg.spectral.to_dict()).keywords
        if not isinstance(trainer, OptimizerMixin):  # which passes args by their place
            keywords["args"] = trainer.args
        trainer.optimizer_cls_and_kwargs = (SpectralFactory, keywords)

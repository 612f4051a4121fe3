"""NeMo Automodel: ``_target_: spectral_dist.integrations.automodel.SpectralConfig`` in YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_automodel.components.optim.optimizer import OptimizerConfig
from torch import nn

from spectral_dist._error_help import explained
from spectral_dist.core.named import class_of
from spectral_dist.core.sharded import ShardedOptimizer
from spectral_dist.params.param_groups import param_groups
from spectral_dist.poet.convert import convert
from spectral_dist.poet.layer import PoetLayer
from spectral_dist.poet.optimizer import POET
from spectral_dist.rules import registry
from spectral_dist.rules.options import ROUTING


@dataclass
class SpectralConfig(OptimizerConfig):  # type: ignore[misc]
    """What the section ``optimizer`` of a recipe's YAML builds.

    Automodel's scheduler writes lr and weight decay of every group, as multiples of those of the
    first group; the multiples are those of ``scalar_lr`` and ``scalar_weight_decay``.

    Attributes:
        name: of the optimizer: "muon", "polargrad", "root", "sumo", "normuon", "poet", or a
            registered rule.
        lr: learning rate.
        weight_decay: decoupled weight decay, times lr.
        options: the optimizer's other options, and those of ``spectral_dist.param_groups``.
    """

    supports_megatron_fsdp_sharding: ClassVar[bool] = False

    name: str = "muon"
    lr: float = 1e-3
    weight_decay: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    @explained
    def build(
        self, model: nn.Module, *, device_mesh: Any = None, is_peft: bool = False
    ) -> list[ShardedOptimizer]:
        """Return the model's optimizer, in a list as Automodel wants it.

        Args:
            model: as the recipe has sharded it.
            device_mesh: not needed: parameters tell where their shards are.
            is_peft: whether adapters are trained, which makes no difference.

        Raises:
            ValueError: an unknown optimizer or option, or what Automodel cannot schedule.
        """
        where = f"{type(self).__name__}(name={self.name!r})"
        if self.param_group_overrides:
            raise ValueError(
                f"{where}: param_group_overrides is of Automodel's own optimizers; write options,"
                " which has scalar_lr, scalar_weight_decay, matrices and scalars"
            )
        for name in ("lr", "weight_decay"):
            if name in self.options:
                raise ValueError(f"{where}: options has {name}; write it beside options")
        entry = registry.find(self.name)
        if hasattr(model, "parts"):
            raise ValueError(
                f"{where}: pipeline parallelism is not supported under Automodel: a stage does not"
                " tell its output head from a matrix; set pp_size to 1, or train with torchtitan or"
                " Megatron-Bridge"
            )
        is_rotated = any(isinstance(module, PoetLayer) for module in model.modules())
        if entry.rule is None and not is_rotated:
            raise ValueError(
                f"{where}: {entry.title} trains the rotations of a converted model; write"
                " _target_: spectral_dist.integrations.automodel.rotated in the section model, as"
                " examples/automodel_poet.yaml does"
            )
        options = {"lr": self.lr, "weight_decay": self.weight_decay, **self.options}
        routing = {name: options.pop(name) for name in ROUTING if name in options}
        made_of: Any = POET if entry.rule is None else class_of(entry)
        made_of.options_type.from_user(options, where)
        optimizer = made_of(param_groups(model, **routing), **options)
        self._keep_multiples(optimizer, where)
        return [optimizer]

    def _keep_multiples(self, optimizer: ShardedOptimizer, where: str) -> None:
        """Write into groups by what Automodel's scheduler is to multiply lr and weight decay.

        Raises:
            ValueError: the scheduler would write other values than those that are asked for.
        """
        for name, multiple in (("lr", "lr_mult"), ("weight_decay", "wd_mult")):
            first = optimizer.param_groups[0]
            base = first[name]
            for group in optimizer.param_groups:
                if group[name] and not base:
                    raise ValueError(
                        f"{where}: {name} of kind {group['kind']!r} is {group[name]}, but"
                        f" Automodel's scheduler keeps it as a multiple of that of kind"
                        f" {first['kind']!r}, which is {base}; set {name} and scalar_{name} to"
                        " numbers above 0, or leave both at 0"
                    )
                group[multiple] = group[name] / base if base else 1.0


def rotated(model: nn.Module, **settings: Any) -> nn.Module:
    """Convert a model for ``poet``: what the section ``model`` of a recipe's YAML names.

    Automodel's own targets build and shard a model in one call. What another target returns it
    shards afterwards, as it is.

    Args:
        model: of the section's own section ``model``, such as what transformers'
            ``AutoModelForCausalLM.from_pretrained`` returns.
        settings: as ``spectral_dist.poet.convert`` has them.

    Raises:
        ValueError: as ``convert`` does.
    """
    return convert(model, **settings)

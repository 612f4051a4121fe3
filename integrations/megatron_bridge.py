"""Megatron-Bridge: ``cfg.optimizer = SpectralOptimizerConfig(lr=0.02, options={"momentum": 0.9})``.

Bridge takes the plain name, too, after ``import spectral_dist.integrations.megatron``:
``OptimizerConfig(optimizer="spectral_muon")``. This config is for options of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from megatron.bridge.training.config import OptimizerConfig
from megatron.bridge.utils import instantiate_utils

from spectral_dist._error_help import explained
from spectral_dist._errors import suggest
from spectral_dist.integrations.megatron import TYPES, get_spectral_megatron_optimizer
from spectral_dist.integrations.megatron.build import checked_options
from spectral_dist.integrations.versions import require

KNOWN = "0.6.2"
"""The version that the tests run."""


require(
    "megatron-bridge",
    "megatron-bridge",
    metadata.version("megatron-bridge"),
    KNOWN,
    'write Bridge\'s own OptimizerConfig(optimizer="spectral_muon") after import'
    " spectral_dist.integrations.megatron, for an optimizer with its default options",
)


@dataclass
class SpectralOptimizerConfig(OptimizerConfig):  # type: ignore[misc]
    """Bridge's OptimizerConfig of an optimizer of ours, with its options.

    Bridge writes it into run_config.yaml and reads it from there, if this module is imported.

    Attributes:
        optimizer: its name: "spectral_muon", "spectral_sumo" and so on.
        options: of ``spectral_dist.options`` and of ``param_groups`` (matrices, scalars, split,
            one_sided), by name. lr, weight_decay, adam_beta1, adam_beta2 and adam_eps are fields
            of Bridge's own.
    """

    optimizer: str = "spectral_muon"
    options: dict[str, Any] = field(default_factory=dict)

    @explained
    def finalize(self) -> None:
        """Check name and options, and compute the fields that Megatron derives from others.

        Raises:
            ValueError: an unknown optimizer or option, or a bad value.
        """
        if self.optimizer not in TYPES:
            raise ValueError(
                f"SpectralOptimizerConfig's optimizer is {self.optimizer!r}"
                f"{suggest(self.optimizer, TYPES)}; Bridge's OptimizerConfig has Megatron's own"
            )
        checked_options(self, self.options, self.optimizer)
        super().finalize()

    def provide(
        self,
        model_chunks: Any,
        config_overrides: Any = None,
        use_gloo_process_groups: bool = False,
        pg_collection: Any = None,
    ) -> Any:
        """Build the optimizer; Bridge's ``setup_optimizer`` calls this with its own arguments.

        Returns:
            Megatron's optimizer, a ``MegatronOptimizer``.

        Raises:
            ValueError: an unknown optimizer or option, a configuration that is not supported.
        """
        return get_spectral_megatron_optimizer(
            self,
            model_chunks if isinstance(model_chunks, list) else [model_chunks],
            config_overrides,
            use_gloo_process_groups=use_gloo_process_groups,
            pg_collection=pg_collection,
            **self.options,
        )


# Bridge's list of packages whose classes a YAML file may name
instantiate_utils.register_allowed_target_prefix("spectral_dist.")

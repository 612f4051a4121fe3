"""AdamW by apex's FusedAdam: ``spectral_dist.rules.adamw_apex``, by its older path."""

from spectral_dist.rules.adamw_apex import FusedAdamW, fused_adam

__all__ = ["FusedAdamW", "fused_adam"]

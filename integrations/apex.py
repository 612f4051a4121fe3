"""The older import path of ``spectral_dist.rules.adamw_apex``: AdamW by apex's FusedAdam."""

from spectral_dist.rules.adamw_apex import FusedAdamW, fused_adam

__all__ = ["FusedAdamW", "fused_adam"]

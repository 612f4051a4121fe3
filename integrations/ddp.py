"""SUMO's projected gradients under DDP, by the older path of ``torch.sumo_ddp_hook``."""

from spectral_dist.integrations.torch.sumo_ddp_hook import project_gradients

__all__ = ["project_gradients"]

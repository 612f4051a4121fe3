"""The older import path of ``torch.sumo_ddp_hook``: SUMO's projected gradients under DDP."""

from spectral_dist.integrations.torch.sumo_ddp_hook import project_gradients

__all__ = ["project_gradients"]

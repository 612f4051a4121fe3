"""Hugging Face: transformers' Trainer, TRL, PEFT and Accelerate.

Trainer(..., optimizer_cls_and_kwargs=(SpectralFactory, {"optimizer": "muon", "args": args}))
"""

from spectral_dist.integrations.huggingface.callback import SpectralCallback
from spectral_dist.integrations.huggingface.factory import SpectralFactory
from spectral_dist.integrations.huggingface.pretrained import export_on_save

__all__ = ["SpectralCallback", "SpectralFactory", "export_on_save"]

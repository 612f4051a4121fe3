"""Megatron-Bridge with our optimizers."""

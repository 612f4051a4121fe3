"""Integrations with frameworks: where each keeps its shards, and its names for our optimizers."""

"""Under megatron-core, with and without its distributed optimizer."""

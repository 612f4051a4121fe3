"""Under plain torch: DDP, FSDP2, tensor parallelism."""

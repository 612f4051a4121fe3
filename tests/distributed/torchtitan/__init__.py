"""Under torchtitan's Trainer, on CPUs."""

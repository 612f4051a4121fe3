"""Under LLaMA-Factory, on CPUs."""

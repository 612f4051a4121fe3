"""Under the recipes of NeMo Automodel, on CPUs."""

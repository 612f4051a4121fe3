"""Under Axolotl, on CPUs."""

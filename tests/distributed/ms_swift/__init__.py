"""Under ms-swift, on CPUs."""

"""verl with our optimizers."""

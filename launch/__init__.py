"""Pretrain a Llama under any supported framework, and run the command `spectral-dist`."""

"""Tell the core where each framework keeps its shards, and register the optimizers' names."""

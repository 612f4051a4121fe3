"""What a training loop calls, one module for each engine: DeepSpeed, plain torch, Megatron."""

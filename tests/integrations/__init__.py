from tests.support import megatron_cpu, megatron_model

__all__ = ["megatron_cpu", "megatron_model"]  # under the names that they had here

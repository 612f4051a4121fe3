"""Numbers about every matrix while it trains: the public path of ``core.monitor``."""

from spectral_dist.core.monitor import (
    QUANTITIES,
    Monitor,
    Report,
    stable_rank,
    to_jsonl,
    to_tensorboard,
)

__all__ = ["QUANTITIES", "Monitor", "Report", "stable_rank", "to_jsonl", "to_tensorboard"]

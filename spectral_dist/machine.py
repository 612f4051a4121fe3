"""The speed of one rank, in four numbers, for the cost model of strategies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Machine:
    """The speed of one rank. The defaults are for GPUs of one H100 node, NVLink between them.

    Attributes:
        bandwidth: bytes/s that a rank sends (half of NVLink's 450e9 each way, as NCCL reaches it
            for messages of some MB).
        latency: seconds of one collective.
        flops: multiply-adds/s in half precision (of 495e12 dense ones in bfloat16 on the data
            sheet, what batched GEMMs of some thousand rows reach).
        flops_wide: multiply-adds/s in the Gram's dtype, float32 or float64 (both 33e12 on the data
            sheet).
    """

    bandwidth: float = 2e11
    latency: float = 2e-5
    flops: float = 2e14
    flops_wide: float = 2.5e13

    @classmethod
    def from_user(cls, values: Mapping[str, float]) -> Machine:
        """Build a machine from the defaults, changed by these numbers by name.

        Raises:
            ValueError: an unknown name, or a value that is no number above 0.
        """
        defaults = asdict(cls())
        for name, value in values.items():
            if name not in defaults:
                raise ValueError(f"unknown number {name!r}. Known: {', '.join(defaults)}.")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; it must be a number above 0")
        return cls(**{**defaults, **values})

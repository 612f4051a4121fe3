"""The speed of a rank and of its links, for cost models and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Machine:
    """The speed of one rank, and of the links within and between hosts.

    The defaults are for GPUs of H100 nodes: NVLink within, 400 Gbit/s for each GPU between them.
    ``configs/machines`` has others.

    Attributes:
        bandwidth: bytes/s that a rank sends to ranks of its host (half of NVLink's 450e9 each way,
            as NCCL reaches it for messages of some MB).
        latency: seconds of one collective within a host.
        flops: multiply-adds/s in half precision (of 495e12 dense ones in bfloat16 on the data
            sheet, what batched GEMMs of some thousand rows reach).
        flops_wide: multiply-adds/s in the Gram's dtype, float32 or float64 (both 33e12 on the data
            sheet).
        half_speed_side: shorter side of a matrix whose products reach half of those speeds, as
            predictions count them: others reach side / (side + half_speed_side). 0: all reach them.
        ranks_per_host: ranks that the faster links join.
        host_bandwidth: bytes/s that a rank sends to ranks of other hosts.
        host_latency: seconds of one collective between hosts.
        message: seconds for every further rank that a rank sends to in one collective.
        memory_bandwidth: bytes/s of a rank's memory, read and written.
        launch: seconds in which a rank's host starts an operator.
        training_flops: multiply-adds/s that a training step's forward and backward pass reach.
    """

    bandwidth: float = 2e11
    latency: float = 2e-5
    flops: float = 2e14
    flops_wide: float = 2.5e13
    half_speed_side: float = 0.0
    ranks_per_host: float = 8
    host_bandwidth: float = 4.5e10
    host_latency: float = 4e-5
    message: float = 1e-6
    memory_bandwidth: float = 2.5e12
    launch: float = 4e-6
    training_flops: float = 2e14

    @classmethod
    def from_user(cls, values: Mapping[str, float]) -> Machine:
        """Build a machine from the defaults, changed by these numbers by name.

        Raises:
            ValueError: an unknown name, or a value that is no number in its range.
        """
        defaults = asdict(cls())
        for name, value in values.items():
            if name not in defaults:
                raise ValueError(f"unknown number {name!r}. Known: {', '.join(defaults)}.")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            may_be_0 = name == "half_speed_side"
            if not is_number or not 0 <= value < float("inf") or (value == 0 and not may_be_0):
                least = "at least" if may_be_0 else "above"
                raise ValueError(f"{name} is {value!r}; it must be a number {least} 0")
            if name == "ranks_per_host" and value != int(value):
                raise ValueError(f"{name} is {value!r}; it must be a whole number")
        return cls(**{**defaults, **values})

    @property
    def host_size(self) -> int:
        """Return the number of ranks of a host."""
        return int(self.ranks_per_host)

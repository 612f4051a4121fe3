"""FSDP2 of accelerate on CPUs, where it would train with DistributedDataParallel without a word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

FSDP_VARIABLES = ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_STATE_DICT_TYPE")


@contextmanager
def fresh(fsdp: bool) -> Iterator[None]:
    """Forget the Accelerators of earlier tests; with ``fsdp`` count several CPUs as GPUs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    kept = {name: value for name, value in os.environ.items() if name.startswith("FSDP_")}
    for name in (*kept, *FSDP_VARIABLES):
        os.environ.pop(name, None)
    begin = AcceleratorState.__init__

    def beginning(self: Any, *args: Any, **kwargs: Any) -> None:
        PartialState(cpu=True)
        shared = PartialState._shared_state
        if shared["distributed_type"] == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    with mock.patch.object(AcceleratorState, "__init__", beginning if fsdp else begin):
        yield

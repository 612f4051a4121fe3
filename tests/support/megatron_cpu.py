"""Megatron-core on a CPU: what it takes from CUDA is given by the CPU, in this process only.

For ranks of ``harness.run(..., pool=version)``: one process can hold one version. Everything that
computes stays Megatron's own; only devices, streams and generators are other ones.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.machinery
import importlib.util
import multiprocessing
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typing_extensions
from torch.overrides import TorchFunctionMode

VERSIONS = ("0.19.2", "0.16.1")
FOLDERS = Path(__file__).resolve().parents[2] / ".venv"
CPU = torch.device("cpu")


def folder(version: str) -> Path:
    """Where launch/test.sh puts a version; SPECTRAL_MEGATRON_DIR names another parent folder."""
    return Path(os.environ.get("SPECTRAL_MEGATRON_DIR", FOLDERS)) / f"megatron-core-{version}"


class Stream:
    """A CUDA stream or event that has always finished: its methods do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return Stream  # record_event() returns an event


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def on_cpu(device: Any) -> Any:
    """The CPU for any CUDA device, and what it was given for anything else."""
    return CPU if isinstance(device, str | torch.device) and "cuda" in str(device) else device


class OnCPU(TorchFunctionMode):
    """Tensors asked for on "cuda" come on the CPU, and say that they are CUDA tensors."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(args[0]).replace("torch.", "torch.cuda.")
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        if function in (torch.Tensor.to, torch.device):
            args = tuple(on_cpu(arg) for arg in args)
        return function(*args, **kwargs)


def install(version: str) -> None:
    """Make ``import megatron.core`` this version and fit for the CPU; again: nothing."""
    if "megatron.core" in sys.modules:
        # in a git checkout, be it ours, it appends the commit
        found = sys.modules["megatron.core"].__version__.partition("+")[0]
        assert found == version, f"this process has {found}: use one pool for each version"
        return
    # its checkpoints start a process, which a pool's ranks, being daemons, may not
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    assert folder(version).exists(), f"no {folder(version)}: launch/test.sh fetches it"
    sys.path.insert(0, str(folder(version)))
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = cuda.empty_cache = nothing
    cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    barrier: Any = dist.barrier
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)
    exchange: Any = dist.all_to_all_single

    def all_to_all_single(output: Any, given: Any, *splits: Any, **kwargs: Any) -> Any:
        """With the numbers of tokens as lists, which Megatron only makes of CUDA tensors."""
        plain = [s.tolist() if isinstance(s, torch.Tensor) else s for s in splits]
        named = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        return exchange(output, given, *plain, **named)

    dist.all_to_all_single = all_to_all_single
    if importlib.util.find_spec("triton") is None:
        # the one module of 0.19.2 that needs it: GPU kernels of mixtures of experts, unused here
        name = "megatron.core.transformer.moe.ops.paged_stash"
        kernels: Any = sys.modules.setdefault(name, types.ModuleType(name))
        kernels.GLOBAL_BLOCK_SIZE = 1024
        kernels.paged_stash_copy_kernel = kernels.paged_stash_pop_kernel = None
    OnCPU().__enter__()  # for as long as this process lives
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    moe = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe, "te_general_gemm"):  # 0.16.1 without Transformer Engine forgets it
        moe.te_general_gemm = None
    norms = importlib.import_module("megatron.core.transformer.torch_norm")
    plain = norms.WrappedTorchNorm.__new__

    def sequence_parallel(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        """Torch's norm, its gradients summed over TP as apex's and Transformer Engine's are."""
        other = copy.copy(config)
        other.sequence_parallel = False
        norm = plain(cls, other, *args, **kwargs)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm

    norms.WrappedTorchNorm.__new__ = sequence_parallel


UNUSED = ("omegaconf", "sentencepiece", "tiktoken", "flask_restful", "flask", "regex")
"""What megatron.training asks for that a run on mock data never calls."""


def install_training(version: str = VERSIONS[0]) -> None:
    """``install``, and make ``import megatron.training`` work, of versions that have it."""
    vars(typing).setdefault("override", typing_extensions.override)  # it wants Python 3.12
    for name in UNUSED:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = Absent(name)
    torch.compile = lambda function=None, **kwargs: function or (lambda inner: inner)
    install(version)
    torch.cuda.set_device = lambda device: None
    torch.cuda.reset_peak_memory_stats = lambda *args: None
    torch.cuda.device_count, torch.cuda.is_available = lambda: 8, lambda: True
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(major=10, minor=0)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved",
                 "max_memory_reserved"):  # fmt: skip
        setattr(torch.cuda, name, lambda *args: 0)
    begin: Any = dist.init_process_group

    def init_process_group(*args: Any, device_id: Any = None, **kwargs: Any) -> Any:
        return begin(*args, **kwargs)

    dist.init_process_group = init_process_group
    data = importlib.import_module("megatron.core.datasets.utils")
    data.compile_helpers = nothing  # its loops in C++, which mock data does without


class Absent(types.ModuleType):
    """A package that is not installed: anything can be imported from it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stream

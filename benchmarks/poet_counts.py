"""What a rotated layer asks a GPU for in a forward and backward pass, counted without one.

    .venv/bin/python -m benchmarks.poet_counts [--tokens 2048 --block 256]

Shapes are Llama 8B's, in bfloat16 on the meta device, which computes nothing. ``kernels``: torch's
operators that start one at least (views and allocations do not). ``products``: multiply-adds over
nn.Linear's, and those of them in float32. ``moved``: bytes that all operators read and write.
``saved``: bytes that autograd keeps, but parameters. ``peak``: the most that is alive at a time of
what the pass makes. ``ms``: a bound from below for an H100 (989 and 60 TFLOP/s, 3.3 TB/s).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.poet_layer import rotated

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
VARIANTS = ("fast", "memory")
NO_KERNELS = {
    "promote_types",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
}
BYTES_PER_SECOND = 3.3e12
PER_SECOND = {torch.bfloat16: 989e12, torch.float32: 60e12}


@dataclass
class Counts(TorchDispatchMode):
    """Counts what is asked for while it is entered, on any device."""

    kernels: int = 0
    products: dict[torch.dtype, int] = field(default_factory=dict)
    moved: int = 0
    saved: int = 0
    peak: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Begin with no storage seen."""
        super().__init__()
        self.names: list[str] = []
        self._alive: dict[Any, tuple[StorageWeakRef, int]] = {}
        self._known: set[Any] = set()

    def know(self, *tensors: Tensor) -> None:
        """Leave out the memory of what was there before."""
        self._known |= {StorageWeakRef(t.untyped_storage()).cdata for t in tensors}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count one operator."""
        result = function(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        name = function.overloadpacket.__name__
        if not function.is_view and name not in NO_KERNELS and "view" not in name:
            self.kernels += 1
            self.names.append(name)
            self._count(name, given, made)
        self._watch(made)
        return result

    def _count(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        """Add an operator's products and bytes."""
        moved = sum(t.numel() * t.element_size() for t in given + made)
        seconds = moved / BYTES_PER_SECOND
        if name in ("mm", "bmm", "addmm", "baddbmm", "baddbmm_"):
            left, right = (
                [t for t in given if t.dim() >= 2][-2:] if "add" not in name else given[1:3]
            )
            dtype = left.dtype
            products = left.numel() * right.shape[-1]
            self.products[dtype] = self.products.get(dtype, 0) + products
            if name == "baddbmm":  # copies its first argument before it multiplies
                copied = 2 * given[0].numel() * given[0].element_size()
                moved, seconds = moved + copied, seconds + copied / BYTES_PER_SECOND
            seconds = max(seconds, 2 * products / PER_SECOND.get(dtype, 60e12))
        self.moved += moved
        self.seconds += seconds

    def _watch(self, made: list[Tensor]) -> None:
        """Add up the storages that are alive."""
        for t in made:
            ref = StorageWeakRef(t.untyped_storage())
            if ref.cdata not in self._known:
                self._alive[ref.cdata] = (ref, t.untyped_storage().nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


def count(layer: nn.Module, x: Tensor, gradient: Tensor) -> Counts:
    """Count a forward and backward pass of a layer, which has been called before."""
    parameters = {StorageWeakRef(p.untyped_storage()).cdata for p in layer.parameters()}
    kept: dict[Any, int] = {}

    def pack(t: Tensor) -> Tensor:
        place = StorageWeakRef(t.untyped_storage()).cdata
        if place not in parameters and t.dtype.is_floating_point:
            kept[place] = t.untyped_storage().nbytes()
        return t

    layer(x).backward(gradient)  # makes what is cached
    for p in (x, *layer.parameters()):
        p.grad = None
    counts = Counts()
    counts.know(x, gradient, *layer.parameters())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        stack.enter_context(counts)
        result = layer(x)
        counts.saved = sum(kept.values())
        result.backward(gradient)
    return counts


def main(tokens: int = 2048, block: int = 256, names: bool = False) -> None:
    """Count all, and print a table."""
    columns = ("kernels", "products", "in float32", "moved, MB", "saved, MB", "peak, MB", "ms")
    print(f"| in, out | layer | {' | '.join(columns)} |")
    print("|---|---|" + "--:|" * len(columns))
    for n, m in SHAPES:
        layers = {"nn.Linear": nn.Linear(n, m, bias=False, dtype=torch.bfloat16, device="meta")}
        for name in VARIANTS:
            layers[name] = rotated(n, m, torch.bfloat16, block=block, variant=name).to("meta")
        base = 0
        for name, layer in layers.items():
            x = torch.empty(tokens, n, dtype=torch.bfloat16, device="meta", requires_grad=True)
            counts = count(layer, x, torch.empty(tokens, m, dtype=torch.bfloat16, device="meta"))
            products = sum(counts.products.values())
            base = base or products
            wide = counts.products.get(torch.float32, 0)
            print(
                f"| {n}, {m} | {name} | {counts.kernels} | {products / base:.2f} |"
                f" {wide / base:.3f} | {counts.moved / 1e6:.0f} | {counts.saved / 1e6:.1f} |"
                f" {counts.peak / 1e6:.0f} | {1e3 * counts.seconds:.2f} |"
            )
            if names:
                print(" ".join(counts.names))


if __name__ == "__main__":
    typer.run(main)

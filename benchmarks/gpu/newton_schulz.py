"""Newton-Schulz in every form that is there, and the polar factors that converge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import contenders
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.ceilings import GEMM
from benchmarks.gpu.timing import inputs, timed_on
from spectral_dist.polar import polar

SHAPES = (
    (2048, 2048), (4096, 4096), (1536, 7168), (3072, 3584), (7168, 6144), (2048, 11059),
)  # fmt: skip
COMPILED = SHAPES[:2]
"""Where torch.compile is tried: each shape takes it seconds."""
EXACT: dict[str, dict[str, Any]] = {
    "polar_express bf16": {"method": "polar_express", "compute_dtype": "bfloat16"},
    "qdwh float32": {"method": "qdwh", "compute_dtype": "float32"},
    "eigh float64": {"method": "eigh"},
    "svd float64": {"method": "svd"},
}


def needed_flops(m: int, n: int, steps: int = contenders.STEPS) -> float:
    """Return the operations of Newton-Schulz, of products that are symmetric only a half."""
    short, long = sorted((m, n))
    return steps * (short * short * long + short**3 + 2 * short * short * long)


def run(bench: Bench) -> None:
    """Measure each form at each shape, then what converges, then torch.compile."""
    shapes = ((48, 48), (32, 80)) if bench.tiny else SHAPES
    for shape in shapes:
        if bench.has_time(f"Newton-Schulz at {shape}", 3):
            forms(bench, shape)
    for n in (48,) if bench.tiny else (1024, 2048):
        for name, options in EXACT.items():
            if bench.has_time(f"{name} at {n} x {n}", 4):
                exact(bench, n, name, options)
    for shape in shapes[:1] if bench.tiny else COMPILED:
        if bench.cuda and bench.has_time(f"torch.compile at {shape}", 15):
            with bench.attempt(row_of(shape, "plain bf16, torch.compile")) as row:
                given = inputs((1, *shape), bench.half, bench.device)
                finish(bench, row, shape, timed_on(compiled(), given, 0.3))


def row_of(shape: tuple[int, int], name: str) -> Row:
    """Return the row of a form at a shape."""
    return {"shape": f"{shape[0]} x {shape[1]}", "form": name}


def finish(bench: Bench, row: Row, shape: tuple[int, int], ms: float) -> None:
    """Fill in what follows from the milliseconds."""
    row["ms"] = ms
    row["TFLOP/s"] = needed_flops(*shape) / ms / 1e9
    if GEMM in bench.measured:
        row["of GEMM"] = row["TFLOP/s"] / bench.measured[GEMM]


def forms(bench: Bench, shape: tuple[int, int]) -> None:
    """Add a row for each form at one shape."""
    given = inputs((1, *shape), bench.half, bench.device)
    for name, (products, graphs, options) in contenders.FORMS.items():
        if graphs and not bench.cuda:
            continue
        with bench.attempt(row_of(shape, name)) as row:
            if products == "triton" and not contenders.has_kernels(bench.device):
                row["error"] = "not there"
                continue
            factor = partial(polar, **options)
            with contenders.switched(products):
                eager = factor(given[0])
            with contenders.switched(products, graphs):
                finish(bench, row, shape, timed_on(factor, given, 0.4))
                row["error of U"] = distance(eager, given[0])
                if graphs:
                    row["equal to eager"] = torch.equal(factor(given[0]), eager)
    with bench.attempt(row_of(shape, "torch.optim.Muon")) as row:
        function = contenders.torch_muon()
        if function is None:
            row["error"] = "not there"
        else:
            finish(bench, row, shape, timed_on(function, given, 0.4))
            row["error of U"] = distance(function(given[0]), given[0])


def compiled() -> Callable[[Tensor], Tensor]:
    """Return the plain form, compiled for each shape that it meets."""

    def plain(x: Tensor) -> Tensor:
        return polar(x, method="jordan", compute_dtype=torch.bfloat16)

    return torch.compile(plain, dynamic=False)


def distance(factor: Tensor, x: Tensor) -> float:
    """Return the distance to plain Newton-Schulz in float32, over its norm."""
    exact_form = polar(x.float(), method="jordan", compute_dtype=torch.float32)
    return float((factor.float() - exact_form).norm() / exact_form.norm())


def exact(bench: Bench, n: int, name: str, options: dict[str, Any]) -> None:
    """Add a row of a method that ends at the polar factor, or nearly so."""
    with bench.attempt(row_of((n, n), name)) as row:
        given = inputs((1, n, n), torch.float32, bench.device)

        def factor(x: Tensor) -> Tensor:
            return polar(x, **options)

        row["ms"] = timed_on(factor, given, 0.5)
        u = factor(given[0]).double()
        eye = torch.eye(n, dtype=u.dtype, device=u.device)
        row["error of U^T U"] = float((u.mT @ u - eye).norm() / eye.norm())

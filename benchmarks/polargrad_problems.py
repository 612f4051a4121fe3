"""PolarGrad's three public problems (arXiv 2505.21799), with Muon and Adam beside it.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.polargrad_problems --out problems.png

quadratic: 1/2 ||A X B - C||_F^2, X 500 x 100, float64; logistic: labels of 10000 x 400, batches of
1000 rows, X 1000 x 100, float32; completion: 500 x 250 of rank 5, 30 % of it seen, float64. Data,
starting points, learning rates, momenta and numbers of steps are those of the public experiments,
with the same seed. Two things differ: here QDWH always converges, there it stops after 2 steps, so
that the nuclear norm comes out too small and a larger learning rate stays stable; and Muon is
spectral_dist's. Rows marked * have learning rates of our own, for a polar factor that is exact.

Prints a markdown table for each problem: f - f* over its first value for the quadratic, f over its
first value otherwise (f of all data), after a part of the steps; the first step below 1e-10; the
factor of a step in the second half, less 1; and the time of optimizer.step(). A run that grows by
1e6 is stopped as diverged.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import spectral_dist

SEED, DIVERGED, TARGET = 42, 1e6, 1e-10


def start(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Uniform in [-1, 1), drawn in float32."""
    return nn.Parameter(torch.empty(shape).uniform_(-1.0, 1.0).to(dtype))


class Quadratic(nn.Module):
    """f(X) - f* of f = 1/2 ||A X B - C||_F^2, without the rounding of f and f*.

    A (p, m), X (m, n), B (n, q), C (p, q). With A = Q L, B^T = P R^T and the minimiser X*, it is
    1/2 ||L (X - X*) R||_F^2, which has the same gradient.
    """

    def __init__(self, p: int = 1000, m: int = 500, n: int = 100, q: int = 250) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        a, b, c = (torch.randn(shape).double() for shape in ((p, m), (n, q), (p, q)))
        torch.manual_seed(SEED)
        self.x = start(m, n, dtype=torch.float64)
        self.data = a, b, c
        self.left = torch.linalg.qr(a).R
        self.right = torch.linalg.qr(b.mT).R.mT.contiguous()
        left_solved = torch.linalg.lstsq(a, c).solution
        self.solution = torch.linalg.lstsq(b.mT, left_solved.mT).solution.mT.contiguous()

    def forward(self) -> Tensor:
        """f(X) - f*."""
        return (self.left @ (self.x - self.solution) @ self.right).square().sum() / 2

    whole = forward

    def curvature(self) -> tuple[float, float]:
        """L, the largest eigenvalue of the Hessian, and its condition number."""
        left, right = map(torch.linalg.svdvals, (self.left, self.right))
        largest = (left[0] * right[0]).item() ** 2
        return largest, largest / (left[-1] * right[-1]).item() ** 2

    def theory(self) -> tuple[float, float]:
        """The paper's learning rate 1 / (L r), and the factor 1 - 1 / (r^2 kappa) of a step."""
        (largest, kappa), rank = self.curvature(), min(self.x.shape)
        return 1 / (largest * rank), 1 - 1 / (rank**2 * kappa)

    def describe(self) -> str:
        """What theory needs to know of it."""
        a, b, c = self.data
        least = ((a @ self.solution @ b - c).square().sum() / 2).item()
        (largest, kappa), (lr, factor) = self.curvature(), self.theory()
        return (
            f"f* = {least:.6g}, f(X0) - f* = {self.whole().item():.4g}, L = {largest:.4g},"
            f" kappa_H = {kappa:.4g}; theory: lr 1/(L r) = {lr:.3g}, factor per step at most"
            f" 1 - {1 - factor:.3g}"
        )


class Logistic(nn.Module):
    """Sum of log(1 + exp(-C * (A X B))) over a batch of rows; ``whole``: of all rows.

    A (rows, m), X (m, n), B (n, q), C (rows, q) of -1 and 1.
    """

    def __init__(
        self, rows: int = 10000, m: int = 1000, n: int = 100, q: int = 400, batch: int = 1000
    ) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.a, self.b = torch.randn(rows, m), torch.randn(n, q)
        self.c = 2.0 * (torch.randn(rows, q) > 0.5) - 1.0
        torch.manual_seed(SEED)
        self.x = start(m, n, dtype=torch.float32)
        self.batch = batch
        self.generator = torch.Generator().manual_seed(SEED)

    def _sum(self, a: Tensor, c: Tensor) -> Tensor:
        return nn.functional.softplus(-c * (a @ self.x @ self.b)).sum()

    def forward(self) -> Tensor:
        """Of the next batch, the same for every optimizer."""
        rows = torch.randint(len(self.a), (self.batch,), generator=self.generator)
        return self._sum(self.a[rows], self.c[rows])

    def whole(self) -> Tensor:
        """Of all rows."""
        return self._sum(self.a, self.c)

    def describe(self) -> str:
        """Where it starts, per label."""
        return f"f(X0) = {self.whole().item() / self.c.numel():.4g} per label"


class Completion(nn.Module):
    """Mean square of X Y^T - M over the entries that are seen; X (m, r), Y (n, r), M of rank r."""

    def __init__(self, m: int = 500, n: int = 250, rank: int = 5, seen: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.target = torch.randn(m, rank).double() @ torch.randn(n, rank).double().mT
        self.mask = (torch.rand(m, n) < seen).double()
        torch.manual_seed(SEED)
        self.x, self.y = (start(rows, rank, dtype=torch.float64) for rows in (m, n))

    def forward(self) -> Tensor:
        """Over the seen entries."""
        wrong = self.mask * (self.x @ self.y.mT - self.target)
        return wrong.square().sum() / self.mask.sum()

    whole = forward

    def describe(self) -> str:
        """Where it starts."""
        return f"f(X0, Y0) = {self.whole().item():.4g}, least possible 0"


@dataclass(frozen=True)
class PolarGradContender:
    """An optimizer with its settings; ``lr`` None: the theory's. ``decay``: StepLR(25, decay)."""

    name: str
    lr: float | None
    kind: str = "PolarGrad"
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: float = 1.0

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Of all the model's parameters, each a matrix."""
        lr = model.theory()[0] if self.lr is None else self.lr  # type: ignore[operator]
        if self.kind == "Adam":
            return torch.optim.Adam(model.parameters(), lr=lr)
        with contextlib.redirect_stderr(io.StringIO()):  # the table of what is a matrix
            groups = spectral_dist.param_groups(model, matrices=[".*"])
        return getattr(spectral_dist, self.kind)(groups, lr=lr, weight_decay=0.0, **self.options)


@dataclass(frozen=True)
class Problem:
    """A problem, how long it runs, how often it is measured, and who tries it."""

    model: Callable[[], nn.Module]
    steps: int
    every: int
    label: str
    contenders: tuple[PolarGradContender, ...]


def polar_grad(
    name: str, lr: float | None, momentum: float = 0.0, polar: str = "qdwh", **more: Any
) -> PolarGradContender:
    """PolarGrad; ``more``: polar_first, decay."""
    decay = more.pop("decay", 1.0)
    options = {"polar": polar, "momentum": momentum, **more}
    return PolarGradContender(f"PolarGrad {polar}{name}", lr, "PolarGrad", options, decay)


def muon(lr: float, polar: str = "jordan", decay: float = 1.0) -> PolarGradContender:
    """Muon with Nesterov momentum .95, unscaled."""
    name = f"Muon {polar}" + ", StepLR" * (decay != 1.0)
    return PolarGradContender(name, lr, "Muon", {"polar": polar, "scale": "none"}, decay)


def adam(lr: float) -> PolarGradContender:
    """torch's."""
    return PolarGradContender("Adam", lr, "Adam")


PROBLEMS = {
    "quadratic": Problem(Quadratic, 4000, 10, "f - f*", (
        polar_grad("", 4e-8),
        polar_grad("", 3e-8, polar="zolo"),
        polar_grad(", StepLR", 4.75e-8, decay=0.99),
        polar_grad(" *", 3e-8),
        polar_grad(" *", 3.2e-8),
        polar_grad(", StepLR *", 3.4e-8, decay=0.99),
        polar_grad(", 1/(L r) *", None),
        polar_grad(", momentum first .9", 2e-7, 0.9),
        polar_grad(", polar first .95", 4e-7, 0.95, polar_first=True),
        muon(0.1),
        muon(0.1, "qdwh"),
        muon(0.05, "qdwh", decay=0.99),
        adam(0.05),
    )),
    "logistic": Problem(Logistic, 1500, 25, "f", (
        polar_grad("", 1.5e-7),
        polar_grad(", StepLR", 2.5e-7, decay=0.95),
        polar_grad(", momentum first .9", 2.5e-7, 0.9),
        polar_grad(", polar first .95", 2.5e-7, 0.95, polar_first=True),
        muon(0.1),
        muon(0.2, "qdwh", decay=0.95),
        adam(0.005),
    )),
    "completion": Problem(Completion, 1000, 5, "f", (
        polar_grad("", 15.0),
        polar_grad(", momentum first .5", 50.0, 0.5),
        polar_grad(", polar first .5", 100.0, 0.5, polar_first=True),
        polar_grad(", polar first .5 *", 50.0, 0.5, polar_first=True),
        muon(0.25),
        muon(0.25, "qdwh", decay=0.95),
        adam(0.05),
    )),
}  # fmt: skip


@dataclass
class Curve:
    """What one run gave: step -> value; milliseconds per step, optimizer's own part."""

    values: dict[int, float] = field(default_factory=dict)
    milliseconds: float = math.nan
    diverged: int | None = None

    def relative(self, step: int) -> float:
        """At the last measurement up to ``step``, over the first."""
        return self.values[max(s for s in self.values if s <= step)] / self.values[0]

    def below(self, target: float) -> int | None:
        """The first measured step below ``target`` of the first value."""
        return next((s for s, v in self.values.items() if v < target * self.values[0]), None)

    def factor(self) -> float:
        """Per step, over the second half."""
        last = max(self.values)
        half = max(s for s in self.values if s <= last / 2)
        return (self.values[last] / self.values[half]) ** (1 / max(1, last - half))


def run(model: nn.Module, contender: PolarGradContender, steps: int, every: int) -> Curve:
    """Minimise; measured every so many steps and at the end."""
    optimizer = contender.build(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 25, contender.decay)
    curve, spent = Curve(), 0.0
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            with torch.no_grad():
                value = model.whole().item()  # type: ignore[operator]
            if not value < DIVERGED * curve.values.get(0, math.inf):
                curve.diverged = step
                break
            curve.values[step] = value
        if step < steps:
            optimizer.zero_grad()
            model().backward()
            begin = time.perf_counter()
            optimizer.step()
            spent += time.perf_counter() - begin
            scheduler.step()
    curve.milliseconds = 1e3 * spent / max(1, step)
    return curve


def line(contender: PolarGradContender, model: nn.Module, curve: Curve, steps: int) -> str:
    """Its row of the table."""
    lr = model.theory()[0] if contender.lr is None else contender.lr  # type: ignore[operator]
    head = f"| {contender.name} | {lr:.3g}"
    if curve.diverged is not None:
        return f"{head} | diverged by step {curve.diverged} | | | | | {curve.milliseconds:.1f} |"
    parts = [curve.relative(s) for s in (steps // 10, steps // 4, steps // 2, steps)]
    cells = [f"{part:.2e}" for part in parts]
    below = curve.below(TARGET)
    factor = f"{curve.factor() - 1:+.1e}"
    return f"{head} | {' | '.join(cells)} | {below or '-'} | {factor} | {curve.milliseconds:.1f} |"


def solve(name: str, problem: Problem, steps: int) -> dict[str, Curve]:
    """Run every contender and print the table."""
    print(f"\n{name}: {problem.model().describe()}\n")  # type: ignore[operator]
    heads = [f"step {s}" for s in (steps // 10, steps // 4, steps // 2, steps)]
    print(f"| optimizer | lr | {' | '.join(heads)} | below {TARGET:.0e} | factor - 1 | ms |")
    print("|---|--:" + "|--:" * 7 + "|", flush=True)
    curves = {}
    for contender in problem.contenders:
        model = problem.model()
        curve = run(model, contender, steps, problem.every)
        curves[f"{contender.name} ({contender.lr or model.theory()[0]:.3g})"] = curve  # type: ignore[operator]
        print(line(contender, model, curve, steps), flush=True)
    return curves


def draw(found: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """One panel for each problem."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, len(found), figsize=(6.5 * len(found), 8), squeeze=False)
    for axis, (name, curves) in zip(axes[0], found.items(), strict=True):
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors[::2] + plt.get_cmap("Dark2").colors)
        for label, curve in curves.items():
            style = {"P": "-", "M": "--", "A": ":"}[label[0]]
            steps: Sequence[int] = list(curve.values)
            axis.semilogy(steps, [curve.relative(s) for s in steps], style, label=label, lw=1.4)
        axis.set(title=name, xlabel="step", ylabel=f"{PROBLEMS[name].label}, over its first value")
        lowest = min(value for c in curves.values() for value in map(c.relative, c.values))
        axis.set_ylim(max(lowest / 2, 1e-20), 10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    problem: Annotated[str, typer.Option(help=f"all, or of {', '.join(PROBLEMS)}")] = "all",
    steps: Annotated[int, typer.Option(help="0: the public number")] = 0,
    out: Annotated[Path | None, typer.Option(help="write the curves to this PNG")] = None,
) -> None:
    """Solve, print a table per problem, and plot."""
    names = list(PROBLEMS) if problem == "all" else problem.split(",")
    if unknown := set(names) - set(PROBLEMS):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(PROBLEMS)}")
    found = {name: solve(name, PROBLEMS[name], steps or PROBLEMS[name].steps) for name in names}
    if out is not None:
        draw(found, out)
        print(f"\ncurves: {out}")


if __name__ == "__main__":
    typer.run(main)

"""One rank of a job: ``python -m benchmarks.peers.job SPEC RANK``; ``__main__`` starts them."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.dispatched_traffic import DispatchedTraffic
from benchmarks.peers.models import VOCABULARY, form
from tests.support.memory.live import Live

SHORT, LONG = 33, 193
"""Tokens of iterations, and of those that are compared with one process: more than the matrices
have columns, or Newton-Schulz would blow up rounding where gradients are zero."""
T = TypeVar("T")
POLAR: Counter[str] = Counter()
"""Matrices that peers' functions have orthogonalized on this rank."""


@dataclass
class Job:
    """What ranks do together.

    Attributes:
        cases: layouts and forms of models, all of one kit.
        scale: of the models' layers.
        seconds: of timing a case; 0: none.
        names: of contenders; empty: all.
        folder: of the ranks' files; references of one process are kept there, too.
    """

    ranks: int
    cases: list[tuple[str, str]]
    folder: str
    paths: list[str] = field(default_factory=list)
    scale: int = 1
    seconds: float = 0
    tiny: bool = False
    names: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it for the ranks."""
        path.write_text(json.dumps(asdict(self)))


def together(function: Callable[[], T]) -> tuple[T | None, str]:
    """Return the function's result, and the error of the lowest rank that had one, or ""."""
    found, error = None, ""
    try:
        found = function()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return found, next(filter(None, errors), "")


def count(place: str) -> None:
    """Make a function or method ("module:name") count the matrices that it gets."""
    module, name = place.split(":")
    holder: Any = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    original = getattr(holder, name)
    if getattr(original, "counts", False):
        return

    def counted(*args: Any, **kwargs: Any) -> Any:
        given = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        POLAR["all"] += given.shape[:-2].numel()
        return original(*args, **kwargs)

    counted.counts = True  # type: ignore[attr-defined]
    setattr(holder, name, counted)


def observe(runner: Any, tokens: Tensor, reference: Path) -> dict[str, Any]:
    """Take some iterations that are not timed, and return what is exact of them."""
    before = runner.whole()
    for _ in range(2):  # the second has a momentum
        runner.iterate(tokens)
    error = difference(before, runner.whole(), reference)
    tokens = tokens[:SHORT]
    POLAR.clear()
    own = runner.own_polar()
    with DispatchedTraffic() as traffic:
        runner.iterate(tokens)
    polar = POLAR.total() + runner.own_polar() - own
    with Live() as whole:
        in_step = Live()
        runner.iterate(tokens, in_step)
    return {
        "sent": traffic.bytes.total(), "calls": traffic.calls.total(),
        "by call": dict(traffic.bytes), "polar": polar, "error": error,
        "state": runner.state_bytes(), "peak step": in_step.peak, "peak": whole.peak,
    }  # fmt: skip


def difference(
    before: dict[str, Tensor], after: dict[str, Tensor], reference: Path
) -> float | None:
    """Return the largest difference of the update from one process's, over that one's RMS.

    One process writes the reference; None: there is none.
    """
    if dist.get_world_size() == 1:
        torch.save(after, reference)
        return 0.0
    if not reference.exists():
        return None
    expected, worst = torch.load(reference), 0.0
    for name, matrix in after.items():
        size = (expected[name] - before[name]).square().mean().sqrt()
        worst = max(worst, ((matrix - expected[name]).abs().max() / size).item())
    return worst


def in_turns(runners: dict[str, Any], tokens: Tensor, seconds: float) -> dict[str, Any]:
    """Return each contender's seconds of iterations and of steps, all in turns."""
    names = list(runners)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    begin, elapsed, turn = time.monotonic(), torch.zeros(()), 0
    while turn < 3 or elapsed.item() < seconds:
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            times[name].append(runners[name].iterate(tokens))
        elapsed, turn = torch.tensor(time.monotonic() - begin), turn + 1
        dist.broadcast(elapsed, 0)
    return times


def kit(layout: str) -> tuple[Any, dict[str, Any]]:
    """Return the class of runners of a layout, and its contenders by name."""
    if layout.startswith("zero"):
        from benchmarks.peers import zero  # patches torch: in processes of its own

        return zero.ZeroRunner, {n: c for n, c in zero.CONTENDERS.items() if layout in c.layouts}
    from benchmarks.peers import contenders, runners

    found = {n: c for n, c in contenders.CONTENDERS.items() if layout in c.layouts}
    return runners.TorchRunner, found


def run_case(job: Job, layout: str, model: str) -> list[dict[str, Any]]:
    """Return the rows of a layout and a model, of this rank."""
    if layout == "megatron":
        from benchmarks.peers import tensor_parallel

        return tensor_parallel.run(job)
    runner_class, contenders = kit(layout)
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (LONG,))
    rows, runners = [], {}
    for name, contender in contenders.items():
        if job.names and name not in job.names:
            continue
        row = {"layout": layout, "model": model, "scale": job.scale, "name": name, "failed": ""}
        rows.append(row)
        package = contender.package
        if package and importlib.util.find_spec(package) is None:
            row["failed"] = f"no package {package}"
            continue
        if contender.polar:
            count(contender.polar)
        size = form(model, job.scale, job.tiny)
        runner, row["failed"] = together(partial(runner_class, name, layout, size))
        if row["failed"]:
            continue
        reference = Path(job.folder, f"{layout} {model} {job.scale} {name}.pt")
        found, row["failed"] = together(partial(observe, runner, tokens, reference))
        if not row["failed"]:
            row |= found
            runners[name] = runner
    if job.seconds:
        times = in_turns(runners, tokens[:SHORT], job.seconds)
        for row in rows:
            row["times"] = times.get(row["name"], [])
    return rows


def main(spec: str, rank: int) -> None:
    """Do all cases of the job, and write the rows of this rank."""
    job = Job(**json.loads(Path(spec).read_text()))
    sys.path += job.paths
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.ranks))
    store = f"file://{spec}.store"
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", store, rank=rank, world_size=job.ranks, timeout=wait)
    rows: list[dict[str, Any]] = []
    for layout, model in job.cases:
        rows += run_case(job, layout, model)
    Path(f"{spec}.{rank}").write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

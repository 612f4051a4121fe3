"""A misuse on one rank is an error on all, at once, after which everything is as it was.

Functions that are given to ``expect`` run on ranks that stay alive, and end with the error that
they have examined.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from spectral_dist.monitor import Monitor
from tests.support import harness, together
from tests.support.together import (
    BEFORE,
    BIAS,
    LAYOUTS,
    MATRIX,
    OptimizedModel,
    expect,
    plain_steps,
    quiet,
)

TIMES = [(True, 0), (True, BEFORE), (False, 0)]
"""(check_finite, good steps before): without the check, ranks ask each other in the first step."""


class Misuse(NamedTuple):
    """What is done wrong between backward and step, what mends it, and what is said.

    ``first``: what is said in the first step, if that is something else.
    """

    do: Callable[[OptimizedModel], Any]
    says: str
    mend: Callable[[OptimizedModel], Any] = lambda trial: None
    first: str = ""


def drop(*names: str) -> Callable[[OptimizedModel], None]:
    """Take gradients away on rank 1: those of ``names``, or all."""

    def do(trial: OptimizedModel) -> None:
        for name, p in trial.model.named_parameters():
            if trial.rank == 1 and (not names or name.removeprefix("module.") in names):
                p.grad = None

    return do


def spoil(trial: OptimizedModel, ranks: tuple[int, ...] = (0,)) -> None:
    if trial.rank in ranks:
        together.local(trial.parameter(MATRIX).grad)[1, 2] = math.nan


def write(name: str, value: Any, ranks: tuple[int, ...] = (1,)) -> Callable[[OptimizedModel], None]:
    """As a scheduler would, into the first group."""

    def do(trial: OptimizedModel) -> None:
        if trial.rank in ranks:
            trial.optimizer.param_groups[0][name] = value

    return do


def observe(trial: OptimizedModel) -> None:
    if trial.rank == 1:
        trial.optimizer.observers.append(lambda names, matrices: None)


def unobserve(trial: OptimizedModel) -> None:
    trial.optimizer.observers.clear()


def watch_differently(trial: OptimizedModel) -> None:
    trial.optimizer.monitor = Monitor(2 + trial.rank, [])


def watch_alike(trial: OptimizedModel) -> None:
    trial.optimizer.monitor = Monitor(2, [])


def written(name: str, value: Any, usual: Any) -> Misuse:
    says, first = f"{name} is {value!r}", f"`{name} {usual!r}` on rank 0 but `{name} {value!r}`"
    return Misuse(write(name, value), says, write(name, usual), first)


def differing(name: str, value: Any, usual: Any) -> Misuse:
    """A value that is good, on rank 1 alone."""
    says = f"{name} of the group of {MATRIX} is {usual!r} on rank 0, but {value!r} on rank 1"
    return written(name, value, usual)._replace(says=says)


MISUSES = {
    "another lr": differing("lr", 0.01, 0.02),
    "another decay": differing("weight_decay", 0.5, 0.1),
    "another momentum": differing("momentum", 0.9, 0.95),
    "no gradient": Misuse(drop(), "no parameter has a gradient on rank 1"),
    "none of a matrix": Misuse(drop(MATRIX), f"{MATRIX} has no gradient on rank 1"),
    "none of a bias": Misuse(drop(BIAS), f"{BIAS} has no gradient on rank 1"),
    "monitors": Misuse(watch_differently, "the monitor's every is 2 on one", watch_alike),
    "lr NaN": written("lr", math.nan, 0.02),
    "lr < 0": written("lr", -1.0, 0.02),
    "lr in words": written("lr", "1e-3", 0.02),
    "momentum 1": written("momentum", 1.0, 0.95),
    "lr NaN everywhere": Misuse(
        write("lr", math.nan, (0, 1)), "lr is nan", write("lr", 0.02, (0, 1))
    ),
}
OBSERVER = Misuse(observe, "strategy='owner'", unobserve)
NAN = Misuse(spoil, f"the gradient of {MATRIX} is NaN or infinite")


def misused(layout: str, name: str, check_finite: bool, before: int, **options: Any) -> None:
    """Good steps, the misuse, and good steps again: as if it had not been."""
    misuse = {**MISUSES, "NaN": NAN, "an observer": OBSERVER}[name]
    says = misuse.says if before else misuse.first or misuse.says
    options["check_finite"] = check_finite
    with quiet():
        trial = plain_steps(layout, before, **options)
        trial.backward(before)
        misuse.do(trial)
        error = together.expect_failure(trial, says, trial.optimizer.step)
        misuse.mend(trial)
        for number in range(before, before + 2):
            trial.step(number)
        wanted = plain_steps(layout, before + 2, **options)
    assert together.same(trial.weights(), wanted.weights())
    assert together.same(trial.states(), wanted.states())
    raise error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MISUSES)
@pytest.mark.parametrize(("check_finite", "before"), TIMES)
def test_a_step(layout: str, name: str, check_finite: bool, before: int) -> None:
    """Both matrices and what AdamW trains are bitwise those of a run without the misuse."""
    misuse = MISUSES[name]
    says = misuse.says if before else misuse.first or misuse.says
    expect(says, misused, layout, name, check_finite, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_every_rank_finds_by_itself(layout: str) -> None:
    """A bad option on all ranks, later and without check_finite, where nobody is asked."""
    expect("lr is nan", misused, layout, "lr NaN everywhere", False, BEFORE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("before", [0, BEFORE])
def test_nan_on_one_rank(layout: str, before: int) -> None:
    expect("NaN or infinite", misused, layout, "NaN", True, before)


@pytest.mark.parametrize(("check_finite", "before"), TIMES)
def test_an_observer_where_matrices_are_in_slabs(check_finite: bool, before: int) -> None:
    args = ("fsdp", "an observer", check_finite, before)
    expect("strategy='owner'", misused, *args, strategy="gram")


@pytest.mark.parametrize("kind", ["SUMO", "NorMuon", "ROOT", "PolarGrad"])
def test_state_of_matrices_is_left_alone(kind: str) -> None:
    for layout in LAYOUTS:
        for name in ("no gradient", "NaN", "lr < 0"):
            expect("", misused, layout, name, True, BEFORE, kind=kind)


# -- no rank has a gradient: the first step says so, later ones are batches that were skipped


def without_gradients(layout: str, check_finite: bool) -> None:
    trial = OptimizedModel(layout, check_finite=check_finite)
    says = "no parameter has a gradient; call backward()"
    error = together.expect_failure(trial, says, trial.optimizer.step)
    trial.step(0)
    assert together.same(trial.weights(), plain_steps(layout, 1).weights())
    raise error


def skipping(layout: str, check_finite: bool) -> None:
    with quiet():
        trial = plain_steps(layout, BEFORE, check_finite=check_finite)
        trial.optimizer.zero_grad()
        weights, states = trial.weights(), trial.states()
    with pytest.warns(UserWarning, match="a gradient, so|no gradient, so"):
        trial.optimizer.step()
    together.assert_kept(trial, weights, states)
    with quiet():
        trial.step(BEFORE)
    wanted = plain_steps(layout, BEFORE + 1, check_finite=check_finite)
    assert together.same(trial.weights(), wanted.weights())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("check_finite", [True, False])
def test_no_gradient_anywhere(layout: str, check_finite: bool) -> None:
    """As in Lightning, where a training_step that returns None skips its batch."""
    expect("call backward() before step()", without_gradients, layout, check_finite)
    harness.run(2, skipping, layout, check_finite)


# -- what is called in a step, and raises: the step has been taken, on every rank


def raising(layout: str, what: str, check_finite: bool, before: int) -> None:
    def fail(*args: Any) -> None:
        raise OSError("the disk is full")

    with quiet():
        trial = OptimizedModel(layout, check_finite=check_finite, strategy="owner")
        for number in range(before):
            trial.step(number)
        trial.backward(before)
        if what == "sink":
            trial.optimizer.monitor = Monitor(1, [fail]) if trial.rank == 0 else None
        elif trial.rank == 1:
            trial.optimizer.observers.append(fail)
        act = trial.optimizer.step
        error = together.expect_failure(trial, "the disk is full", act, keeps=False)
        trial.optimizer.observers.clear()
        if trial.optimizer.monitor:
            trial.optimizer.monitor.sinks.clear()
        trial.step(before + 1)
        wanted = plain_steps(layout, before + 2, check_finite=check_finite, strategy="owner")
    assert together.same(trial.weights(), wanted.weights())
    raise error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["sink", "observer"])
@pytest.mark.parametrize(("check_finite", "before"), TIMES)
def test_what_is_called_raises(layout: str, what: str, check_finite: bool, before: int) -> None:
    expect("the disk is full (on rank ", raising, layout, what, check_finite, before)


def watched(layout: str, ranks: tuple[int, ...], check_finite: bool, before: int) -> Any:
    """(reports, calls, bytes) of a monitor on some ranks, set after some steps."""
    seen: list[Any] = []
    with quiet():
        trial = OptimizedModel(layout, check_finite=check_finite)
        for number in range(before + 3):
            if number == before and trial.rank in ranks:
                write = [lambda step, report: seen.append((step, report))]
                trial.optimizer.monitor = Monitor(2, write)
            trial.step(number)
    meter = trial.optimizer.meter
    return seen, meter.calls, meter.bytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("check_finite", "before"), TIMES)
def test_a_monitor_on_rank_0_alone(layout: str, check_finite: bool, before: int) -> None:
    """Gives the report, and costs what it does, on every rank as if all had one."""
    alone = harness.run(2, watched, layout, (0,), check_finite, before)
    everywhere = harness.run(2, watched, layout, (0, 1), check_finite, before)
    assert alone == everywhere
    assert [step for step, _ in alone[0][0]] == [n for n in (2, 4) if before < n <= before + 3]
    assert alone[0][1] == alone[1][1]


def too_late(layout: str, what: str) -> None:
    """Without check_finite nobody is asked about a monitor that is set later: it has no effect."""
    seen: list[Any] = []
    with quiet():
        trial = plain_steps(layout, BEFORE, check_finite=False)
    if trial.rank == 0 and what == "monitor":
        trial.optimizer.monitor = Monitor(1, [lambda step, report: seen.append(step)])
    elif trial.rank == 0:
        trial.optimizer.observers.append(lambda names, matrices: seen.append(names))
    trial.backward(BEFORE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trial.optimizer.step()
        trial.step(BEFORE + 1)
    texts = [str(w.message) for w in said if "has no effect" in str(w.message)]
    assert len(texts) == (trial.rank == 0)
    assert not seen
    wanted = plain_steps(layout, BEFORE + 2, check_finite=False)
    assert together.same(trial.weights(), wanted.weights())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["monitor", "observer"])
def test_a_monitor_that_nobody_was_asked_about(layout: str, what: str) -> None:
    harness.run(2, too_late, layout, what)


# -- exact factors of what is not finite: nobody waits, and that matrix alone is NaN everywhere


def poisoned(layout: str, kind: str, options: dict[str, Any], whole: bool) -> None:
    with quiet():
        trial = plain_steps(layout, 1, kind=kind, check_finite=False, **options)
        trial.backward(1)
        # gradients are equal on all ranks of DistributedDataParallel, and cut under FSDP2
        spoil(trial, (0, 1) if layout == "ddp" else (0,))
        trial.optimizer.step()
        trial.backward(2)
    for name, weight in trial.weights().items():
        if name.removeprefix("module.") != MATRIX:
            assert weight.isfinite().all(), name
        else:
            assert weight.isnan().any()
            assert weight.isnan().all() or not whole
    trial.optimizer.step()
    assert together.told("") == ["", ""]


EXACT = {
    "svd": ("Muon", {"polar": "svd"}),
    "eigh": ("Muon", {"polar": "eigh"}),
    "qdwh": ("Muon", {"polar": "qdwh"}),
    "zolo": ("Muon", {"polar": "zolo"}),
    "one_sided": ("Muon", {"routing": {"one_sided": [MATRIX]}}),
    "PolarGrad": ("PolarGrad", {}),
    "ROOT": ("ROOT", {}),
    "SUMO": ("SUMO", {}),
    "SUMO by svd": ("SUMO", {"basis": "svd", "rank": 2}),
    "SUMO of full rank": ("SUMO", {"rank": 6}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXACT)
def test_exact_factors_of_nan(layout: str, name: str) -> None:
    kind, options = EXACT[name]
    harness.run(2, poisoned, layout, kind, options, True)


@pytest.mark.parametrize("name", ["eigh", "SUMO", "SUMO of full rank"])
def test_exact_factors_of_nan_in_slabs(name: str) -> None:
    kind, options = EXACT[name]
    harness.run(2, poisoned, "fsdp", kind, {**options, "strategy": "gram"}, True)

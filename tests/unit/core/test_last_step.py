"""A step that a GPU skips: nothing has changed, and the next call raises the error on every rank.

The host reads the flag a step later on GPUs alone; here ``LATER_ON`` says that CPUs are such.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import spectral_dist
from spectral_dist import checkpoint
from spectral_dist.core import agreement, finite
from spectral_dist.monitor import Monitor
from spectral_dist.rules import adamw, elementwise
from spectral_dist.rules.base import Rule
from tests.support import harness, together
from tests.support.together import BEFORE, BIAS, MATRIX, OptimizedModel, plain_steps, quiet
from tests.unit.core.test_together import MISUSES, NAN

KINDS = ("Muon", "PolarGrad", "ROOT", "SUMO", "NorMuon")
SKIPPED = "in the last step, which was not applied: "


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read flags a step later on CPUs, too."""
    monkeypatch.setattr(finite, "LATER_ON", ("cpu",))


def on_device(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the states that lie on the device: the host's counts run ahead until it looks."""
    return {name: value for name, value in states.items() if not name.endswith(" step")}


def train(
    kind: str,
    steps: range,
    bad: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> OptimizedModel:
    """Take steps in one process; step ``bad`` has a gradient with NaN, and is tried again."""
    model = together.plain().to(dtype)
    trial = OptimizedModel.__new__(OptimizedModel)
    trial.model, trial.rank = model, 0
    if kind == "POET":
        spectral_dist.poet.convert(model, blocks={"^1$": (2, 2), "^3$": (2, 2)})
    trial.build(kind, **options)
    for number in steps:
        if number == bad:
            fail(trial, number)
        trial.step(number)
    return trial


def fail(trial: OptimizedModel, number: int) -> None:
    """Take a step on NaN and the call after it, and assert that neither changes anything."""
    weights, states = trial.weights(), trial.states()
    trial.backward(number)
    p = next(p for p in trial.model.parameters() if p.requires_grad and p.ndim > 1)
    assert p.grad is not None
    p.grad[0, 0] = math.nan
    trial.optimizer.step()
    assert together.same(trial.weights(), weights)
    assert together.same(on_device(trial.states()), on_device(states))
    with pytest.raises(ValueError, match="the last step was not applied"):
        trial.optimizer.state_dict()
    trial.backward(number)
    with pytest.raises(ValueError, match=f"^{SKIPPED}the gradient of .* is NaN or infinite"):
        trial.optimizer.step()
    together.assert_kept(trial, weights, states)


@pytest.mark.parametrize("kind", [*KINDS, "POET"])
def test_a_skipped_step_changes_nothing(kind: str) -> None:
    """SUMO refreshes and POET merges in these steps; afterwards all is as it had not been."""
    options = {"SUMO": {"period": 2}, "POET": {"merge_every": 3}}.get(kind, {})
    failed = train(kind, range(5), bad=3, **options)
    wanted = train(kind, range(5), **options)
    assert together.same(failed.weights(), wanted.weights())
    assert together.same(failed.states(), wanted.states())


def test_a_merge_looks_first() -> None:
    """The step in which POET merges raises by itself: the merge is no part of what is skipped."""
    trial = train("POET", range(2), merge_every=3)
    trial.backward(2)
    p = next(p for p in trial.model.parameters() if p.requires_grad)
    assert p.grad is not None
    p.grad.fill_(math.inf)
    weights = trial.weights()
    with pytest.raises(ValueError, match=SKIPPED):
        trial.optimizer.step()
    assert together.same(trial.weights(), weights)
    trial.step(2)
    wanted = train("POET", range(3), merge_every=3)
    assert together.same(trial.weights(), wanted.weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "POET"])
def test_the_steps_are_those_of_the_host(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernels under a flag compute what foreach operators do, up to rounding."""
    results, worst = [], 0.0
    for places in (("cpu",), ()):
        monkeypatch.setattr(finite, "LATER_ON", places)
        trained = train(kind, range(4), dtype=dtype)
        results.append({name: value.double() for name, value in trained.weights().items()})
    start = {n: p.detach().double() for n, p in together.plain().to(dtype).named_parameters()}
    for name, value in results[0].items():
        wanted = results[1][name]
        change = wanted - start[name] if name in start else wanted  # skew parameters begin at 0
        worst = max(worst, float((value - wanted).norm() / change.norm().clamp_min(1e-6)))
    assert worst <= (1e-4 if dtype == torch.float32 else 0.05), worst


def test_the_last_step_of_all() -> None:
    trial = train("Muon", range(BEFORE))
    trial.optimizer.check_last_step()
    trial.backward(BEFORE)
    trial.parameter(BIAS).grad.fill_(math.inf)  # type: ignore[union-attr]
    trial.optimizer.step()
    with pytest.raises(ValueError, match=f"the gradient of {BIAS} is NaN or infinite"):
        trial.optimizer.check_last_step()
    trial.optimizer.check_last_step()  # it is said once


def test_a_bad_option_of_one_process_is_told_at_once() -> None:
    trial = train("Muon", range(BEFORE))
    trial.backward(BEFORE)
    trial.optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr is -1\.0"):
        trial.optimizer.step()


def test_a_loaded_state_replaces_what_was_skipped() -> None:
    trial = train("Muon", range(BEFORE))
    saved = trial.optimizer.state_dict()
    trial.backward(BEFORE)
    trial.parameter(MATRIX).grad.fill_(math.nan)  # type: ignore[union-attr]
    trial.optimizer.step()
    trial.optimizer.load_state_dict(saved)
    trial.step(BEFORE)


def test_a_rule_with_its_own_update_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Rule):  # type: ignore[type-arg]
        def accumulate(self, options, momenta, grads):  # type: ignore[no-untyped-def]
            """Have no flag."""

    assert not Own().can_skip()
    trial = train("Muon", range(BEFORE))
    monkeypatch.setattr(type(trial.optimizer.rule), "can_skip", lambda self: False)
    trial.backward(BEFORE)
    trial.parameter(MATRIX).grad.fill_(math.nan)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^the gradient of"):
        trial.optimizer.step()


def test_the_monitor_is_told_of_the_step_itself() -> None:
    trial = train("Muon", range(BEFORE))
    rows: list[object] = []
    trial.optimizer.monitor = Monitor(1, [lambda step, report: rows.append(step)])
    for number in range(BEFORE, BEFORE + 3):
        trial.step(number)
    assert rows == [BEFORE + 2, BEFORE + 3]  # of the first step that follows it the ranks knew late


def test_a_save_raises_the_steps_own_error(tmp_path: Path) -> None:
    trial = train("Muon", range(BEFORE))
    trial.backward(BEFORE)
    trial.parameter(MATRIX).grad.fill_(math.nan)  # type: ignore[union-attr]
    trial.optimizer.step()
    with pytest.raises(ValueError, match=f"{SKIPPED}the gradient of {MATRIX} is NaN"):
        checkpoint.save(tmp_path / "saved", trial.model, trial.optimizer)
    assert not (tmp_path / "saved").exists()


def test_a_skipped_step_that_nobody_explains_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = train("Muon", range(BEFORE))
    trial.backward(BEFORE)
    trial.parameter(MATRIX).grad.fill_(math.nan)  # type: ignore[union-attr]
    trial.optimizer.step()
    monkeypatch.setattr(agreement, "agree", lambda *arguments: None)
    with pytest.raises(ValueError, match=f"{SKIPPED}ranks differ in which"):
        trial.optimizer.check_last_step()


@pytest.mark.parametrize("skipped", [False, True])
def test_adamw_under_a_flag_counts_for_each_parameter(skipped: bool) -> None:
    """One has taken 5 steps, the other none; a skipped step changes all but the counts."""
    results = []
    for skip in (None, torch.tensor(float(skipped))):
        torch.manual_seed(0)
        weights, grads = torch.randn(2, 7).unbind(), torch.randn(2, 7).unbind()
        states = [adamw.new_state(w) for w in weights]
        states[0]["step"] += 5
        before = [w.clone() for w in weights]
        options = adamw.AdamWOptions((0.9, 0.95), 1e-8, 0.1)
        adamw.update(options, 0.1, weights, grads, states, skip)
        assert [float(s["step"]) for s in states] == [6.0, 1.0]
        results.append(before if skipped and skip is None else [*weights])
        if skip is not None and skipped:
            assert not any(s["exp_avg"].any() for s in states)
    for value, wanted in zip(*results, strict=True):
        tolerance = 0 if skipped else 1e-6
        torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rates", [[0.1, 0.3, 0.1], [0.0, 0.2, 0.0]])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_weights_under_a_flag(rates: list[float], decay: float) -> None:
    """W <- (1 - decay) W - rate D, for each weight with its rate, and nothing if skipped."""
    torch.manual_seed(0)
    weights, directions = torch.randn(3, 9), torch.randn(3, 9)
    wanted = (1 - decay) * weights - torch.tensor(rates)[:, None] * directions
    for skipped in (False, True):
        changed = weights.clone()
        elementwise.decay_and_subtract_(
            changed.unbind(), directions.unbind(), rates, decay, torch.tensor(float(skipped))
        )
        expected = weights if skipped else wanted
        torch.testing.assert_close(changed, expected, rtol=0, atol=0 if skipped else 1e-6)


# -- two ranks


def misused_later(layout: str, name: str, **options: object) -> None:
    """Good steps, the misuse in a step, the call that says so, and good steps again."""
    finite.LATER_ON = ("cpu",)
    try:
        misuse = {**MISUSES, "NaN": NAN}[name]
        with quiet():
            trial = plain_steps(layout, BEFORE, **options)
            weights, states = trial.weights(), trial.states()
            trial.backward(BEFORE)
            misuse.do(trial)
            trial.optimizer.step()
            assert together.same(trial.weights(), weights)
            assert together.same(on_device(trial.states()), on_device(states))
            misuse.mend(trial)
            trial.backward(BEFORE)
            with together.failing(SKIPPED):
                trial.optimizer.step()
            together.assert_kept(trial, weights, states)
            for number in range(BEFORE, BEFORE + 2):
                trial.step(number)
            wanted = plain_steps(layout, BEFORE + 2, **options)
        assert together.same(trial.weights(), wanted.weights())
        assert together.same(trial.states(), wanted.states())
    finally:
        finite.LATER_ON = ("cuda", "xpu")


@pytest.mark.parametrize("layout", together.LAYOUTS)
@pytest.mark.parametrize("name", sorted({*MISUSES, "NaN"} - {"monitors"}))
def test_what_one_rank_does_wrong(layout: str, name: str) -> None:
    harness.run(2, misused_later, layout, name)


@pytest.mark.parametrize("kind", ["SUMO", "NorMuon"])
def test_state_of_matrices_on_two_ranks(kind: str) -> None:
    harness.run(2, misused_later, "fsdp", "NaN", kind=kind)


def test_blocks_count_steps_by_themselves() -> None:
    harness.run(2, misused_later, "fsdp", "NaN", strategy="block", block_period=3)


def monitored_differently() -> None:
    """Set other periods on each rank, of which the ranks hear when the step is taken."""
    finite.LATER_ON = ("cpu",)
    try:
        with quiet():
            trial = plain_steps("ddp", BEFORE)
        trial.optimizer.monitor = Monitor(2 + trial.rank, [])
        trial.step(BEFORE)
        with together.failing("in the last step, which was applied: the monitor's every is 2"):
            trial.step(BEFORE + 1)
        assert together.same(trial.weights(), plain_steps("ddp", BEFORE + 1).weights())
    finally:
        finite.LATER_ON = ("cuda", "xpu")


def test_monitors_that_differ_are_told_after_the_step() -> None:
    harness.run(2, monitored_differently)


def monitored_on_one_rank() -> list[object]:
    finite.LATER_ON = ("cpu",)
    try:
        with quiet():
            trial = plain_steps("ddp", BEFORE)
        rows: list[object] = []
        if trial.rank == 0:
            trial.optimizer.monitor = Monitor(1, [lambda step, report: rows.append(step)])
        for number in range(BEFORE, BEFORE + 3):
            trial.step(number)
        return rows
    finally:
        finite.LATER_ON = ("cuda", "xpu")


def test_a_monitor_on_rank_0_alone() -> None:
    rows, others = harness.run(2, monitored_on_one_rank)
    assert len(rows) == 2
    assert not others

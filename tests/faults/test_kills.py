"""A run that is killed, or told to end, goes on as if it had not been: losses bit by bit."""

import functools
import signal
from collections.abc import Callable
from typing import Any

import pytest

from spectral_dist.launch.preemption import PREEMPTED
from tests.faults.trials import ENGINES, StruckJob

SAVES = ("--save-every", "2", "--resume", "auto")
Whole = Callable[[str], list[float]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The losses of two ranks of an engine that nobody disturbs."""
    trial = StruckJob(tmp_path_factory.mktemp("whole"))

    @functools.cache
    def losses(engine: str) -> list[float]:
        status, printed = trial.once(engine, *trial.options(engine), forked=True)
        assert status == 0, printed
        return trial.losses(engine)

    return losses


@pytest.mark.slow
def test_one_rank_is_told_to_end_and_all_come_back(trial: StruckJob) -> None:
    """Both ranks save after the same step; torchrun restarts them, and they go on."""
    options = (*trial.options("ddp"), "--resume", "auto")
    status, printed = trial.once("whole", *options)
    assert status == 0, printed
    fault = {"phase": "exchange", "step": 4, "ranks": [1], "number": signal.SIGTERM}
    status, printed = trial.once("parts", *options, restarts=1, fault=fault)
    assert status == 0, printed
    assert "stopped by a signal after step 4, which is saved" in printed
    assert "goes on from" in printed
    assert trial.losses("parts") == trial.losses("whole")
    assert trial.losses("parts", "validation") == trial.losses("whole", "validation")
    whole: dict[str, Any] = trial.summary("whole")
    parts: dict[str, Any] = trial.summary("parts")
    counts = ("step", "tokens", "matrices_orthogonalized", "optimizer_bytes_sent")
    assert [parts[name] for name in counts] == [whole[name] for name in counts]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("engine", ["ddp", "ds1"])
def test_each_signal_loses_no_step(trial: StruckJob, engine: str, number: int) -> None:
    """To one process, in the middle of a step, and where an evaluation is due."""
    options = (*trial.options(engine), "--resume", "auto")
    status, printed = trial.once("whole", *options, ranks=1)
    assert status == 0, printed
    for step in (2, 3):
        out = f"parts{step}"
        fault = {"phase": "exchange", "step": step, "ranks": [0], "number": number}
        status, printed = trial.once(out, *options, ranks=1, fault=fault)
        assert status == PREEMPTED, printed
        assert trial.latest(out) == f"step_{step:06d}"
        status, printed = trial.once(out, *options, ranks=1)
        assert status == 0, printed
        for part in ("train", "validation"):
            assert trial.losses(out, part) == trial.losses("whole", part)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "ranks"), [("shard", [1]), ("shard", [0, 1]), ("manifest", [0, 1]), ("latest", [0])]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_during_a_save(
    trial: StruckJob, whole: Whole, engine: str, phase: str, ranks: list[int]
) -> None:
    """`latest` names the checkpoint before; with all killed at once nobody cleans up."""
    options = (*trial.options(engine), *SAVES)
    fault = {"phase": phase, "step": 4, "ranks": ranks}
    status, printed = trial.once("parts", *options, fault=fault, forked=True)
    assert status != 0, printed
    assert trial.check("parts", whole(engine)) == 2
    status, printed = trial.once("parts", *options, forked=True)
    assert status == 0, printed
    assert "parts/checkpoints/step_000002" in printed
    assert trial.losses("parts") == whole(engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "ds1"])
@pytest.mark.parametrize(("phase", "step"), [("forward", 2), ("shard", 2), ("forward", 5)])
def test_torchrun_restarts_by_itself(
    trial: StruckJob, whole: Whole, engine: str, phase: str, step: int
) -> None:
    """Before the first checkpoint is whole, and after it."""
    options = (*trial.options(engine), *SAVES)
    fault = {"phase": phase, "step": step, "ranks": [1]}
    status, printed = trial.once("parts", *options, restarts=1, fault=fault)
    assert status == 0, printed
    said = "goes on from" if step > 2 else "ended before its first checkpoint: anew"
    assert said in printed
    assert trial.losses("parts") == whole(engine)


@pytest.mark.slow
def test_a_step_that_deepspeed_skips_is_told(trial: StruckJob) -> None:
    fault = {"phase": "nan", "step": 3, "ranks": [0]}
    status, printed = trial.once("run", *trial.options("ds1"), fault=fault, ranks=1)
    assert status == 0, printed
    assert "step 3 was skipped: a gradient is NaN or infinite (1 skipped so far)" in printed
    assert trial.summary("run")["skipped_steps"] == 1


@pytest.mark.slow
def test_a_kill_in_the_first_step_after_a_resume_keeps_the_metrics(trial: StruckJob) -> None:
    options = trial.options("ddp")
    trial.once("run", *options, "--stop-at", "3", ranks=1)
    before = (trial.folder / "run/metrics.jsonl").read_text()
    fault = {"phase": "forward", "step": 4, "ranks": [0]}
    status, printed = trial.once("run", *options, "--resume", ranks=1, fault=fault)
    assert status == -signal.SIGKILL, printed
    assert (trial.folder / "run/metrics.jsonl").read_text() == before

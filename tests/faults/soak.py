"""Chains of runs in one folder, each ended at a random instant: what is left goes on every time."""

from __future__ import annotations

import random
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spectral_dist.launch.preemption import PREEMPTED
from tests.faults.trials import LaunchedRun, StruckJob, send

STEPS = 24
SAVES = ("--resume", "auto", "--save-every", "1")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STARTS = {True: 3.0, False: 10.0}
"""Seconds in which a run begins to train, forked or not."""
TRAINS = {"megatron": 8.0}
"""Seconds in which it is struck then, if not 2: Megatron's first save starts a process."""
GOES_ON = re.compile(r"goes on from \S+/checkpoints/step_(\d+)")


@dataclass
class Chain:
    """An engine's runs: ended by ``blow`` until there were enough, each whole one compared."""

    trial: StruckJob
    engine: str
    chance: random.Random
    blow: Callable[[Chain], bool]
    count: int = 0  # of blows that are asked for
    counts: Counter[str] = field(default_factory=Counter)
    whole: int = 0  # runs that have come to their end
    step: int = 0  # of the checkpoint that is to be gone on from
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    @property
    def out(self) -> str:
        """The folder of the run in hand."""
        return f"parts{self.whole}"

    def start(self, **keys: Any) -> LaunchedRun:
        """Begin, or go on."""
        return self.trial.start(self.out, *self.trial.options(self.engine, STEPS), *SAVES, **keys)

    def undisturbed(self) -> None:
        """Learn what every run has to come to."""
        options = self.trial.options(self.engine, STEPS)
        status, printed = self.trial.once("whole", *options, forked=True)
        assert status == 0, printed
        self.losses = self.trial.losses("whole")
        self.validation = self.trial.losses("whole", "validation")
        assert len(self.losses) == STEPS

    def run(self, count: int) -> None:
        """Strike so often, and have the last run end by itself."""
        self.count = count
        self.undisturbed()
        while self.counts.total() < count:
            if not self.blow(self):
                self.ended()
        if (self.trial.folder / self.out).exists():
            status, printed = self.start(forked=True).finish()
            assert status == 0, printed
            self.went_on(printed)
            self.ended()
        print(f"{self.engine}: {dict(sorted(self.counts.items()))}, {self.whole} whole runs")

    def went_on(self, printed: str) -> None:
        """Assert that a run has begun where the one before it was saved."""
        begun = GOES_ON.search(printed)
        assert begun is None or int(begun[1]) == self.step, printed
        # there may be a first one that is not complete
        assert self.step == 0 or "damaged" not in printed, printed

    def waited(self, run: LaunchedRun, start: float) -> bool:
        """Let a run go on up to ``start`` seconds; 0: some seconds from when it trains.

        Returns:
            False: it has ended before.
        """
        if start == 0 and not run.until(run.training):
            return False
        return run.pause(self.chance.uniform(0.0, start or TRAINS.get(self.engine, 2.0)))

    def left(self) -> int:
        """Assert that what a run left can be gone on with."""
        step = self.trial.check(self.out, self.losses)
        assert step >= self.step, (step, self.step)
        self.step = step
        return step

    def ended(self) -> None:
        """Compare a whole run with the one that was not disturbed; the next is a new one."""
        assert self.trial.losses(self.out) == self.losses
        assert self.trial.losses(self.out, "validation") == self.validation
        assert self.trial.summary(self.out)["step"] == STEPS
        self.whole += 1
        self.step = 0


def kill(chain: Chain) -> bool:
    """SIGKILL to one rank or to the whole group, sometimes before the first step."""
    forked = chain.chance.random() < 0.9
    run = chain.start(forked=forked)
    one = chain.chance.random() < 0.5
    early = chain.chance.random() < 0.25
    struck = chain.waited(run, STARTS[forked] if early else 0.0)
    if struck and one:
        ranks = run.ranks()
        if ranks:
            send(chain.chance.choice(ranks), signal.SIGKILL)
        struck = bool(ranks)
    trained = run.training()
    if struck and not one:
        run.kill()
    status, printed = run.finish(90)
    chain.went_on(printed)
    if status == 0:
        return False
    assert status in ((1,) if one else (-signal.SIGKILL, 1)), printed
    assert struck, printed
    kind = "one rank" if one else "whole group"
    chain.counts[f"{kind}, {'training' if trained else 'starting'}"] += 1
    chain.left()
    return True


def preempt(chain: Chain) -> bool:
    """A signal to one rank, all ranks or torchrun: no step is lost, and the status is torchrun's.

    torchrun's own is 1, whichever of them was signalled.
    """
    run = chain.start(forked=chain.chance.random() < 0.5)
    to = chain.chance.choice(("one rank", "all ranks", "torchrun"))
    number = SIGNALS[chain.counts.total() % 3]
    started = chain.step
    if run.until(lambda: run.trained() > started) and run.pause(chain.chance.uniform(0.0, 1.0)):
        ranks = run.ranks()
        targets = {"one rank": ranks and [chain.chance.choice(ranks)], "all ranks": ranks}
        for pid in targets.get(to, [run.process.pid]):
            send(pid, number)
    status, printed = run.finish(90)
    chain.went_on(printed)
    if (run.out / "summary.json").exists():
        return False  # it was over before it saw the signal
    assert status == 1, printed
    said = re.search(r"stopped by a signal after step (\d+), which is saved", printed)
    assert said, printed
    assert chain.left() == int(said[1]) == run.trained(), printed
    if to != "torchrun":
        assert re.search(rf"exitcode\s*: {PREEMPTED}", printed), printed
    chain.counts[f"{number.name} to {to}"] += 1
    return True


def restart(chain: Chain) -> bool:
    """SIGKILL to one rank, again and again, under a torchrun that starts all of them anew."""
    most = min(4, chain.count - chain.counts.total())
    run = chain.start(forked=True, restarts=most)
    seen: set[int] = set()
    for _ in range(most):
        if not run.until(lambda seen=seen: len(set(run.ranks()) - seen) == 2):  # type: ignore[misc]
            break
        ranks = set(run.ranks())
        seen = seen | ranks
        path = run.out / "metrics.jsonl"
        run.before = path.stat().st_mtime_ns if path.exists() else 0
        if not chain.waited(run, STARTS[True] if chain.chance.random() < 0.4 else 0.0):
            break
        saved = (run.out / "checkpoints/latest").exists()
        send(chain.chance.choice(sorted(ranks)), signal.SIGKILL)
        chain.counts[f"{'after' if saved else 'before'} the first save"] += 1
    status, printed = run.finish()
    assert status == 0, printed
    assert chain.left() == STEPS
    return False

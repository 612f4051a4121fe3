"""Wrong configurations of launch/pretrain.py: each runs, or is one line that names the setting.

On every rank, with an exit status that is not 0, and without a hang.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.config_changes import ChangedRun
from tests.faults.config_fuzz import Verdict, base_of, bases, case_of, verdict
from tests.faults.forked_ranks import ForkedRanks
from tests.launch.jobs import LaunchedJob
from tests.support import megatron_cpu

LIMIT = 60.0
MEGATRON = megatron_cpu.VERSIONS[0]
BATCHES, EACH = 10, 100
FAST = 15
REPORT = os.environ.get("SPECTRAL_FUZZ_REPORT")
"""A file that gets a line of JSON for each case."""


class Runs:
    """Both kinds of processes that fork ranks: Megatron's changes what others would import."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = LaunchedJob(folder)
        self.plain = ForkedRanks(self.job)
        self.megatron = ForkedRanks(self.job, MEGATRON)

    def judge(self, case: ChangedRun) -> Verdict:
        """Run a case."""
        folder = self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        ranks = self.megatron if case.engine == "megatron" else self.plain
        arguments = case.write(folder, self.folder / "data")
        started = time.monotonic()
        endings = ranks.run(case.ranks, arguments, LIMIT, folder)
        result = verdict(case, endings, folder / "out")
        if REPORT:
            said = {**vars(result), "case": str(case), "number": case.number, "engine": case.engine}
            said |= {
                "seconds": time.monotonic() - started,
                "names": case.names,
                "printed": [e.printed[-3000:] for e in endings],
            }
            with Path(REPORT).open("a", encoding="utf-8") as file:
                file.write(json.dumps(said) + "\n")
        return result

    def end(self) -> None:
        """End the processes."""
        self.plain.end()
        self.megatron.end()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("fuzz"))
    yield runs
    runs.end()


def has_megatron() -> bool:
    return megatron_cpu.folder(MEGATRON).exists()


def judge_all(runs: Runs, cases: list[ChangedRun]) -> None:
    verdicts = [(case, runs.judge(case)) for case in cases]
    counts = collections.Counter(f"{case.engine}: {result.what}" for case, result in verdicts)
    print(dict(sorted(counts.items())))
    wrong = [f"{case}: {r.what}: {r.problem}: {r.line}" for case, r in verdicts if r.problem]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.slow
def test_a_few_in_one_process(runs: Runs) -> None:
    judge_all(runs, [case_of(number, megatron=False, ranks=1) for number in range(FAST)])


@pytest.mark.slow
def test_what_is_shipped_runs(runs: Runs) -> None:
    """Tiny, and before anything is changed in it."""
    cases = [base_of(*base) for base in bases() if base[0] != "megatron" or has_megatron()]
    for case in cases:
        assert runs.judge(case) == Verdict("ran"), case


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_thousand(runs: Runs, batch: int) -> None:
    """On two ranks, most of them."""
    numbers = range(batch * EACH, (batch + 1) * EACH)
    judge_all(runs, [case_of(number, has_megatron()) for number in numbers])

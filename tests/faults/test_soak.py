"""Random kills, signals and restarts, one after the other; ``--soak`` for hundreds of them."""

import random
from collections.abc import Callable

import pytest

from tests.faults.soak import Chain, kill, preempt, restart
from tests.faults.trials import ENGINES, StruckJob

KINDS: dict[str, tuple[Callable[[Chain], bool], int, int]] = {
    "kills": (kill, 4, 200),
    "preemptions": (preempt, 2, 20),
    "restarts": (restart, 2, 20),
}
"""What ends a run, how often for each engine, and with --soak how often for all of them."""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_goes_on(
    trial: StruckJob, engine: str, kind: str, request: pytest.FixtureRequest
) -> None:
    blow, count, total = KINDS[kind]
    if request.config.getoption("--soak"):
        place = ENGINES.index(engine)
        count = total * (place + 1) // len(ENGINES) - total * place // len(ENGINES)
    Chain(trial, engine, random.Random(f"{engine} {kind}"), blow).run(count)

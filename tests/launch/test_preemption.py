"""Signals that announce an end: noticed, timed, and at the second one obeyed at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from spectral_dist.launch import preemption
from spectral_dist.launch.preemption import SIGNALS, Preemption

# The file alone, so that it takes no seconds to import
ALONE = f"""
import os, runpy, signal, sys, time
module = runpy.run_path({preemption.__file__!r})
"""


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Let SIGINT end processes as in a terminal: shells ignore it for what stands before an &."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ended(body: str) -> tuple[int, str, float]:
    """Status, stderr, and seconds of a process in a call that no handler interrupts."""
    started = time.monotonic()
    command = [sys.executable, "-c", ALONE + body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr, time.monotonic() - started


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noticed(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption(30) as noticed:
        assert not noticed.requested
        os.kill(os.getpid(), number)
        until = time.monotonic() + 10
        while not noticed.requested and time.monotonic() < until:
            time.sleep(0.01)
        assert noticed.received == number
        os.kill(os.getpid(), number)  # at once: the same one, passed on by a launcher
        time.sleep(0.2)
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a job after &
    try:
        with Preemption(30) as noticed:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            assert not noticed.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_grace_is_over_though_the_process_hangs() -> None:
    status, said, seconds = ended("""
with module["Preemption"](1.5):
    signal.pthread_sigmask(signal.SIG_BLOCK, [])
    os.kill(os.getpid(), signal.SIGUSR1)
    while True:
        time.sleep(60)
""")
    assert status == 128 + signal.SIGUSR1
    assert "no checkpoint within --grace 1.5 seconds after SIGUSR1" in said
    assert 1.5 <= seconds < 20


def test_a_second_signal_ends_at_once() -> None:
    status, said, seconds = ended("""
with module["Preemption"](60):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.3)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
""")
    assert status == 128 + signal.SIGTERM
    assert "SIGINT after SIGTERM: ended without a checkpoint" in said
    assert seconds < 20


def test_what_a_forked_child_is_sent_is_for_it_alone() -> None:
    status, said, _ = ended("""
with module["Preemption"](60) as noticed:
    child = os.fork()
    if not child:
        time.sleep(60)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    time.sleep(0.3)
    assert not noticed.requested
""")
    assert status == 0, said


def test_no_signal_ends_what_is_saved() -> None:
    """As when a launcher, one of whose ranks has ended, signals the others again."""
    status, said, _ = ended("""
with module["Preemption"](1.2) as noticed:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    noticed.disarm()
    time.sleep(1.5)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.3)
    sys.exit(75)
""")
    assert (status, said) == (75, "")

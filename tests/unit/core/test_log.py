"""What the package logs is seen by default, and goes where a program's logging goes."""

import subprocess
import sys

BODY = """
import logging, sys
{before}
import torch, spectral_dist
spectral_dist.param_groups(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))
"""


def printed(before: str) -> str:
    """Return the stderr of a process that makes parameter groups."""
    command = [sys.executable, "-W", "ignore", "-c", BODY.format(before=before)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_the_table_is_on_stderr_where_nobody_has_configured_logging() -> None:
    assert printed("").startswith("spectral_dist: which parameters are matrices\n")


def test_a_program_that_configures_logging_gets_it_once_in_its_form() -> None:
    text = printed("logging.basicConfig(format='%(levelname)s %(name)s %(message)s')")
    assert text.startswith("INFO spectral_dist which parameters are matrices\n")
    assert text.count("which parameters") == 1


def test_a_program_may_silence_it() -> None:
    assert printed("logging.getLogger('spectral_dist').setLevel(logging.WARNING)") == ""

from pathlib import Path

import pytest

from tests.faults.trials import StruckJob


@pytest.fixture
def trial(tmp_path: Path) -> StruckJob:
    return StruckJob(tmp_path)

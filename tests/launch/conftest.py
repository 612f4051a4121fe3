from pathlib import Path

import pytest

from tests.launch.jobs import LaunchedJob


@pytest.fixture
def job(tmp_path: Path) -> LaunchedJob:
    return LaunchedJob(tmp_path)

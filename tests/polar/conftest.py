import sys
from pathlib import Path

import pytest
import torch

# so that `pytest` finds tests.reference just as `python -m pytest` does
sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def one_thread():
    """Rounding depends on the number of threads; and small matrices are faster with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

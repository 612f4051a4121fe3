import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Rounding depends on the number of threads; and small matrices are faster with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

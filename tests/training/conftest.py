"""Training runs on one thread."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The modules are so small that threads would wait for one another, most of all on busy cores;
    and a killed process and this one compute the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

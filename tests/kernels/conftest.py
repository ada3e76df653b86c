import pytest
import torch

from hebatron_kernels import testing


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is filled with NaN (or the largest integer): whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def checked(emulator):
    """The build that reports races, accesses out of bounds and undefined behaviour."""
    with testing.emulate(checked=True):
        yield

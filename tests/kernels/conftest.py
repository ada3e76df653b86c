import pytest
import torch

from hebatron_kernels import _native, testing


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is filled with NaN (or the largest integer): whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def emulator():
    """backend="emulator" in the tests of a module."""
    lacks = testing.emulator_lacks()
    if lacks is not None:
        pytest.skip(f"the emulator needs {lacks}")
    testing.load_emulator()
    yield
    _native.emulator_module = None


@pytest.fixture
def checked(emulator):
    """The build that reports races, accesses out of bounds and undefined behaviour."""
    with testing.emulate(checked=True):
        yield

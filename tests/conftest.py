import pytest
import torch

from hebatron_kernels import _native, testing

# One thread: the tests' tensors are small, so more threads only wait for one another, and results do not depend on the
# machine's cores. What depends on threads sets them itself.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def emulator():
    """backend="emulator" in the tests of a module."""
    lacks = testing.emulator_lacks()
    if lacks is not None:
        pytest.skip(f"the emulator needs {lacks}")
    testing.load_emulator()
    yield
    _native.emulator_module = None

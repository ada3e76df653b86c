import pytest
import torch

# One thread: the tests' tensors are small, so more threads only wait for one another, and results do not depend on the
# machine's cores. What depends on threads sets them itself.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed, whatever ran before it."""
    torch.manual_seed(0)

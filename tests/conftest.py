import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed, whatever ran before it."""
    torch.manual_seed(0)

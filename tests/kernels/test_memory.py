"""hebatron_kernels._memory: large results in memory that is used again."""

import pytest
import torch

from hebatron_kernels import _memory
from hebatron_kernels._memory import HUGE_PAGE, LARGE_BYTES, Blocks

LARGE = LARGE_BYTES // 4


@pytest.fixture(autouse=True)
def _not_filled():
    """The folder's tests have torch fill new memory, which keeps results out of blocks."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5000, LARGE - 1, LARGE, 2 * LARGE + 3])
def test_empty_is_what_was_asked_for(count, reuse):
    made = _memory.empty((count, 1), torch.float32, reuse)
    assert made.shape == (count, 1) and made.dtype == torch.float32 and made.is_contiguous()
    assert made.fill_(1.0).sum(dtype=torch.float64) == count
    assert made.data_ptr() % 64 == 0


def test_memory_in_use_is_never_handed_out():
    blocks = Blocks()
    first = blocks.empty((LARGE,), torch.float32).fill_(1)
    part = first[10:20]
    storage = blocks.empty((LARGE,), torch.float32).fill_(2).untyped_storage()
    del first
    third = blocks.empty((LARGE,), torch.float32).fill_(3)
    assert part.eq(1).all()
    assert torch.empty(0).set_(storage, 0, (LARGE,)).eq(2).all()
    assert third.eq(3).all()
    assert blocks.held_bytes() == 3 * LARGE_BYTES


def test_memory_is_used_again():
    blocks = Blocks()
    at = blocks.empty((LARGE,), torch.float32).data_ptr()
    for dtype in (torch.float32, torch.bfloat16):  # a freed tensor's memory serves any dtype
        made = blocks.empty((LARGE_BYTES // dtype.itemsize,), dtype)
        assert made.data_ptr() == at
        del made
    smaller = blocks.empty((LARGE - LARGE // 10,), torch.float32)
    assert smaller.data_ptr() == at
    assert blocks.empty((LARGE - LARGE // 10,), torch.float32).data_ptr() != at


def test_no_more_is_held_than_was_in_use_at_once():
    blocks = Blocks()
    for pages in range(4, 24):  # one at a time, each too large for the block before it or not
        blocks.empty((pages * HUGE_PAGE,), torch.uint8)
        assert blocks.held_bytes() <= pages * HUGE_PAGE
    together = [blocks.empty((pages * HUGE_PAGE,), torch.uint8) for pages in (4, 8, 16)]
    del together
    for pages in range(24, 4, -1):
        blocks.empty((pages * HUGE_PAGE,), torch.uint8)
        assert blocks.held_bytes() <= 28 * HUGE_PAGE


def test_deterministic_mode_fills_large_memory_too():
    torch.use_deterministic_algorithms(True)
    assert _memory.empty((LARGE,), torch.float32).isnan().all()


def test_results_of_the_kernels_live_in_blocks():
    before = _memory.blocks.held_bytes()
    result = _memory.empty((4 * LARGE,), torch.float32)
    assert _memory.blocks.held_bytes() >= max(before, 4 * LARGE_BYTES)
    del result

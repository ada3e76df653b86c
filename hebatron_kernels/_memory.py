"""Large memory for results and workspaces on the CPU, used again.

To have 428 MB from the system, one layer's gradients of 128 experts, took as long as to compute them: every page is
cleared at its first touch. Blocks are kept in huge pages, never more bytes than were in use at once at some time.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGE_BYTES = 2**23
HUGE_PAGE = 2**21
ANONYMOUS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)


def _references(held: list[Any], i: int) -> int:
    return sys.getrefcount(held[i])


UNSHARED = _references([object()], 0)  # the list's and what this Python counts of the call


class Blocks:
    """A tensor holds a reference to the block it was made from: one that nobody else refers to is free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[mmap.mmap] = []  # the longest unused first
        self._most_used = 0  # bytes at once

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // HUGE_PAGE) * HUGE_PAGE
        with self._lock:
            fitting = [i for i in self._free() if size <= len(self._blocks[i]) <= size + size // 4]
            block = self._blocks.pop(min(fitting, key=self._size)) if fitting else self._new(size)
            self._blocks.append(block)
            return torch.frombuffer(block, dtype=dtype, count=count).view(shape)

    def held_bytes(self) -> int:
        return sum(map(len, self._blocks))

    def _size(self, i: int) -> int:
        return len(self._blocks[i])

    def _free(self) -> list[int]:
        return [i for i in range(len(self._blocks)) if _references(self._blocks, i) == UNSHARED]

    def _new(self, size: int) -> mmap.mmap:
        free = self._free()
        held = self.held_bytes()
        self._most_used = max(self._most_used, held - sum(map(self._size, free)) + size)
        for i in free:
            if held + size <= self._most_used:
                break
            held -= self._size(i)
            self._blocks[i] = None  # type: ignore[call-overload]
        self._blocks = [block for block in self._blocks if block is not None]
        return huge_pages(size)


def huge_pages(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


blocks = Blocks()


def empty(shape: Sequence[int], dtype: torch.dtype, reuse: bool = True) -> Tensor:
    """torch.empty on the CPU, from 8 MiB on in huge pages, used before where `reuse` allows it; without, they go back
    to the system with the tensor."""
    count = math.prod(shape)
    large = count * dtype.itemsize >= LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")
    if not large or torch.are_deterministic_algorithms_enabled():  # torch fills what it hands out then
        return torch.empty(shape, dtype=dtype)
    if reuse:
        return blocks.empty(shape, dtype)
    return torch.frombuffer(huge_pages(count * dtype.itemsize), dtype=dtype, count=count).view(shape)

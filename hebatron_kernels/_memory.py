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


class Kept:
    """Memory for what stays and is read again and again, as packed matrices are. Below 8 MiB many share a block of huge
    pages, which is the system's again when the last of them is gone: in pages of 4 KB a decoded token's small matrices
    were read 5 % slower."""

    BLOCK = 2**24
    LEAST = 2**16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: mmap.mmap | None = None
        self._used = self.BLOCK

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // 64) * 64
        if size >= LARGE_BYTES:
            return torch.frombuffer(huge_pages(size), dtype=dtype, count=count).view(shape)
        with self._lock:
            if self._used + size > self.BLOCK:
                self._block, self._used = huge_pages(self.BLOCK), 0
            offset, self._used = self._used, self._used + size
            return torch.frombuffer(self._block, dtype=dtype, count=count, offset=offset).view(shape)


blocks, kept = Blocks(), Kept()


def empty(shape: Sequence[int], dtype: torch.dtype, reuse: bool = True) -> Tensor:
    """torch.empty on the CPU, from 8 MiB on in huge pages, used before where `reuse` allows it; without, it is for what
    stays (`Kept`) and goes back to the system with the tensor."""
    bytes_wanted = math.prod(shape) * dtype.itemsize
    large = bytes_wanted >= (LARGE_BYTES if reuse else Kept.LEAST) and hasattr(mmap, "MADV_HUGEPAGE")
    if not large or torch.are_deterministic_algorithms_enabled():  # torch fills what it hands out then
        return torch.empty(shape, dtype=dtype)
    return (blocks if reuse else kept).empty(shape, dtype)

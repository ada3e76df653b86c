"""What the layout cases of conformance.cu must give, in numpy, from the PTX manual's definitions: fragments, swizzle,
boxes and products. Nothing is shared with the emulator, so the two can be held against each other without a GPU.

`EXPECTED[case name]()` returns the case's bytes. Cases that are not here (barriers, tickets, ...) have no answer that
is easier than the kernel itself; hardware and emulator are compared on them all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
UNWRITTEN = 0xCD


def noise(seed: int, count: int) -> Words:
    """The stream of harness.h."""
    mask = np.uint64(0xFFFFFFFF)
    h = (np.arange(count, dtype=np.uint64) * 2654435761 + seed * 40503 + 1) & mask
    h ^= h >> np.uint64(15)
    h = (h * 2246822519) & mask
    h ^= h >> np.uint64(13)
    return h.astype(np.uint32)


def small(seed: int, count: int) -> NDArray[np.float32]:
    return (noise(seed, count) % 9).astype(np.float32) - 4


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Of values that bf16 holds exactly."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# Fragments of a warp: of an 8x8 matrix of 16-bit elements lane l holds row l / 4, columns 2 * (l % 4) and the next.


def _rows_of_16_bytes(words: Words, pitch_bytes: int = 48) -> NDArray[np.uint16]:
    return words.view(np.uint16).reshape(32, pitch_bytes // 2)[:, :8]


def ldmatrix() -> bytes:
    rows = _rows_of_16_bytes(noise(21, 32 * 12))
    found = []
    for matrices, transposed in ((4, False), (4, True), (2, False), (2, True)):
        for m in range(matrices):
            tile = rows[8 * m : 8 * m + 8]
            found.append((tile.T if transposed else tile).copy().view(np.uint32).reshape(32))
    return np.concatenate(found).tobytes()


def stmatrix() -> bytes:
    registers = noise(22, 4 * 32).reshape(4, 32)
    images = []
    for transposed in (False, True):
        image = np.full((32, 24), 0xFFFF, np.uint16)
        for m in range(4):
            tile = registers[m].copy().view(np.uint16).reshape(8, 8)
            image[8 * m : 8 * m + 8, :8] = tile.T if transposed else tile
        images.append(image)
    return np.stack(images).tobytes()


def fragment_a(registers: Words) -> NDArray[np.float32]:
    """(4 registers, 32 lanes) -> the 16 x 16 operand A: registers 0, 1 are rows 0-7 and 8-15 of the first 8 columns."""
    a = np.empty((16, 16), np.float32)
    for r in range(4):
        quarter = bf16_values(registers[r].copy().view(np.uint16)).reshape(8, 8)
        a[8 * (r % 2) : 8 * (r % 2) + 8, 8 * (r // 2) : 8 * (r // 2) + 8] = quarter
    return a


def accumulator(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(registers, 32 lanes) -> 16 rows: every four registers hold 8 columns, two of row l / 4, two of that row + 8."""
    registers = values.shape[0]
    out = np.empty((16, 2 * registers), np.float32)
    for r in range(registers):
        row, column = 8 * (r // 2 % 2), 8 * (r // 4) + r % 2
        out[row : row + 8, column : column + 8 : 2] = values[r].reshape(8, 4)
    return out


def registers_of(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of accumulator."""
    count = matrix.shape[1] // 2
    out = np.empty((count, 32), np.float32)
    for r in range(count):
        row, column = 8 * (r // 2 % 2), 8 * (r // 4) + r % 2
        out[r] = matrix[row : row + 8, column : column + 8 : 2].reshape(32)
    return out


def mma() -> bytes:
    a = bf16_bits(small(23, 4 * 4 * 64)).view(np.uint32).reshape(4, 4, 32)
    b = bf16_bits(small(24, 4 * 2 * 64)).view(np.uint32).reshape(4, 2, 32)
    d = accumulator(small(25, 128).reshape(4, 32))
    for step in range(4):
        # B is 16 x 8 by columns: lane l holds column l / 4, two rows from 2 * (l % 4), eight further in register 1
        columns = np.concatenate(
            [bf16_values(b[step, r].copy().view(np.uint16)).reshape(8, 8) for r in range(2)], axis=1
        )
        d += fragment_a(a[step]) @ columns.T
    return registers_of(d).tobytes()


# The tensor copy engine


def swizzle_128(offset: NDArray[np.int64]) -> NDArray[np.int64]:
    """The 16-byte chunk's number (bits 4-6) xor the row's number in its atom of 8 (bits 7-9)."""
    return offset ^ ((offset >> 7 & 7) << 4)


class Tensor:
    """dims and box are (x, y[, z]) as in tma.cuh; slices lie dims[1] rows of `pitch` bytes apart."""

    def __init__(self, element: int, swizzled: bool, dims: Sequence[int], pitch: int, box: Sequence[int]):
        self.element, self.swizzled, self.pitch = element, swizzled, pitch
        self.dims, self.box = (*dims, 1)[:3], (*box, 1)[:3]
        self.bytes = pitch * self.dims[1] * self.dims[2]
        self.box_bytes = element * self.box[0] * self.box[1] * self.box[2]

    def places(self, corner: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each byte of the box inside the tensor: where it lies in shared memory, and where in the tensor."""
        z, y, x = np.meshgrid(*(np.arange(n) for n in reversed(self.box)), indexing="ij")
        inside = np.ones(x.shape, bool)
        for offset, start, size in zip((x, y, z), corner, self.dims):
            inside &= (offset + start >= 0) & (offset + start < size)
        shared = ((z * self.box[1] + y) * self.box[0] + x)[inside] * self.element
        row = ((z + corner[2]) * self.dims[1] + y + corner[1])[inside]
        device = row * self.pitch + (x + corner[0])[inside] * self.element
        step = np.arange(self.element)
        shared, device = (shared[:, None] + step).ravel(), (device[:, None] + step).ravel()
        return (swizzle_128(shared) if self.swizzled else shared), device

    def load(self, data: NDArray[np.uint8], corner: Sequence[int]) -> NDArray[np.uint8]:
        box = np.zeros(self.box_bytes, np.uint8)
        shared, device = self.places(corner)
        box[shared] = data[device]
        return box

    def store(self, data: NDArray[np.uint8], corner: Sequence[int], box: NDArray[np.uint8]) -> None:
        shared, device = self.places(corner)
        data[device] = box[shared]


def matrix_bf16(swizzled: bool) -> Tensor:
    return Tensor(2, swizzled, (72, 37), 144, (64, 16) if swizzled else (24, 5))


def matrix_f32(swizzled: bool) -> Tensor:
    return Tensor(4, swizzled, (40, 20), 176, (32, 8))


STACK = Tensor(2, True, (72, 20, 3), 144, (64, 8, 2))
BF16_CORNERS = [(0, 0, 0), (8, 30, 0), (-8, -5, 0), (40, 3, 0), (80, 0, 0), (0, 37, 0)]
F32_CORNERS = [(0, 0, 0), (16, 15, 0), (-4, -1, 0), (39, 19, 0)]
STACK_CORNERS = [(0, 0, 0), (8, 16, 1), (64, -3, 2), (0, 4, -1), (0, 0, 3)]


def loads(tensor: Tensor, corners: Sequence[Sequence[int]], seed: int) -> bytes:
    data = noise(seed, tensor.bytes // 4).view(np.uint8)
    return b"".join(tensor.load(data, corner).tobytes() for corner in corners)


def heads(heads_apart: bool) -> bytes:
    """Boxes of 16 tokens of one head's 64 elements; the tensor begins 16 bytes into its memory."""
    memory = noise(57, 4 + 3 * 21 * 64).view(np.uint16)[8:]
    rows = memory.reshape(3, 21, 128) if heads_apart else memory.reshape(21, 3, 128).swapaxes(0, 1)
    found = []
    for x, head, token in ((0, 0, 0), (64, 2, 3), (64, 1, 10), (0, 2, 21)):
        box = np.zeros((16, 64), np.uint16)
        there = rows[head, token : token + 16, x : x + 64]
        box[: len(there)] = there
        image = np.empty(box.nbytes, np.uint8)
        image[swizzle_128(np.arange(box.nbytes))] = box.view(np.uint8).reshape(-1)
        found.append(image)
    return np.concatenate(found).tobytes()


def multicast(tensor: Tensor, corners: Sequence[Sequence[int]], cluster: int) -> bytes:
    data = noise(45, tensor.bytes // 4).view(np.uint8)
    nothing = np.full(tensor.box_bytes, 0xFF, np.uint8)
    found = []
    for block in range(2 * cluster):
        first, second = (tensor.load(data, corners[block // cluster + i]) for i in range(2))
        found += [first, second if block % cluster % 2 == 0 else nothing]
    return np.concatenate(found).tobytes()


def stores(tensor: Tensor, corners: Sequence[Sequence[int]], seed: int) -> bytes:
    data = np.full(tensor.bytes, UNWRITTEN, np.uint8)
    boxes = noise(seed, 4 * tensor.box_bytes // 4).view(np.uint8).reshape(4, -1)
    for corner, box in zip(corners, boxes):
        tensor.store(data, corner, box)
    return data.tobytes()


def apart(tensor: Tensor) -> list[tuple[int, int, int]]:
    left = -8 if tensor.element == 2 else -4
    return [(0, 0, 0), (tensor.box[0], 0, 0), (left, 2 * tensor.box[1], 0), (tensor.dims[0], 0, 0)]


def additions(tensor: Tensor, corners: Sequence[Sequence[int]], seed: int, blocks: int) -> bytes:
    count = len(corners) * tensor.box_bytes // tensor.element
    values, start = small(seed, count), small(seed + 1, tensor.bytes // tensor.element)
    boxes, total = values.reshape(len(corners), -1), start.copy()
    for corner, box in zip(corners, boxes):
        shared, device = (p[:: tensor.element] // tensor.element for p in tensor.places(corner))
        np.add.at(total, device, blocks * box[shared])
    return (total if tensor.element == 4 else bf16_bits(total)).tobytes()


# wgmma


def _k_major(tile: NDArray[np.uint16], rows: int) -> NDArray[np.float32]:
    """(rows, 64) of a tile whose rows are M or N: 128 bytes of K each."""
    at = np.arange(rows)[:, None] * 128 + np.arange(64) * 2
    return bf16_values(tile[swizzle_128(at) // 2])


def _mn_major(tile: NDArray[np.uint16], rows: int) -> NDArray[np.float32]:
    """(rows, 64) of a tile whose rows are K: 64 of M or N each, groups of 64 lie 8,192 bytes apart."""
    r, k = np.arange(rows)[:, None], np.arange(64)
    at = r // 64 * 8192 + k * 128 + r % 64 * 2
    return bf16_values(tile[swizzle_128(at) // 2])


def _tile(seed: int, rows: int, transposed: bool) -> NDArray[np.float32]:
    count = (-(-rows // 64) * 64 if transposed else rows) * 64
    tile = bf16_bits(small(seed, count))
    return _mn_major(tile, rows) if transposed else _k_major(tile, rows)


def warpgroup_registers(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """64 rows, 16 a warp -> (registers, 128 threads)."""
    return np.concatenate([registers_of(matrix[16 * w : 16 * w + 16]) for w in range(4)], axis=1)


def warpgroup_matrix(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([accumulator(values[:, 32 * w : 32 * w + 32]) for w in range(4)])


def _both_starts(product: NDArray[np.float32], seed: int) -> bytes:
    start = warpgroup_matrix(small(seed, product.shape[1] // 2 * 128).reshape(-1, 128))
    return b"".join(warpgroup_registers(begin + product).tobytes() for begin in (start, np.zeros_like(start)))


def wgmma_ss(n: int, transposed_a: bool, transposed_b: bool) -> bytes:
    return _both_starts(_tile(70, 64, transposed_a) @ _tile(71, n, transposed_b).T, 72)


def wgmma_rs(n: int, transposed_b: bool) -> bytes:
    words = bf16_bits(small(73, 4 * 4 * 128 * 2)).view(np.uint32).reshape(4, 4, 128)
    steps = [
        np.concatenate([fragment_a(words[k][:, 32 * w : 32 * w + 32]) for w in range(4)]) for k in range(4)
    ]
    return _both_starts(np.concatenate(steps, axis=1) @ _tile(74, n, transposed_b).T, 75)


def wgmma_two_groups() -> bytes:
    a, b = _tile(76, 64, False), _tile(77, 64, False)
    start = small(78, 64 * 128).reshape(2, 32, 128)
    products = (a @ b.T, a[:, :32] @ b[:, :32].T)
    return b"".join(warpgroup_registers(warpgroup_matrix(s) + p).tobytes() for s, p in zip(start, products))


def wgmma_gathered_ring() -> bytes:
    rounds, tile = 48, 64 * 64
    a, b = (bf16_bits(small(seed, rounds * tile)).reshape(rounds, tile) for seed in (80, 81))
    total = sum(_k_major(x, 64) @ _k_major(y, 64).T for x, y in zip(a, b))
    return 2 * warpgroup_registers(total).tobytes()


# Registers


def registers(threads: int, held: int) -> bytes:
    """The first warpgroup stores one value a thread, the others all they hold."""
    found = np.full(held * threads * 4, UNWRITTEN, np.uint8).view(np.float32).reshape(held, threads)
    values = small(9, held * threads).reshape(held, threads)
    found[0] = values[0]
    found[:, 128:] = values[:, 128:]
    return found.tobytes()


WGMMA_N = (8, 16, 32, 64, 96, 104, 112, 128, 160, 176, 192, 208, 224, 232, 256)
EXPECTED: dict[str, Callable[[], bytes]] = {
    "ldmatrix": ldmatrix,
    "stmatrix": stmatrix,
    "mma": mma,
    "tma_load_bf16_swizzle": partial(loads, matrix_bf16(True), BF16_CORNERS, 40),
    "tma_load_bf16": partial(loads, matrix_bf16(False), BF16_CORNERS, 41),
    "tma_load_f32_swizzle": partial(loads, matrix_f32(True), F32_CORNERS, 42),
    "tma_load_f32": partial(loads, matrix_f32(False), F32_CORNERS, 43),
    "tma_load_3d": partial(loads, STACK, STACK_CORNERS, 44),
    "tma_load_heads": partial(heads, False),
    "tma_load_heads_apart": partial(heads, True),
    "tma_fresh_thread": partial(loads, STACK, STACK_CORNERS, 58),
    "tma_multicast_2d_cluster2": partial(multicast, matrix_bf16(True), BF16_CORNERS, 2),
    "tma_multicast_2d_cluster4": partial(multicast, matrix_bf16(True), BF16_CORNERS, 4),
    "tma_multicast_3d_cluster2": partial(multicast, STACK, STACK_CORNERS, 2),
    "tma_store_bf16_swizzle": partial(stores, matrix_bf16(True), apart(matrix_bf16(True)), 46),
    "tma_store_bf16": partial(stores, matrix_bf16(False), apart(matrix_bf16(False)), 47),
    "tma_store_f32": partial(stores, matrix_f32(False), apart(matrix_f32(False)), 48),
    "tma_store_3d": partial(stores, STACK, STACK_CORNERS[:3], 49),
    "tma_add_f32": partial(additions, matrix_f32(False), F32_CORNERS, 50, 3),
    "tma_add_bf16_swizzle": partial(additions, matrix_bf16(True), BF16_CORNERS, 52, 2),
    "wgmma_two_groups": wgmma_two_groups,
    "wgmma_high": partial(wgmma_ss, 64, False, False),
    "wgmma_gathered_ring": wgmma_gathered_ring,
    "registers_384": partial(registers, 384, 208),
    "registers_512": partial(registers, 512, 136),
    **{
        f"wgmma_ss_{n}_{'km'[a]}{'kn'[b]}": partial(wgmma_ss, n, bool(a), bool(b))
        for n in WGMMA_N
        for a in (0, 1)
        for b in (0, 1)
    },
    **{f"wgmma_rs_{n}_{'kn'[b]}": partial(wgmma_rs, n, bool(b)) for n in WGMMA_N for b in (0, 1)},
}

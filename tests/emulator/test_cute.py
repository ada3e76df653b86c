"""The emulator's fragments, swizzle and descriptors against CuTe's layouts, element by element."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulator_cases import HERE, Library
from numpy.typing import NDArray

ROOT = HERE.parents[1]
Bits = NDArray[np.uint16]


class Cute:
    """CuTe's answers, by cases/cute_oracle.cpp."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))

    def fragment(self, name: str, rows: int, n: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The row and column of each (thread, value)."""
        out = np.full(128 * 128, -1, np.int32)
        count = self._library.fragment(name.encode(), n, out.ctypes)
        assert count > 0
        table = out[:count].reshape(32 if name.startswith("mma") else 128, -1)
        return table % rows, table // rows

    def tile(self, rows: int, mn_major: bool) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
        """Where element (row, k) of a rows x 64 tile lies, and the descriptors of its four slices of 16 k."""
        offsets, starts = np.full(rows * 64, -1, np.int32), np.full(4, -1, np.int32)
        descriptors = np.zeros(4, np.uint64)
        assert self._library.tile(rows, int(mn_major), offsets.ctypes, descriptors.ctypes, starts.ctypes)
        descriptors = (descriptors & ~np.uint64(0x3FFF)) + (starts >> 4).astype(np.uint64)
        return offsets.reshape(rows, 64), descriptors


def first_folder(marker: str, folders: list[str | None]) -> Path | None:
    return next((Path(f) for f in folders if f and (Path(f) / marker).exists()), None)


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> Cute:
    cutlass = first_folder(
        "cute/tensor.hpp",
        [os.environ.get("HEBATRON_CUTLASS_DIR"), str(ROOT / "third_party/cutlass/include")]
        + [f"{os.environ.get('HEBATRON_CUTLASS_DIR', '')}/include", str(ROOT / "third_party/cutlass")],
    )
    if cutlass is None:
        pytest.skip("CuTe needs CUTLASS's headers: bench/fetch_cutlass.sh, or HEBATRON_CUTLASS_DIR")
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parents[1]) if nvcc else None]
    homes += ["/usr/local/cuda", *map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True))]
    cuda = first_folder("include/cuda_bf16.h", homes)
    if cuda is None:
        pytest.skip("CuTe needs CUDA's headers: no include/cuda_bf16.h in CUDA_HOME or beside nvcc")
    includes = [f"-I{cutlass}", f"-I{cuda}/include", f"-I{cuda}/include/cccl"]
    path = tmp_path_factory.mktemp("cute") / "libcute_oracle.so"
    command = ["g++", "-std=c++17", "-O0", "-w", "-DNDEBUG", "-shared", "-fPIC", *includes]
    subprocess.run([*command, str(HERE / "cases" / "cute_oracle.cpp"), "-o", str(path)], check=True)
    return Cute(path)


def integers(seed: int, *shape: int) -> NDArray[np.float32]:
    """Small enough that sums of products are exact."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def bits(values: NDArray[np.float32]) -> Bits:
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


class Product(ctypes.Structure):
    """struct Product of cases/layouts.cu."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("n", "mn_major_a", "mn_major_b")),
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        *((name, ctypes.c_int) for name in ("bytes_a", "bytes_b")),
        *((name, ctypes.c_void_p) for name in ("a_registers", "descriptors_a", "descriptors_b", "d")),
    ]


def image(values: NDArray[np.float32], offsets: NDArray[np.int32]) -> Bits:
    """The tile's elements where CuTe puts them; each place holds one."""
    out = np.zeros(values.size, np.uint16)
    assert np.array_equal(np.sort(offsets.ravel()), np.arange(values.size))
    out[offsets] = bits(values)
    return out


def multiply(emulator: Library, cute: Cute, n: int, mn_a: bool | None, mn_b: bool) -> None:
    """mn_a None: A comes from registers."""
    a, b = integers(1, 64, 64), integers(2, n, 64)
    registers = np.zeros((4, 128, 8), np.uint16)
    offsets_b, descriptors_b = cute.tile(n, mn_b)
    image_b, d = image(b, offsets_b), np.full((128, n // 2), np.nan, np.float32)
    p = Product(n=n, mn_major_a=bool(mn_a), mn_major_b=mn_b, b=image_b.ctypes.data, bytes_b=image_b.nbytes)
    p.descriptors_b, p.d = descriptors_b.ctypes.data, d.ctypes.data
    if mn_a is None:
        row, k = cute.fragment("wgmma_a", 64)
        for step in range(4):
            registers[step] = bits(a[row, step * 16 + k])
        p.a_registers = registers.ctypes.data
    else:
        offsets_a, descriptors_a = cute.tile(64, mn_a)
        image_a = image(a, offsets_a)
        p.a, p.bytes_a, p.descriptors_a = image_a.ctypes.data, image_a.nbytes, descriptors_a.ctypes.data
    assert emulator.function("layout_wgmma", ctypes.c_void_p)(ctypes.addressof(p)) is None
    row, column = cute.fragment("wgmma_d", 64, n)
    np.testing.assert_array_equal(d, (a @ b.T)[row, column])


@pytest.mark.parametrize("n", [8, 64, 128, 208, 256])
@pytest.mark.parametrize("mn_a", [False, True, None], ids=["a_k_major", "a_mn_major", "a_registers"])
def test_wgmma_matches_cute_k_major_b(plain: Library, cute: Cute, n: int, mn_a: bool | None) -> None:
    multiply(plain, cute, n, mn_a, mn_b=False)


@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("mn_a", [False, True, None], ids=["a_k_major", "a_mn_major", "a_registers"])
def test_wgmma_matches_cute_mn_major_b(plain: Library, cute: Cute, n: int, mn_a: bool | None) -> None:
    """The groups of 64 rows lie 1,024 bytes apart and the groups of 8 k behind them all: the leading and the stride
    distance of the descriptor are not those of the conformance cases."""
    multiply(plain, cute, n, mn_a, mn_b=True)


def test_mma_matches_cute(plain: Library, cute: Cute) -> None:
    a, b, d = integers(3, 16, 16), integers(4, 8, 16), np.full((32, 4), np.nan, np.float32)
    registers_a, registers_b = bits(a[cute.fragment("mma_a", 16)]), bits(b[cute.fragment("mma_b", 8)])
    pointers = (registers_a.ctypes.data, registers_b.ctypes.data, d.ctypes.data)
    assert plain.function("layout_mma", *[ctypes.c_void_p] * 3)(*pointers) is None
    np.testing.assert_array_equal(d, (a @ b.T)[cute.fragment("mma_c", 16)])

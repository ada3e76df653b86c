"""compute-sanitizer's four tools over every kernel at small shapes, each in a process of its own. Without torch, but
for the Triton kernels, which launch through it: each tensor is one allocation there, torch computes one sum only.

    python bench/gpu_sanitize.py [--seconds 80] [--events FILE]
    python bench/gpu_sanitize.py --kernel norm       what runs inside a tool: one kernel's cases, compared with numpy
    python bench/gpu_sanitize.py --kernel norm --stand-in emulator     the same on the emulator's checked build
    TRITON_INTERPRET=1 python bench/gpu_sanitize.py --kernel ssd/triton --stand-in interpreter

Memory comes from the driver, one allocation a tensor: torch's allocator would hide accesses beyond a tensor's end, and
its own kernels would fill the report. Shapes are ragged and small: a tool slows a kernel down a hundredfold.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from gpu_sanitize_attention import CASES as ATTENTION
from gpu_sanitize_gemm import FORMS, grouped_cases
from gpu_sanitize_moe import CASES as MOE
from gpu_sanitize_ssd import CASES as SSD
from gpu_sanitize_triton import CASES as TRITON
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
CASES = MOE | ATTENTION | SSD
KERNELS = ("norm", *FORMS, *CASES, *TRITON)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERROR_EXIT = 86
PARALLEL = 12  # of 16 cores: most of a run is the tool's own start
LONGEST_S = 60.0  # of one run: a kernel that hangs under a tool keeps no other from its turn
Floats = NDArray[np.float32]


# Memory and module: the GPU's, or the emulator's


class Card:
    """Device memory through the driver, in the primary context, which the module's own runtime uses too."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        found = list((ROOT / "hebatron_kernels").glob("_cuda.*.so"))
        if not found:
            raise FileNotFoundError(
                "hebatron_kernels holds no _cuda module: HEBATRON_CUDA=on pip install -e ."
            )
        spec = importlib.util.spec_from_file_location("_cuda", found[0])
        assert spec is not None and spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    def kernels(self) -> list[str]:
        return [kernel for kernel in KERNELS if kernel in self.module.kernels()]

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: CUDA driver error {status}")

    def empty(self, size: int) -> int:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return pointer.value

    def put(self, values: NDArray[Any]) -> int:
        values = np.ascontiguousarray(values)
        pointer = self.empty(values.nbytes)
        if values.nbytes:
            self._call(
                "cuMemcpyHtoD_v2",
                ctypes.c_uint64(pointer),
                values.ctypes.data_as(ctypes.c_void_p),
                values.nbytes,
            )
        return pointer

    def get(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        found = np.empty(shape, dtype)
        size = ctypes.c_size_t(found.nbytes)
        self._call("cuCtxSynchronize")
        self._call("cuMemcpyDtoH_v2", found.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(pointer), size)
        return found


class Emulator:
    """The checked build on host memory, where a kernel may touch what was allocated and nothing else."""

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT))
        from hebatron_kernels import _native, testing

        testing.load_emulator(checked=True)
        assert _native.emulator_module is not None
        self.module = _native.emulator_module
        self.kept: dict[int, NDArray[np.uint8]] = {}

    def kernels(self) -> list[str]:
        return [kernel for kernel in KERNELS if not kernel.startswith("cutlass")]

    def empty(self, size: int) -> int:
        block = np.full(max(size, 1) + 256, 0xFF, np.uint8)
        pointer = (block.ctypes.data + 255) // 256 * 256
        self.kept[pointer] = block
        self.module.allow_memory(pointer, max(size, 1), f"tensor {len(self.kept)}")
        return pointer

    def put(self, values: NDArray[Any]) -> int:
        values = np.ascontiguousarray(values)  # named: its address alone would not keep a copy
        pointer = self.empty(values.nbytes)
        ctypes.memmove(pointer, values.ctypes.data, values.nbytes)
        return pointer

    def get(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        found = np.empty(shape, dtype)
        ctypes.memmove(found.ctypes.data, pointer, found.nbytes)
        return found


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Runner:
    """Tensors in the dtype of a case, calls with their workspace, results compared."""

    def __init__(self, card: Card | Emulator, dtype: str) -> None:
        self.card, self.dtype = card, dtype
        self.storage: Any = np.uint16 if dtype == "bfloat16" else np.float32

    def rounded(self, values: Floats) -> Floats:
        return from_bf16(to_bf16(values)) if self.dtype == "bfloat16" else values.astype(np.float32)

    def put(self, values: Floats) -> int:
        return self.card.put(to_bf16(values) if self.dtype == "bfloat16" else values.astype(np.float32))

    def output(self, *shape: int) -> int:
        return self.card.empty(int(np.prod(shape)) * np.dtype(self.storage).itemsize)

    def call(self, op: str, **keywords: Any) -> None:
        size = getattr(self.card.module, f"{op}_workspace")(**keywords)
        workspace = self.card.empty(size) if size else 0
        function = getattr(self.card.module, op)
        function(**keywords, device=0, stream=0, workspace=workspace, bytes_workspace=size)

    def compare(self, what: str, pointer: int, want: Floats, fp32: bool = False) -> None:
        got = self.card.get(pointer, want.shape, np.float32 if fp32 else self.storage)
        values = from_bf16(got) if got.dtype == np.uint16 else got
        scale = np.abs(want).max(initial=1e-6)
        error = np.abs(values - want).max(initial=0.0) / scale
        if not error <= (2e-2 if self.dtype == "bfloat16" else 1e-4):  # a misplaced value, not rounding
            raise AssertionError(f"{what}: error {error:.2e} of the largest value")


# The cases


def norm_cases(card: Card | Emulator, random: np.random.Generator) -> Iterator[str]:
    for dtype in ("bfloat16", "float32"):
        for form in ("plain", "residual", "gated"):
            for rows, width, group in ((5, 264, 264), (3, 7, 7), (9, 512, 64)):
                name = f"{form} {dtype} {rows}x{width} in groups of {group}"
                _norm(Runner(card, dtype), random, form, rows, width, group)
                yield name


def _norm(run: Runner, random: np.random.Generator, form: str, rows: int, width: int, group: int) -> None:
    def draw(*shape: int) -> Floats:
        return run.rounded(random.standard_normal(shape).astype(np.float32))

    x, other, weight, grad = draw(rows, width), draw(rows, width), draw(width), draw(rows, width)
    residual, gate = form == "residual", form == "gated"
    pointer = run.put(other)
    forward = {
        "rows": rows,
        "width": width,
        "group": group,
        "eps": 1e-5,
        "dtype": run.dtype,
        "weight_dtype": run.dtype,
        "x": run.put(x),
        "x_stride": width,
        "residual": pointer if residual else None,
        "residual_stride": width if residual else 0,
        "gate": pointer if gate else None,
        "gate_stride": width if gate else 0,
        "weight": run.put(weight),
    }
    y, total = run.output(rows, width), run.output(rows, width)
    run.call("rms_norm_fwd", **forward, y=y, sum=total if residual else None)
    u = run.rounded(x + other) if residual else x
    v = u * other / (1 + np.exp(-other)) if gate else u
    blocks = v.reshape(rows, -1, group)
    scale = 1 / np.sqrt((blocks**2).mean(-1, keepdims=True) + 1e-5)
    normal = (blocks * scale).reshape(rows, width)
    run.compare("y", y, normal * weight)
    if residual:
        run.compare("sum", total, u)
    grad_input, grad_gate = run.output(rows, width), run.output(rows, width)
    grad_weight = run.card.empty(4 * width)
    run.call(
        "rms_norm_bwd",
        **forward,
        grad_y=run.put(grad),
        grad_sum=run.put(grad) if residual else None,
        grad_input=grad_input,
        grad_gate=grad_gate if gate else None,
        grad_weight=grad_weight,
    )
    run.compare("grad_weight", grad_weight, (grad * normal).sum(0), fp32=True)
    d = (grad * weight).reshape(blocks.shape)
    n = normal.reshape(blocks.shape)
    dv = ((d - n * (d * n).mean(-1, keepdims=True)) * scale).reshape(rows, width)
    sigmoid = 1 / (1 + np.exp(-other))
    run.compare("grad_input", grad_input, dv * other * sigmoid if gate else dv + (grad if residual else 0))
    if gate:
        run.compare("grad_gate", grad_gate, dv * u * sigmoid * (1 + other * (1 - sigmoid)))


@cache
def card_of(stand_in: bool) -> Card | Emulator:
    return Emulator() if stand_in else Card()


def dtype_cases(kernel: str, runner: Callable[[str], Runner], random: np.random.Generator) -> Iterator[str]:
    cases, dtypes = CASES[kernel]
    for dtype in dtypes:
        for name in cases(runner(dtype), random):
            yield f"{name} {dtype}"


def cases_of(kernel: str, stand_in: bool) -> Iterator[str]:
    if kernel in TRITON:
        sys.path.insert(0, str(ROOT))
        return TRITON[kernel]("cpu" if stand_in else "cuda")
    card = card_of(stand_in)
    if kernel not in card.kernels():
        raise FileNotFoundError(f"the module is without {kernel}, it has {', '.join(card.kernels())}")
    random = np.random.default_rng(0)
    if kernel in CASES:
        return dtype_cases(kernel, partial(Runner, card), random)
    if kernel == "norm":
        return norm_cases(card, random)
    return grouped_cases(kernel, Runner(card, "bfloat16"), random, stand_in)


# The tools


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def sanitize(
    kernels: list[str], seconds: float, tell: Callable[[dict[str, Any]], None] = lambda check: None
) -> list[dict[str, Any]]:
    """One check a kernel and a tool, told as it is there. What does not finish in time has not passed."""
    deadline = time.monotonic() + seconds
    sanitizer = find_sanitizer()

    def check(job: tuple[str, str]) -> dict[str, Any]:
        tool, kernel = job
        passed, detail, begin = False, "compute-sanitizer is not installed", time.monotonic()
        if sanitizer is not None:
            passed, detail = _under_tool(sanitizer, tool, kernel, min(deadline - begin, LONGEST_S))
        taken = round(time.monotonic() - begin, 1)
        found = {"kernel": kernel, "check": tool, "passed": passed, "detail": detail, "seconds": taken}
        tell(found)
        return found

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(check, [(tool, kernel) for tool in TOOLS for kernel in kernels]))


def _under_tool(sanitizer: str, tool: str, kernel: str, seconds: float) -> tuple[bool, str]:
    if seconds <= 0:
        return False, "not run: out of time"
    more = (
        ["--padding", "128"] if tool == "memcheck" else []
    )  # so that a step past the end meets nobody's memory
    driver = [sys.executable, str(Path(__file__).resolve()), "--kernel", kernel]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_EXIT), *more, *driver]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    try:
        output = process.communicate(timeout=seconds)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the tool and the program it runs, both started here
        output = process.communicate()[0].decode(errors="replace")
        return False, f"no end within {seconds:.0f} s; {_last(output)}"
    clean = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    if process.returncode == 0 and clean in output:
        return True, ""
    return False, f"exit {process.returncode}: {_findings(output)}"


def _findings(output: str) -> str:
    """The tool's first report and its summary, or the driver's last words."""
    lines = [line.lstrip("= ").strip() for line in output.splitlines() if line.startswith("=========")]
    told = [line for line in lines if line and "COMPUTE-SANITIZER" not in line]
    return " | ".join(told[:5] + told[-1:])[:1500] if told else _last(output)


def _last(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=[])
    parser.add_argument("--stand-in", choices=["emulator", "interpreter"], default=None)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--events", type=Path, default=None, help="a line of JSON a check")
    options = parser.parse_args()
    for kernel in options.kernel:
        for name in cases_of(kernel, options.stand_in is not None):
            print(f"{kernel}: {name}", flush=True)
        print(f"{kernel}: passed", flush=True)
    if options.kernel:
        return 0
    lock = threading.Lock()

    def tell(event: dict[str, Any]) -> None:
        with lock, options.events.open("a", encoding="utf-8") if options.events else nullcontext() as file:
            print(json.dumps(event), file=file, flush=True)

    kernels = Card().kernels() + (list(TRITON) if importlib.util.find_spec("triton") else [])
    checks = sanitize(kernels, options.seconds, tell)
    tell({"done": True})
    return 0 if all(row["passed"] for row in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

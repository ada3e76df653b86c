"""What the benchmarks share: interleaved rivals, medians, a measured copy as the limit, and the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# The kernels behind grouped_gemm: implementation, file in csrc/cuda, tiles (a test compares them with that file).
GROUPED_GEMM = {
    "sm90a": ("grouped_gemm_sm90", ("128x128", "128x208", "128x224", "128x232", "256x192")),
    "sm80": ("grouped_gemm_sm80", ("16x64", "64x128", "128x128")),
    "cutlass": ("cutlass/grouped_gemm", ("128x128", "128x208", "128x224")),
}


def grouped_gemm_forms(compiled: Iterable[str], compute_capability: int) -> dict[str, str]:
    """The `implementation=` strings that a GPU of this compute capability must run, and the kernel each one is."""
    found = {}
    for name, (kernel, tiles) in GROUPED_GEMM.items():
        if kernel in compiled and (compute_capability == 90 or (name == "sm80" and compute_capability >= 80)):
            found |= {f"{name}:{tile}": kernel for tile in tiles}
    return found


@dataclass
class Case:
    name: str
    bytes_moved: int
    rivals: dict[str, Callable[[], object]]


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleaved(cases: list[Case], buffer_bytes: int, rounds: int = 15) -> list[dict]:
    """Every rival of a case in turn, `rounds` times, with a DRAM copy between them; medians of the ratios."""
    source = torch.randn(buffer_bytes // 4)
    target = torch.empty_like(source)
    results = []
    for case in cases:
        for call in case.rivals.values():
            call()
        target.copy_(source)
        times: dict[str, list[float]] = {name: [] for name in case.rivals}
        copies = []
        for _ in range(rounds):
            for name, call in case.rivals.items():
                times[name].append(seconds(call))
            copies.append(seconds(lambda: target.copy_(source)))
        copy_rate = 2 * buffer_bytes / statistics.median(copies)
        first = next(iter(times))
        row: dict = {"case": case.name, "copy_gb_per_s": round(copy_rate / 1e9, 1)}
        for name, taken in times.items():
            rate = case.bytes_moved / statistics.median(taken)
            ratio = statistics.median(t / f for t, f in zip(taken, times[first]))
            row[name] = {
                "ms": round(statistics.median(taken) * 1e3, 3),
                "gb_per_s": round(rate / 1e9, 1),
                "percent_of_copy": round(100 * rate / copy_rate),
                f"times_slower_than_{first}": round(ratio, 2),
            }
        results.append(row)
    return results


def show(results: list[dict]) -> None:
    for row in results:
        print(f"{row['case']}  (copy {row['copy_gb_per_s']} GB/s)")
        for name, value in row.items():
            if isinstance(value, dict):
                ms, rate, share, ratio = value.values()
                print(
                    f"    {name:<12} {ms:9.3f} ms  {rate:6.1f} GB/s  {share:4d} % of copy  {ratio:5.2f}x the time"
                )


def machine() -> dict[str, object]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(path: str, results: list[dict]) -> None:
    settings = [
        f"{name}={os.environ[name]}" for name in ("OMP_PROC_BIND", "OMP_PLACES") if name in os.environ
    ]
    command = " ".join([*settings, "python", shlex.join(sys.argv)])
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"command": command, **machine(), "results": results}, indent=1) + "\n")


def find_nvcc() -> Path:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    return Path(found)


def save_checks(path: Path, checks: list[dict], **more: object) -> None:
    """What one step of bench/gpu_check.sh found, for the record that the script writes."""
    path.write_text(json.dumps({"checks": checks, **more}, indent=1) + "\n", encoding="utf-8")

"""What the benchmarks share: interleaved rivals, medians, a measured limit (DRAM, or the peak of products), and the
machine they ran on."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

Forms = dict[str, tuple[str, tuple[str, ...]]]
# The kernels behind grouped_gemm: implementation, file in csrc/cuda, tiles (a test compares them with that file).
GROUPED_GEMM: Forms = {
    "sm90a": (
        "grouped_gemm_sm90",
        (
            *("64x128", "64x256", "128x128", "128x208", "128x224", "128x232"),
            *("192x208", "192x224", "256x192", "256x208", "384x208", "512x192"),
        ),
    ),
    "sm80": ("grouped_gemm_sm80", ("16x64", "64x128", "128x128")),
    "cutlass": ("cutlass/grouped_gemm", ("128x128", "128x208", "128x224")),
}
# The same with b's outputs contiguous, which is the product of the gradient of a.
GROUPED_GEMM_DGRAD: Forms = {
    "sm90a": (
        "grouped_gemm_dgrad_sm90",
        ("64x128", "64x256", "128x192", "192x192", "256x192", "384x192", "512x192"),
    ),
    "sm80": GROUPED_GEMM["sm80"],
}
# The gradient of b.
GROUPED_GEMM_WGRAD: Forms = {
    "sm90a": ("grouped_gemm_wgrad_sm90", ("128x192", "192x192", "256x192")),
    "sm80": ("grouped_gemm_wgrad_sm80", ("64x128", "128x128")),
}


# The other kernel files, and their tests: in tests/gpu, of test_gpu_<first>.py those that -k <second> takes. "moe"
# is the whole expert layer and runs the products too.
OTHERS = {
    "norm": ("norm", ""),
    "conv": ("conv", ""),
    "loss": ("loss", ""),
    "moe_route": ("moe", "route"),
    "moe_permute": ("moe", "permute"),
    "moe_combine": ("moe", "combine"),
    "moe_decode": ("moe", "decode"),
    "moe": ("moe", "mlp"),
    "attention": ("attention", "prefill and not gradients and not hopper"),
    "attention_bwd": ("attention", "gradients"),
    "attention_decode": ("attention", "decode"),
    "attention_sm90": ("attention", "prefill and hopper and not gradients"),
    "ssd_scan": ("ssd", "scan and not gradients"),
    "ssd_scan_bwd": ("ssd", "gradients"),
    "ssd_update": ("ssd", "update"),
}

# The Triton forms by their names in the evidence table (hebatron_kernels._triton.kernel), with their tests as above: in
# several processes, as each compiles for a minute.
TRITON = {
    "moe/triton": ("triton", ("grouped_gemm and oracle", "grouped_gemm and not oracle", "moe_mlp")),
    "ssd/triton": ("triton_ssd", ("oracle", "not oracle")),
}


def grouped_gemm_forms(
    compiled: Iterable[str], compute_capability: int, table: Forms = GROUPED_GEMM
) -> dict[str, str]:
    """The `implementation=` strings that a GPU of this compute capability must run, and the kernel each one is."""
    found = {}
    for name, (kernel, tiles) in table.items():
        if kernel in compiled and (compute_capability == 90 or (name == "sm80" and compute_capability >= 80)):
            found |= {f"{name}:{tile}": kernel for tile in tiles}
    return found


@dataclass
class Case:
    """What is timed. `rivals` makes the calls, ours first, when the case's turn comes: one may hold gigabytes. A call
    that returns a float has taken its own time in seconds."""

    name: str
    rivals: Callable[[], dict[str, Callable[[], object]]]
    operations: float = 0
    bytes: float = 0  # that must move once
    limit: str = (
        "copy"  # what the rate is held against: DRAM's "copy" or "read", "float32" or "bfloat16" products
    )
    tokens: int = 0  # of one call, where a rate of tokens says something

    @property
    def work(self) -> float:
        return self.bytes if self.limit in ("copy", "read") else self.operations


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    taken = call()
    return taken if isinstance(taken, float) else time.perf_counter() - begin


@cache
def _peak_library() -> ctypes.CDLL:
    """bench/peak.cpp, compiled for this machine."""
    library = ROOT / "build" / "bench" / "peak.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(ROOT / "bench/peak.cpp"), "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))
    reads = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    found.read_rate.restype, found.read_rate.argtypes = ctypes.c_double, reads
    found.peak.restype, found.peak.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    return found


def peak(limit: str) -> float:
    """Operations a second of this CPU's products, on as many threads as torch uses; 20 ms. Without bfloat16
    instructions such a product is two fp32 ones."""
    rate = _peak_library().peak(limit == "bfloat16", torch.get_num_threads(), 0.02)
    return rate or _peak_library().peak(0, torch.get_num_threads(), 0.02)


def read_rate() -> float:
    """Bytes a second of reading 256 MB of memory, on as many threads as torch uses."""
    buffer = _probe()
    return _peak_library().read_rate(buffer.data_ptr(), buffer.nbytes, torch.get_num_threads())


@cache
def _probe() -> torch.Tensor:
    return torch.ones(2**26)


def interleaved(case: Case, rounds: int = 9, seconds_each: float = 1e9, buffer_bytes: int = 2**26) -> dict:
    """Every rival of a case in turn, `rounds` times, and between them the case's limit; medians of the ratios.

    A rival that would need more than `seconds_each` in all gets fewer rounds, at least the one that warms others up;
    the row says how many.
    """
    source = torch.ones(buffer_bytes // 4)
    target = torch.empty_like(source)
    calls = case.rivals()

    def limit_rate() -> float:
        if case.limit == "read":
            return read_rate()
        if case.limit != "copy":
            return peak(case.limit)
        return 2 * source.nbytes / seconds(lambda: target.copy_(source))

    limit_rate()
    before = limit_rate()
    warm = {name: seconds(call) for name, call in calls.items()}
    turns = {name: min(rounds, int(seconds_each / max(t, 1e-9))) for name, t in warm.items()}
    times = {name: [] if turns[name] else [warm[name]] for name in calls}
    limits = {name: [] if turns[name] else [before] for name in calls}
    for turn in range(rounds):
        before = limit_rate()
        for name, call in calls.items():
            if turn < turns[name]:
                times[name].append(seconds(call))
                after = limit_rate()
                limits[name].append((before + after) / 2)
                before = after
    return _row(case, times, limits)


def _row(case: Case, times: dict[str, list[float]], limits: dict[str, list[float]]) -> dict:
    first = next(iter(times))
    everywhere = [rate for taken in limits.values() for rate in taken]
    row: dict = {
        "case": case.name,
        "limit": case.limit,
        "limit_g_per_s": round(statistics.median(everywhere) / 1e9, 1),
        "operations": case.operations,
        "bytes": case.bytes,
        "rivals": {},
    }
    for name, taken in times.items():
        share = statistics.median(case.work / t / rate for t, rate in zip(taken, limits[name]))
        ratio = statistics.median(t / f for t, f in zip(taken, times[first]))
        row["rivals"][name] = {
            "ms": round(statistics.median(taken) * 1e3, 3),
            "g_per_s": round(case.work / statistics.median(taken) / 1e9, 1),
            "percent_of_limit": round(100 * share, 1),
            f"times_slower_than_{first}": round(ratio, 2),
            "rounds": len(taken),
        }
        if case.tokens:
            row["rivals"][name]["tokens_per_s"] = round(case.tokens / statistics.median(taken), 1)
    return row


def show(row: dict) -> None:
    unit = "GB/s" if row["limit"] in ("copy", "read") else "GFLOP/s"
    print(f"{row['case']}  ({row['limit']} {row['limit_g_per_s']} {unit})")
    for name, value in row["rivals"].items():
        ms, rate, share, ratio, rounds, *tokens = value.values()
        speed = f"  {tokens[0]:10,.1f} tok/s" if tokens else ""
        text = f"{ms:10.3f} ms  {rate:6.1f} {unit}  {share:5.1f} %  {ratio:5.2f}x the time"
        print(f"    {name:<12} {text}{speed}  {rounds} rounds", flush=True)


def run(
    description: str | None,
    cases: Callable[[], list[Case]],
    check: Callable[[], None],
    arguments: Sequence[str] | None = None,
    **more: object,
) -> None:
    """The command line of a bench_<noun>.py: correctness, then the cases whose name holds a text of --only. `more` goes
    into the JSON file."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name holds one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument("--out", default=None, help="a JSON file")
    options = parser.parse_args(arguments)
    chosen = [case for case in cases() if any(text in case.name for text in options.only)]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    torch.manual_seed(0)
    check()
    results = measure(chosen, options.rounds)
    if options.out:
        save(options.out, results, **more)


def measure(cases: list[Case], rounds: int = 9, seconds_each: float = 1e9) -> list[dict]:
    results = []
    for case in cases:
        results.append(interleaved(case, rounds, seconds_each))
        show(results[-1])
    return results


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


def save(path: str, results: list[dict], **more: object) -> None:
    settings = [
        f"{name}={os.environ[name]}" for name in ("OMP_PROC_BIND", "OMP_PLACES") if name in os.environ
    ]
    command = " ".join([*settings, "python", shlex.join(sys.argv)])
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        json.dumps({"command": command, **machine(), **more, "results": results}, indent=1) + "\n"
    )


def find_nvcc() -> Path:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    return Path(found)


def save_checks(path: Path, checks: list[dict], **more: object) -> None:
    """What one step of bench/gpu_check.sh found, for the record that the script writes."""
    path.write_text(json.dumps({"checks": checks, **more}, indent=1) + "\n", encoding="utf-8")

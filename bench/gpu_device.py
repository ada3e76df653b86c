"""How the GPU benchmarks measure: events around CUDA graphs behind a flush of the L2 cache, clocks, ceilings.

On the CPU (a dry run of the benchmarks' own code) there is no flush, no graph, no clock, and nothing is a result.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

# several times any L2; it takes 60 us or more, in which the host queues the next call
FLUSH_BYTES = 256 << 20
SECONDS_A_PROBLEM = 1.0  # of all its rivals' rounds, or three rounds
Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    ms: float  # median
    p10_ms: float
    p90_ms: float
    repeats: int
    graph: bool  # replayed from a CUDA graph: no launch gaps in the figure


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this process: floors are counted against these, not against a data sheet."""

    bytes_per_second: float
    flops_per_second: float

    def floor_ms(self, bytes_moved: float, flops: float) -> tuple[float, str]:
        memory, compute = bytes_moved / self.bytes_per_second, flops / self.flops_per_second
        return 1e3 * max(memory, compute), "memory" if memory >= compute else "compute"


class Device:
    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"
        self.words = torch.zeros(FLUSH_BYTES // 4 if self.cuda else 0, device=self.device)

    def flush(self) -> None:
        """Writes 256 MB, then reads half of them: written lines left in the cache would be sent to memory while the
        next kernel runs, and up to 60 MB of that would count as its traffic."""
        self.words.zero_()
        self.words[: self.words.numel() // 2].amax()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def alive(self) -> bool:
        """False after a fault in a kernel: the CUDA context then answers nothing more."""
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def free(self) -> None:
        if self.cuda and self.alive():
            torch.cuda.empty_cache()

    def times(self, rivals: dict[str, Call], repeats: int) -> dict[str, Times]:
        """Medians of every rival, all of them in turn in each round; three rounds at least of what takes long."""
        prepared = {name: self.prepare(call) for name, call in rivals.items()}
        calls = {name: call for name, (call, _) in prepared.items()}
        taken = self.rounds(calls, 1)
        seconds = 1e-3 * sum(ms for (ms,) in taken.values())
        for name, more in self.rounds(calls, rounds_for(seconds, repeats) - 1).items():
            taken[name] += more
        return {name: summary(taken[name], prepared[name][1]) for name in rivals}

    def rounds(self, calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
        """Milliseconds of every call, all of them in turn in each round, behind a flush each."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            if not self.cuda:
                for name, call in calls.items():
                    begin = time.perf_counter()
                    call()
                    taken[name].append(1e3 * (time.perf_counter() - begin))
                continue
            events = {}
            for name, call in calls.items():
                self.flush()
                events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[name][0].record()
                call()
                events[name][1].record()
            torch.cuda.synchronize()
            for name, (begin_event, end_event) in events.items():
                taken[name].append(begin_event.elapsed_time(end_event))
        return taken

    def prepare(self, call: Call, capture: bool = True) -> tuple[Call, bool]:
        """The replay of a graph of the call, or the call itself where it cannot be captured (it synchronises)."""
        for _ in range(2):
            call()
        if not self.cuda or not capture:
            return call, False
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # a capture that fails leaves its own stream the current one: the outer context puts the old one back
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            print(f"    not captured, timed with its launches: {str(error).splitlines()[0][:100]}")
            torch.cuda.synchronize()
            return call, False
        return graph.replay, True

    def ceilings(self, copy_bytes: int, matmul_size: int, repeats: int = 15) -> Ceilings:
        """Random values: on zeros a product runs faster than on real data."""
        source = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, matmul_size, matmul_size, device=self.device).bfloat16()
        taken = self.times({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, repeats)
        return Ceilings(
            2e3 * copy_bytes / taken["copy"].ms,
            2e3 * matmul_size**3 / taken["matmul"].ms,
        )


def rounds_for(seconds: float, repeats: int) -> int:
    """Rounds of a problem of which one takes so long: of four attentions over 65,536 tokens a second."""
    return min(repeats, max(3, int(SECONDS_A_PROBLEM / max(seconds, 1e-9))))


def summary(taken: list[float], graph: bool) -> Times:
    ordered = sorted(taken)
    last = len(ordered) - 1
    return Times(
        round(statistics.median(ordered), 5),
        round(ordered[round(0.1 * last)], 5),
        round(ordered[round(0.9 * last)], 5),
        len(ordered),
        graph,
    )


def as_row(times: Times, floor_ms: float, bytes_moved: float, flops: float) -> dict[str, Any]:
    rates = {"gb_per_s": round(bytes_moved / times.ms / 1e6, 1), "tflops": round(flops / times.ms / 1e9, 2)}
    return {**asdict(times), **rates, "percent_of_floor": round(100 * floor_ms / times.ms, 1)}


class Clocks:
    """nvidia-smi every 100 ms in the background; `between` gives the medians of a stretch of time."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.samples: list[tuple[float, list[float]]] = []
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clocks:
        if self.wanted:
            query = f"--query-gpu={','.join(self.FIELDS)}"
            command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "100", "-i", _gpu_id()]
            try:
                self.process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
            except FileNotFoundError:
                print("nvidia-smi is not on PATH: no clocks in the record")
            else:
                threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            values = [_number(field) for field in line.split(",")]
            if len(values) == len(self.FIELDS):
                self.samples.append((time.monotonic(), values))

    def between(self, begin: float, end: float) -> dict[str, float]:
        """Of what the card tells; a short stretch takes the sample before it. Empty where there is none."""
        inside = [values for at, values in self.samples if begin - 0.15 <= at <= end]
        columns = {name: [v for v in values if v == v] for name, values in zip(self.FIELDS, zip(*inside))}
        return {name: round(statistics.median(values), 1) for name, values in columns.items() if values}


def _number(field: str) -> float:
    try:
        return float(field)
    except ValueError:
        return float("nan")  # "[N/A]" where a card does not tell


def _gpu_id() -> str:
    """The current device as nvidia-smi knows it, whatever CUDA_VISIBLE_DEVICES says."""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return f"GPU-{uuid.removeprefix('GPU-')}"


def machine(device: torch.device) -> dict[str, Any]:
    """GPU, driver and torch; on the CPU what a dry run shows in their place."""
    if device.type != "cuda":
        return {"gpu": "none (dry run on the CPU)", "arch": "none", "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(device)
    driver = "unknown: nvidia-smi is not on PATH"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", _gpu_id()]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "driver": driver,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
    }


def main() -> None:
    """What the record says of the GPU and of the module that runs on it, as JSON."""
    from hebatron_kernels import _native, _triton

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    if _native.cuda_module is None:
        raise SystemExit(f"the _cuda module is not built: {_native.cuda_missing}")
    found = machine(torch.device("cuda"))
    with Clocks(True) as clocks:
        begin = time.monotonic()
        time.sleep(0.5)
    found["idle_clocks"] = clocks.between(begin, time.monotonic())
    kernels = {name: built["digest"] for name, built in _native.cuda_module.kernels().items()}
    compilers = {}
    for noun in _triton.NOUNS if _triton.version else ():
        kernels[_triton.kernel(noun)], compilers[_triton.kernel(noun)] = (
            _triton.digest(noun),
            _triton.compiler(),
        )
    facts = {
        "machine": found,
        "kernels": kernels,
        "toolkit": _native.cuda_module.toolkit(),
        "compilers": compilers,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

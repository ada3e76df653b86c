"""The work behind bench/gpu_check.sh: six steps, each with its time, each failure recorded and none of them the end.

    build        HEBATRON_CUDA=on pip install -e . without a network, for the GPU at hand; beside it conformance begins
    conformance  every primitive of prim.cuh on the GPU and under the emulator, bit by bit (gpu_conformance.py)
    tests        pytest -m gpu, one process a kernel, begun again behind what faults or hangs (gpu_tests.py)
    timings      the table with floors, clocks and rivals (gpu_kernels.py), likewise begun again
    sanitizer    memcheck, racecheck, initcheck, synccheck of every kernel at small shapes (gpu_sanitize.py)
    record       bench/results/<date>-<gpu>.json, the evidence table, the README's table, the table of tiles

A step may use what the steps before it left of their time and is stopped at its deadline. The record is written from
the build on (gpu_record.py). With --dry-run every step does what it can without a GPU: nvcc builds in a copy, the
emulator stands in, timings are toys, the record is thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gpu_tests
import gpu_timings
from common import OTHERS, ROOT
from gpu_record import Record
from gpu_timings import TABLES
from gpu_watch import Event, end_all_on_sigterm, kill, said, start, watch

BENCH = ROOT / "bench"
# Seconds of each step on 16 cores and one H100 or H200. With the 240 of bench/bench_model.py and two minutes until a
# machine is there they make a quarter of an hour.
SECONDS = {"build": 120, "conformance": 30, "tests": 150, "timings": 110, "sanitizer": 80, "record": 10}
LATE_BUILD_S = 100.0  # that the build may take of the other steps, which are nothing without it


class Run(Record):
    """The record, and the programs that a step runs."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        super().__init__(options, work)
        self.seconds: dict[str, float] = {}  # of each step
        self.conformance: Future[tuple[int | None, str]] | None = None  # begun beside the build

    def command(
        self, name: str, *words: str, cwd: Path = ROOT, seconds: float | None = None, **environment: str
    ) -> tuple[int | None, str]:
        """Exit status, None when it was stopped at the step's deadline, and the end of what it said."""
        log = self.work / f"{name}.log"
        process = start(words, log, cwd, **environment)
        try:
            status: int | None = process.wait(timeout=self.left() if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            kill(process)
            status = None
        return status, said(log)

    def python(self, name: str, *words: str, **more: Any) -> tuple[int | None, str]:
        return self.command(name, sys.executable, *words, **more)


# The steps: each returns what its line in the summary says


def build(run: Run) -> str:
    if "conformance" in run.seconds:
        run.conformance = begin_conformance(run)
    cuda = {"HEBATRON_CUDA": "on"} | ({} if run.dry else arch_at_hand())
    cutlass = ROOT / "third_party" / "cutlass"  # where bench/fetch_cutlass.sh puts the headers
    if cutlass.is_dir() and "HEBATRON_CUTLASS_DIR" not in os.environ:
        cuda["HEBATRON_CUTLASS_DIR"] = str(cutlass)
    if run.dry:
        return _build_in_a_copy(run, cuda)
    pip = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    status, output = run.python("build", *pip, seconds=run.left() + LATE_BUILD_S, **cuda)
    run.check("build", "pip", status == 0, "" if status == 0 else output[-800:])
    if status != 0:  # the modules alone: the rest of the run needs no installed package
        command = ("setup.py", "build_ext", "--inplace")
        status, output = run.python("build", *command, seconds=run.left() + LATE_BUILD_S, **cuda)
        run.check("build", "setup.py", status == 0, "" if status == 0 else output[-800:])
    status, output = run.python("device", str(BENCH / "gpu_device.py"), seconds=run.left() + LATE_BUILD_S)
    if status != 0:
        raise RuntimeError(f"no GPU module to test: {output[-800:]}")
    run.facts = json.loads(output.splitlines()[-1])
    machine = run.facts["machine"]
    clocks = ", ".join(f"{name} {value:g}" for name, value in machine["idle_clocks"].items())
    missing = {kernel for table in TABLES for kernel, _ in table.values() if "cutlass" not in kernel} | {
        *OTHERS
    }
    for kernel in sorted(missing - set(run.facts["kernels"])):
        run.check(kernel, "built", False, "the module is without it")
    kernels = ", ".join(run.facts["kernels"])
    return f"{machine['gpu']}, {machine['arch']}, driver {machine['driver']}, {clocks}; {kernels}"


def _build_in_a_copy(run: Run, cuda: dict[str, str]) -> str:
    copy = run.work / "copy"
    for name in (
        "csrc",
        "cmake",
        "hebatron_kernels",
        "setup.py",
        "CMakeLists.txt",
        "pyproject.toml",
        "README.md",
    ):
        source, target = ROOT / name, copy / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy2(source, target)
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    status, output = run.command("build", *command, cwd=copy, **cuda)
    built = bool(list((copy / "hebatron_kernels").glob("_cuda.*.so")))
    run.check("build", "setup.py", status == 0 and built, "" if status == 0 else output[-800:])
    return "built with nvcc in a copy" if built else "did not build"


def arch_at_hand() -> dict[str, str]:
    """The build for this GPU alone, half of the default's work; the same machine code as that one's for it."""
    if "HEBATRON_CUDA_ARCHS" in os.environ or shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    major, _, minor = (found or [""])[0].partition(".")
    if not (major.isdigit() and minor.isdigit()):
        return {}
    return {"HEBATRON_CUDA_ARCHS": "90a-real" if (major, minor) == ("9", "0") else f"{major}{minor}-real"}


def begin_conformance(run: Run) -> Future[tuple[int | None, str]]:
    """It needs nothing of the build, and nvcc half a minute for its program."""
    seconds = run.left() + (run.seconds["conformance"] if run.doing == "build" else 0.0)
    words = [str(BENCH / "gpu_conformance.py"), *(["--dry-run"] if run.dry else [])]
    words += ["--seconds", str(seconds - 5), "--out", str(run.work / "conformance.json")]
    return ThreadPoolExecutor(1).submit(run.python, "conformance", *words, seconds=seconds)


def conformance(run: Run) -> str:
    out = run.work / "conformance.json"
    status, output = (run.conformance or begin_conformance(run)).result()
    if out.exists():
        run.checks += json.loads(out.read_text(encoding="utf-8"))["checks"]
    last = output.splitlines()[-1] if output else "nothing"
    if not out.exists() or status is None:
        run.check(
            "*", "primitives", False, f"{'stopped' if status is None else f'exit {status}'}: {last}"[:500]
        )
    return last


def tests(run: Run) -> str:
    jobs = gpu_tests.jobs_of(list(run.facts["kernels"]), run.dry)
    count = gpu_tests.run(run, jobs)
    return f"{count} tests in {len(jobs)} processes, {len(run.skipped)} skipped"


def sanitizer(run: Run) -> str:
    program, log, events = (
        str(BENCH / "gpu_sanitize.py"),
        run.work / "sanitizer.log",
        run.work / "sanitizer.jsonl",
    )
    if run.dry:
        named = {table[name][0] for table in TABLES for name in ("sm80", "sm90a")}  # no CUTLASS
        kernels = [*OTHERS, *sorted(named)]
        status, output = run.python("sanitizer", program, "--kernel", *kernels, "--stand-in", "emulator")
        lines = log.read_text(encoding="utf-8").splitlines()
        for kernel in kernels:
            passed = status == 0 and f"{kernel}: passed" in lines
            run.check(kernel, "stand-in", passed, "" if passed else output[-500:])
        return f"the driver's cases of {len(kernels)} kernels on the emulator's checked build"
    found: list[dict[str, Any]] = []

    def take(event: Event) -> None:
        if "check" in event:
            found.append(event)
            run.checks.append(event)

    seconds = run.left() - 5
    words = [sys.executable, program, "--seconds", f"{seconds:.0f}", "--events", str(events)]
    why = watch(words, log, events, take, run.deadline, seconds, seconds)
    if why:
        last = said(log).splitlines()[-1:] or ["nothing"]
        run.check("sanitizer", "ran", False, f"{why}: {last[0]}"[:500])
    return f"{sum(check['passed'] for check in found)} of {len(found)} runs without a report"


STEPS: dict[str, Callable[[Run], str]] = {
    "build": build,
    "conformance": conformance,
    "tests": tests,
    "timings": gpu_timings.run,
    "sanitizer": sanitizer,
    "record": Record.conclude,
}


def perform(run: Run, wanted: list[str], total: float) -> None:
    """Every step in its order. Deadlines are sums, so that a step has what the ones before it left."""
    scale = total / sum(SECONDS[name] for name in wanted)
    run.seconds = {name: scale * SECONDS[name] for name in wanted}
    run.deadline = time.monotonic()
    for name in wanted:
        if name not in ("build", "conformance") and not run.dry and not run.facts["kernels"]:
            print(f"== {name}: not without a module, which was not built")
            continue
        run.deadline += run.seconds[name]
        begin, before = time.monotonic(), len(run.checks)
        print(f"== {name} ({run.left():.0f} s)", flush=True)
        run.doing = name
        try:
            with run.saved():
                line = STEPS[name](run)
        except (RuntimeError, OSError, ValueError, KeyError) as error:  # recorded, and the next step goes on
            line = f"{type(error).__name__}: {error}"
            run.check(name, "ran", False, line[:1000])
        taken = time.monotonic() - begin
        failed = [check for check in run.checks[before:] if not check["passed"]]
        run.steps.append({"step": name, "seconds": round(taken, 1), "failed": len(failed), "said": line})
        print(f"   {taken:.1f} s, {len(failed)} failed checks: {line}", flush=True)
        for check in failed[:10]:
            print(
                f"   FAILED {check['kernel']} {check['check']} {check.get('name', '')}: {check['detail'][:300]}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--dry-run", action="store_true", help="what needs no GPU; writes nothing into the tree"
    )
    parser.add_argument("--only", default=",".join(STEPS), help="these steps, by commas")
    parser.add_argument("--seconds", type=float, default=sum(SECONDS.values()), help="for all steps together")
    parser.add_argument("--keep", type=Path, default=None, help="copy record, tables and logs to this folder")
    parser.add_argument("--commit", default=None, help="what the record says where there is no git")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if set(wanted) - set(STEPS):
        parser.error(f"--only must name steps among {', '.join(STEPS)}, got {options.only}")
    if not options.dry_run and wanted[0] != "build":
        parser.error("--only must begin with build: what runs is what was built from this tree")
    end_all_on_sigterm()
    begin = time.monotonic()
    with TemporaryDirectory() as work:
        run = Run(options, Path(work))
        perform(run, [name for name in STEPS if name in wanted], options.seconds)
    failed = sum(not check["passed"] for check in run.checks)
    label = "DRY RUN: " if run.dry else ""
    passed = f"{len(run.checks) - failed} of {len(run.checks)} checks passed"
    print(f"{label}{passed}, {len(run.skipped)} things skipped")
    print("whole models next: PYTHONPATH=. python bench/bench_model.py --device cuda --seconds 240")
    print(f"{label}{'FAILED' if failed else 'passed'} in {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

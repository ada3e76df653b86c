"""The work behind bench/gpu_check.sh: six steps, each with its time, each failure recorded and none of them the end.

    build        HEBATRON_CUDA=on pip install -e . without a network
    conformance  every primitive of prim.cuh on the GPU and under the emulator, bit by bit (gpu_conformance.py)
    tests        pytest -m gpu, one process a kernel, so that a fault or a hang takes no other kernel along
    sanitizer    memcheck, racecheck, initcheck, synccheck of every kernel at small shapes (gpu_sanitize.py)
    timings      the table with floors, clocks and rivals (gpu_kernels.py)
    record       bench/results/<date>-<gpu>.json, the evidence table, the README's table, the table of tiles

A step may use what the steps before it left of their time and is stopped at its deadline. With --dry-run every step
does what it can without a GPU: nvcc builds in a copy, the emulator stands in, timings are toys, the record is thrown
away.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gpu_tiles
from common import GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD, OTHERS, ROOT, TRITON
from gpu_table import README, RESULTS, generated, rewritten

BENCH = ROOT / "bench"
# Seconds of each step; together under 10 minutes on 16 cores and one H100 or H200.
SECONDS = {"build": 150, "conformance": 70, "tests": 150, "sanitizer": 90, "timings": 120, "record": 10}
Check = dict[str, Any]


class Run:
    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.dry, self.work, self.commit = options.dry_run, work, options.commit or tree_commit()
        self.deadline = 0.0
        self.checks: list[Check] = []
        self.steps: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.facts: dict[str, Any] = {"machine": {}, "kernels": {}, "toolkit": 0, "compilers": {}}
        self.timings: dict[str, Any] = {}
        self.written: Path | None = None

    def left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def check(self, kernel: str, check: str, passed: bool, detail: str = "", name: str = "") -> None:
        self.checks.append(
            {"kernel": kernel, "check": check, "name": name, "passed": passed, "detail": detail}
        )

    def command(self, log: str, *words: str, cwd: Path = ROOT, **environment: str) -> tuple[int | None, str]:
        """Exit status, None when it was stopped at the step's deadline, and the end of what it said."""
        path = self.work / f"{log}.log"
        with path.open("ab") as file:
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env=os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(timeout=self.left())
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the command and what it started
                process.wait()
                status = None
        return status, path.read_text(encoding="utf-8", errors="replace")[-3000:].strip()

    def python(self, log: str, *words: str, **environment: str) -> tuple[int | None, str]:
        return self.command(log, sys.executable, *words, **environment)

    def take_checks(self, path: Path, kernel: str, check: str, status: int | None, output: str) -> None:
        """What a step's program recorded; its silence is a failed check."""
        if path.exists():
            self.checks += json.loads(path.read_text(encoding="utf-8"))["checks"]
        if not path.exists() or status is None:
            said = output.splitlines()[-1] if output else "nothing"
            self.check(
                kernel, check, False, f"{'stopped' if status is None else f'exit {status}'}: {said}"[:500]
            )


def tree_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# The steps: each returns what its line in the summary says


def build(run: Run) -> str:
    cuda = {"HEBATRON_CUDA": "on"}
    cutlass = ROOT / "third_party" / "cutlass"  # where bench/fetch_cutlass.sh puts the headers
    if cutlass.is_dir() and "HEBATRON_CUTLASS_DIR" not in os.environ:
        cuda["HEBATRON_CUTLASS_DIR"] = str(cutlass)
    if run.dry:
        return _build_in_a_copy(run, cuda)
    pip = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    status, output = run.python("build", *pip, **cuda)
    run.check("build", "pip", status == 0, "" if status == 0 else output[-800:])
    if status != 0:  # the modules alone: the rest of the run needs no installed package
        status, output = run.python("build", "setup.py", "build_ext", "--inplace", **cuda)
        run.check("build", "setup.py", status == 0, "" if status == 0 else output[-800:])
    status, output = run.python("device", str(BENCH / "gpu_device.py"))
    if status != 0:
        raise RuntimeError(f"no GPU module to test: {output[-800:]}")
    run.facts = json.loads(output.splitlines()[-1])
    machine = run.facts["machine"]
    clocks = ", ".join(f"{name} {value:g}" for name, value in machine["idle_clocks"].items())
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


def conformance(run: Run) -> str:
    out = run.work / "conformance.json"
    words = [
        str(BENCH / "gpu_conformance.py"),
        *(["--dry-run"] if run.dry else []),
        "--seconds",
        str(run.left() - 2),
        "--out",
        str(out),
    ]
    status, output = run.python("conformance", *words)
    run.take_checks(out, "*", "primitives", status, output)
    return output.splitlines()[-1] if output else "said nothing"


def tests(run: Run) -> str:
    """One pytest process a kernel, side by side; each leaves a line of JSON for every test it began and ended."""
    grouped, gradients = (f"tests/gpu/test_gpu_grouped_gemm{part}.py" for part in ("", "_gradients"))
    jobs = [
        (kernel, f"tests/gpu/test_gpu_{noun}.py", select)
        for kernel, (noun, select) in (OTHERS | TRITON).items()
    ]
    jobs += [(kernel, grouped, name) for name, (kernel, _) in GROUPED_GEMM.items()]
    for way, table in (("way_back", GROUPED_GEMM_DGRAD), ("wgrad", GROUPED_GEMM_WGRAD)):
        jobs += [(kernel, gradients, f"{name} and {way}") for name, (kernel, _) in table.items()]
    jobs = [job for job in jobs if (run.dry and job[0] not in TRITON) or job[0] in run.facts["kernels"]]
    jobs += [("grouped_gemm", grouped, "automatic"), ("model", "tests/gpu/test_gpu_model.py", "")]
    if run.dry:  # a hang has no name there, and a process costs more than its tests
        jobs = [(Path(file).stem, file, "") for file in dict.fromkeys(file for _, file, _ in jobs)]
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda job: _one_pytest(run, *job), jobs))
    return f"{sum(counts)} tests in {len(jobs)} processes, {len(run.skipped)} skipped"


def _one_pytest(run: Run, kernel: str, file: str, select: str) -> int:
    log = f"tests_{kernel.replace('/', '_')}{'_gradients' if 'gradients' in file else ''}"
    record = run.work / f"{log}.jsonl"
    words = ["-m", "pytest", "-m", "gpu", file, "--gpu-record", str(record), "-p", "no:cacheprovider"]
    if run.dry:  # the cheapest tests of each kind, on the emulator
        words += ["--gpu-stand-in", "emulator"]
        select = " and ".join(filter(None, [select, "(smallest or automatic or (113 and residual))"]))
    status, output = run.python(log, *words, *(["-k", select] if select else []))
    began, ended = [], set()
    for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else []:
        event = json.loads(line)
        if event["event"] == "start":
            began.append(event["test"])
            continue
        ended.add(event["test"])
        name = event["test"].partition("::")[2]
        if event["event"] == "skipped":
            run.skipped.append(f"{name}: {event['detail']}")
        else:
            run.check(kernel, event["check"], event["event"] == "passed", event["detail"], name)
    for test in [test for test in began if test not in ended]:
        why = "hung until the step's end" if status is None else f"the process ended with {status}"
        run.check(kernel, "values", False, why, test.partition("::")[2])
    if not run.dry and not any(check["kernel"] == kernel for check in run.checks):
        run.check(kernel, "values", False, "every test was skipped, or none was found")
    if status not in (0, 1):
        last = output.splitlines()[-1] if output else "nothing"
        run.check(kernel, "values", False, f"pytest: {'stopped' if status is None else status}: {last}"[:500])
    return len(ended)


def sanitizer(run: Run) -> str:
    program = str(BENCH / "gpu_sanitize.py")
    if run.dry:
        tables = (GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD)
        named = {table[name][0] for table in tables for name in ("sm80", "sm90a")}  # no CUTLASS
        kernels = [*OTHERS, *sorted(named)]
        status, output = run.python("sanitizer", program, "--kernel", *kernels, "--stand-in", "emulator")
        lines = (run.work / "sanitizer.log").read_text(encoding="utf-8").splitlines()
        for kernel in kernels:
            passed = status == 0 and f"{kernel}: passed" in lines
            run.check(kernel, "stand-in", passed, "" if passed else output[-500:])
        return f"the driver's cases of {len(kernels)} kernels on the emulator's checked build"
    out = run.work / "sanitizer.json"
    status, output = run.python("sanitizer", program, "--seconds", str(run.left() - 5), "--out", str(out))
    for kernel in run.facts["kernels"] if not out.exists() else []:
        run.check(kernel, "memcheck", False, output[-300:])
    run.take_checks(out, "sanitizer", "ran", status, output)
    found = [
        check for check in run.checks if check["check"] in ("memcheck", "racecheck", "initcheck", "synccheck")
    ]
    return f"{sum(check['passed'] for check in found)} of {len(found)} runs without a report"


def timings(run: Run) -> str:
    out = run.work / "timings.json"
    words = [str(BENCH / "gpu_kernels.py"), "--seconds", str(run.left() - 10), "--out", str(out)]
    broken = {check["kernel"] for check in run.checks if check["check"] == "values" and not check["passed"]}
    named = {name: {name} for name in (*OTHERS, *TRITON)}
    for table in (GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD):
        for name, (kernel, _) in table.items():
            named.setdefault(name, set()).add(kernel)
    for name, kernels in named.items():
        if kernels & broken:  # a kernel that hangs would take the whole table along
            words += ["--without", name]
            run.skipped.append(f"timings of {name}: its tests failed")
    status, output = run.python("timings", *words, *(["--device", "cpu"] if run.dry else []))
    print(output[-9000:])
    if out.exists():
        run.timings = json.loads(out.read_text(encoding="utf-8"))
        run.skipped += [f"timing of {name}" for name in run.timings["skipped"]]
    run.take_checks(out, "timings", "ran", status, output)
    return f"{len(run.timings.get('rows', []))} problems, {len(run.timings.get('skipped', []))} skipped"


def results(run: Run) -> dict[str, Any]:
    machine = run.facts["machine"]
    return {
        "gpu": machine.get("gpu", "DRY RUN"),
        "arch": machine.get("arch", "sm_90"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": machine.get("torch", "-"),
        "toolkit": run.facts["toolkit"],
        "compilers": run.facts["compilers"],
        "dry_run": run.dry,
        "commit": run.commit,
        "command": "bench/gpu_check.sh " + " ".join(sys.argv[1:]),
        "machine": machine,
        "kernels": run.facts["kernels"],
        "steps": run.steps,
        "checks": run.checks,
        "skipped": run.skipped,
        "ceilings": run.timings.get("ceilings", {}),
        "timings": run.timings.get("rows", []),
    }


def result_path(folder: Path, found: dict[str, Any]) -> Path:
    """A second run of a day on one GPU does not write over the first."""
    gpu = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower().removeprefix("nvidia ")).strip("-")
    stem = f"{found['date']}-{gpu}"
    names = (f"{stem}.json", *(f"{stem}-{i}.json" for i in range(2, 1000)))
    return next(folder / name for name in names if not (folder / name).exists())


def record(run: Run) -> str:
    from hebatron_kernels import _evidence  # here: the build before it may have made the modules anew

    found = results(run)
    path = result_path(run.work if run.dry else RESULTS, found)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    run.written = path
    if run.dry:
        try:
            _evidence.record(path)
        except ValueError as refusal:
            print(f"evidence, as it must: {refusal}")
        else:
            raise RuntimeError("the evidence table took a dry run")
        (run.work / "README.md").write_text(
            rewritten(README.read_text(encoding="utf-8"), generated(run.work)), encoding="utf-8"
        )
        gpu_tiles.rewritten(
            gpu_tiles.TILES.read_text(encoding="utf-8"), gpu_tiles.measured(found["timings"], 1)
        )
        return "refused as evidence, table made in a temporary file"
    for kernel, said in _evidence.record(path).items():
        print(f"evidence: {kernel}: {said}")
    README.write_text(rewritten(README.read_text(encoding="utf-8"), generated()), encoding="utf-8")
    gpu_tiles.main(str(path))
    return str(path.relative_to(ROOT))


STEPS: dict[str, Callable[[Run], str]] = {
    "build": build,
    "conformance": conformance,
    "tests": tests,
    "sanitizer": sanitizer,
    "timings": timings,
    "record": record,
}


def perform(run: Run, wanted: list[str], total: float, keep_in: Path | None) -> None:
    """Every step in its order. Deadlines are sums, so that a step has what the ones before it left."""
    scale = total / sum(SECONDS[name] for name in wanted)
    run.deadline = time.monotonic()
    for name in wanted:
        run.deadline += scale * SECONDS[name]
        begin, before = time.monotonic(), len(run.checks)
        print(f"== {name} ({run.left():.0f} s)", flush=True)
        try:
            said = STEPS[name](run)
        except (RuntimeError, OSError, ValueError, KeyError) as error:  # recorded, and the next step goes on
            said = f"{type(error).__name__}: {error}"
            run.check(name, "ran", False, said[:1000])
        taken = time.monotonic() - begin
        failed = [check for check in run.checks[before:] if not check["passed"]]
        run.steps.append({"step": name, "seconds": round(taken, 1), "failed": len(failed), "said": said})
        print(f"   {taken:.1f} s, {len(failed)} failed checks: {said}", flush=True)
        for check in failed[:10]:
            print(
                f"   FAILED {check['kernel']} {check['check']} {check.get('name', '')}: {check['detail'][:300]}"
            )
        if keep_in is not None:
            keep(run, keep_in)
        if name == "build" and not run.dry and not run.facts["kernels"]:
            print("   nothing was built: there is no GPU module to check")
            break


def keep(run: Run, folder: Path) -> None:
    """The record so far, the tables and every log, for whoever cannot reach this tree. After every step: a run that is
    stopped from outside leaves what it has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "so_far.json").write_text(json.dumps(results(run), indent=1) + "\n", encoding="utf-8")
    logs = folder / "logs.txt"
    with logs.open("w", encoding="utf-8") as file:
        for log in sorted(run.work.glob("*.log")):
            file.write(f"\n==== {log.name}\n{log.read_text(encoding='utf-8', errors='replace')}")
    if run.written is not None:
        for path in (run.written, README, gpu_tiles.TILES, ROOT / "hebatron_kernels" / "evidence.json"):
            shutil.copy2(path, folder / path.name)


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
    begin = time.monotonic()
    with TemporaryDirectory() as work:
        run = Run(options, Path(work))
        perform(run, [name for name in STEPS if name in wanted], options.seconds, options.keep)
    failed = sum(not check["passed"] for check in run.checks)
    label = "DRY RUN: " if run.dry else ""
    passed = f"{len(run.checks) - failed} of {len(run.checks)} checks passed"
    print(f"{label}{passed}, {len(run.skipped)} things skipped")
    print("whole models, in 8 minutes more: python bench/bench_model.py --device cuda")
    print(f"{label}{'FAILED' if failed else 'passed'} in {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

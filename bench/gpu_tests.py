"""The step `tests` of bench/gpu_check.sh: pytest -m gpu, a process a kernel, several side by side.

A test that faults or hangs ends its process and has its name in the record; the process is begun again behind it, so
that it costs no other test. tests/gpu/conftest.py tells of each test as it begins and ends (--gpu-record), runs none
that the file already names, and ends a process whose CUDA context a fault has broken.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common import GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD, OTHERS, TRITON
from gpu_record import Record
from gpu_watch import LATE, Event, said, watch

PARALLEL = 8  # of 16 cores: each has a host thread that launches, and Triton's compiler
FIRST_S, SILENCE_S = 90.0, 45.0  # eight import torch at once; the slowest test compiles six Triton kernels
MOST_STARTS = 4  # of one process; each costs the ten seconds of importing torch
MODULE = "tests/gpu/test_gpu_{}.py"


@dataclass
class Job:
    """The tests of one file that -k takes, for one kernel, and what became of them."""

    kernel: str
    file: str
    select: str = ""
    found: int = 0  # tests that pytest took
    begun: list[str] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    checks: int = 0

    @property
    def name(self) -> str:
        return (
            f"tests {self.kernel} {Path(self.file).stem} {self.select}".strip()
            .replace("/", "_")
            .replace(" ", "_")
        )


def jobs_of(kernels: list[str], dry: bool) -> list[Job]:
    """The longest first: many tiles, or kernels that Triton compiles."""
    grouped, gradients = (MODULE.format(f"grouped_gemm{part}") for part in ("", "_gradients"))
    jobs = [Job(kernel, grouped, name) for name, (kernel, _) in GROUPED_GEMM.items()]
    jobs += [Job(name, MODULE.format(noun), part) for name, (noun, parts) in TRITON.items() for part in parts]
    for way, table in (("way_back", GROUPED_GEMM_DGRAD), ("wgrad", GROUPED_GEMM_WGRAD)):
        jobs += [Job(kernel, gradients, f"{name} and {way}") for name, (kernel, _) in table.items()]
    jobs += [Job(kernel, MODULE.format(noun), select) for kernel, (noun, select) in OTHERS.items()]
    jobs = [job for job in jobs if (dry and job.kernel not in TRITON) or job.kernel in kernels]
    jobs += [Job("model", MODULE.format("model")), Job("grouped_gemm", grouped, "automatic")]
    if dry:  # a hang has no name there, and a process costs more than its tests
        jobs = [Job(Path(file).stem, file) for file in dict.fromkeys(job.file for job in jobs)]
    return jobs


def run(record: Record, jobs: list[Job]) -> int:
    """Tests that ended."""
    with ThreadPoolExecutor(4 if record.dry else PARALLEL) as pool:
        list(pool.map(partial(run_job, record), jobs))
    return sum(len(job.ended) for job in jobs)


def run_job(record: Record, job: Job) -> None:
    log, events, why = record.work / f"{job.name}.log", record.work / f"{job.name}.jsonl", LATE
    words, select = [sys.executable, "-m", "pytest", "-m", "gpu", job.file, "--tb=short"], job.select
    if record.dry:  # the cheapest tests of each kind, on the emulator
        words += ["--gpu-stand-in", "emulator"]
        select = " and ".join(filter(None, [select, "(smallest or automatic or (113 and residual))"]))
    words += ["--gpu-record", str(events), "-p", "no:cacheprovider", *(["-k", select] if select else [])]
    for _ in range(MOST_STARTS):
        before, why = len(job.begun), LATE
        if not record.left():
            break
        alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # without what other packages have brought
        why = watch(
            words, log, events, partial(take, record, job), record.deadline, FIRST_S, SILENCE_S, **alone
        )
        for test in set(job.begun) - job.ended:
            take(record, job, {"event": "failed", "test": test, "check": "values", "detail": why})
        if why in ("", LATE) or len(job.begun) == before:
            break
    if why:
        left = f"{job.found - len(job.begun)} of {job.found} tests not begun"
        last = said(log).splitlines()[-1:] or ["nothing"]
        record.check(job.kernel, "values", False, f"{left}: {why}: {last[0]}"[:500], job.select)
    elif not record.dry and not job.checks:
        record.check(job.kernel, "values", False, "every test was skipped, or none was found", job.select)


def take(record: Record, job: Job, event: Event) -> None:
    """An event of tests/gpu/conftest.py."""
    job.found = event.get("found", job.found)
    if "test" not in event:
        return
    test = event["test"]
    if event["event"] == "start":
        job.begun.append(test)
        return
    job.ended.add(test)
    name = test.partition("::")[2]
    if event["event"] == "skipped":
        record.skipped.append(f"{name}: {event['detail']}")
    else:
        job.checks += 1
        record.check(job.kernel, event["check"], event["event"] == "passed", event["detail"], name)

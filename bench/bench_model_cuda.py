"""The whole model on one GPU against dense models of comparable quality: python bench/bench_model.py --device cuda

    python bench/bench_model.py --device cuda [--seconds 480] [--out bench/results/model-DATE-GPU.json]
    python bench/bench_model.py --device cuda --dry-run      the same code on the CPU at toy sizes, figures of nothing

30B-A3B, and dense models of Gemma-3-27B's and Mistral-Small-24B's shape, all with random bf16 weights, one on the GPU
at a time, each with both backends: `native`, our CUDA kernels by name, whatever has been proved of them, and `torch`,
our torch form. Prefill of 1,024 to 65,536 tokens; decode at batch 1, 8, 32 and the largest that fits behind 65,536.

Beside each time stands its floor (floors.py) by the rates of a copy and of an 8192^3 product measured in the same
process, and by an H100's constants; beside each ratio to a dense model the ratio of their floors, which is what physics
allows: 8.6 at batch 1, 11 at the batch that fits 80 GB, 6 to 7 in prefill.

Each model and backend is a process of its own (gpu_model.py): what faults or hangs is named, the process is started
again behind it, and the rest goes on. The record is written anew with every result. Native forms of all models come
first, most wanted cases first; what finds no time is named as skipped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gpu_model
import torch
from common import ROOT
from floors import H100, Machine
from gpu_device import Device, machine
from gpu_model_cases import REAL, TOY, Plan, Row, ratios
from gpu_record import result_path, tree_commit
from gpu_table import RESULTS
from gpu_watch import LATE, end_all_on_sigterm, said, watch

from hebatron_kernels import _native

# Of the whole time, in this order; what one does not need is the next one's. A GPU's first use and 63 GB of weights
# are about 25 s of each: of 240 s in all the last two may find no time, ours has 50 s for its cases.
SHARES = {("native", 0): 0.31, ("native", 1): 0.19, ("native", 2): 0.14}
SHARES |= {("torch", 0): 0.18, ("torch", 1): 0.10, ("torch", 2): 0.08}
SILENCE_S = 60.0  # longer than any case should take: a kernel hangs
START_S = 120.0  # torch from a cold disk
MOST_STARTS = 3  # of one model and backend


class Record:
    """What is known so far, in the form that bench/gpu_check.sh's records have; written at every event."""

    def __init__(self, plan: Plan, dry: bool, out: Path | None, begin: float) -> None:
        self.plan, self.out, self.begin = plan, out, begin
        facts = {"machine": machine(torch.device("cpu")), "kernels": {}, "toolkit": 0} if dry else gpu_facts()
        found = facts["machine"]
        self.head: Row = {
            "gpu": found["gpu"],
            "arch": found["arch"],
            "toolkit": facts["toolkit"],
            "kernels": facts["kernels"],
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "torch": found["torch"],
            "dry_run": dry,
            "commit": tree_commit(),
            "command": shlex.join(["python", *sys.argv]),
            "machine": found,
            # the kernels of `native`, and where each has run as it stands
            "native": "the CPU's kernels (dry run)" if dry else f"by name; {_native.build_info()['_cuda']}",
        }
        self.checks: list[Row] = []
        self.rows: list[Row] = []
        self.ceilings: list[Row] = []
        self.built: list[Row] = []

    def take(self, event: Row) -> None:
        for kind, kept in (
            ("check", self.checks),
            ("row", self.rows),
            ("ceilings", self.ceilings),
            ("built", self.built),
        ):
            if kind in event:
                kept.append(event[kind])
                show(kind, event[kind])
        self.write()

    def failed(self, model: str, backend: str, what: str, why: str) -> None:
        """Of a process that ended in the middle of `what`: a case, or what comes before them."""
        name = f"{model} {backend} {what}"
        self.checks.append({"kernel": "model", "check": "ran", "name": name, "passed": False, "detail": why})
        if what in [case.name for case in self.plan.cases]:
            self.rows.append({"model": model, "backend": backend, "case": what, "error": why})
        print(f"FAILED {name}: {why}", flush=True)
        self.write()

    def machine(self) -> Machine:
        """The rates of the first process, for all floors that are held against each other."""
        if not self.ceilings:
            return H100
        first = self.ceilings[0]
        return Machine("measured", first["flops_per_second"], first["bytes_per_second"])

    def skip_rest(self, model: str, backend: str, why: str) -> None:
        for case in self.plan.cases:
            if case.name not in self.done(model, backend):
                row = {"model": model, "backend": backend, "case": case.name, "skipped": why}
                self.rows.append(row)
        self.write()

    def done(self, model: str, backend: str) -> list[str]:
        return [row["case"] for row in self.rows if (row["model"], row["backend"]) == (model, backend)]

    def contents(self) -> Row:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        timings = [row for row in self.rows if "skipped" not in row]
        skipped = [row for row in self.rows if "skipped" in row]
        return self.head | {
            "finished": now,
            "seconds": round(time.monotonic() - self.begin, 1),
            "checks": self.checks,
            "skipped": [f"{r['model']} {r['backend']} {r['case']}: {r['skipped']}" for r in skipped],
            "ceilings": self.ceilings,
            "built": self.built,
            "timings": timings,
            "ratios": ratios(timings, self.plan, self.machine()),
        }

    def write(self) -> None:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.contents(), indent=1) + "\n", encoding="utf-8")


def gpu_facts() -> Row:
    """Asked in a process of its own: this one holds no memory of the GPU."""
    words = [sys.executable, str(ROOT / "bench" / "gpu_device.py")]
    facts: Row = json.loads(subprocess.run(words, capture_output=True, check=True).stdout.splitlines()[-1])
    return facts


def show(kind: str, what: Row) -> None:
    name = " ".join(str(what[key]) for key in ("model", "backend", "case") if key in what)
    if kind == "check":
        print(f"{'passed' if what['passed'] else 'FAILED'} {what['name']}: {what['detail']}", flush=True)
    elif kind == "ceilings":
        rates = f"{what['bytes_per_second'] / 1e12:.2f} TB/s, {what['flops_per_second'] / 1e12:.0f} TFLOP/s"
        print(f"{name}: floors at {rates}", flush=True)
    elif kind == "built":
        print(f"{name}: built in {what['seconds']} s", flush=True)
    elif "ms" not in what:
        print(f"{name}: {what.get('error', what.get('skipped'))}", flush=True)
    else:
        batch = f" (batch {what['batch']})" if "batch" in what else ""
        form = "one graph" if what["graph"] else "with launches"
        floors = ", ".join(
            f"{what[f'percent_of{of}_floor']} % of {what[f'floor{of}_ms']} ms{' (H100)' if of else ''}"
            for of in ("", "_h100")
        )
        more = "".join(
            f", {what[key]} {said}"
            for key, said in (
                ("experts_used", "experts a layer"),
                ("experts_even", "of an even choice"),
                ("chunk_tokens", "tokens a chunk"),
                ("generate_ms", "ms in generate"),
                ("generate_error", ""),
                ("uncaptured", ""),
            )
            if key in what
        )
        must = f"; must {what['target']['must_ms']} ms" if "target" in what else ""
        rate = f"{what['tokens_per_s']:,} tok/s"
        print(f"{name}{batch}: {what['ms']:.3f} ms {form}, {rate}; {floors}{must}{more}", flush=True)


def show_ratios(rows: list[Row]) -> None:
    print("\ntimes a dense model's speed, and in brackets the ratio of floors: measured rates, an H100's")
    for row in rows:
        batches = " against ".join(str(batch) for batch in row["batches"])
        of = f" ({' against '.join(row['backends'])})" if "backends" in row else ""
        floors = f"({row['floors']}, {row['floors_h100']})"
        print(
            f"{row['case']}, batch {batches}, {row['backend']}{of}: {row['measured']} times {row['dense']} {floors}"
        )


# ---- processes


def measure(record: Record, model: str, backend: str, deadline: float, work: Path) -> None:
    """One model with one backend, begun again behind a case that ended its process."""
    why = LATE
    for attempt in range(MOST_STARTS):
        left = deadline - time.monotonic()
        if left < 1:
            why = LATE
            break
        events, log = (work / f"{model}-{backend}-{attempt}.{ending}" for ending in ("jsonl", "log"))
        words = [model, backend, "--events", str(events), "--seconds", f"{left:.0f}"]
        done = record.done(model, backend)
        command = [sys.executable, gpu_model.__file__, *words, *(["--skip", *done] if done else [])]
        doing = ["start"]

        def take(event: Row, doing: list[str] = doing) -> None:
            doing.append(event.get("begin", doing[-1]))
            record.take(event)

        why = watch(command, log, events, take, deadline, START_S, SILENCE_S)
        lines = said(log).splitlines()
        print("".join(f"    | {line}\n" for line in lines[-15:]), end="", flush=True)
        if why in ("", LATE):
            break
        if doing[-1] not in record.done(model, backend):  # else the row has said it
            record.failed(model, backend, doing[-1], ": ".join([why, *lines[-1:]])[:500])
        if doing[-1] not in [case.name for case in record.plan.cases]:
            break  # it would end there again
    record.skip_rest(model, backend, why)


def dry(record: Record, work: Path) -> None:
    """Every model and backend in this process, on the CPU."""
    for backend, index in SHARES:
        model, events = list(record.plan.shapes)[index], work / f"{backend}-{index}.jsonl"
        gpu_model.run(model, backend, record.plan, Device("cpu"), 60.0, [], events)
        for line in events.read_text(encoding="utf-8").splitlines():
            record.take(json.loads(line))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at toy sizes")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything together")
    parser.add_argument(
        "--out", type=Path, default=None, help="default: bench/results/model-<date>-<gpu>.json"
    )
    options = parser.parse_args(arguments)
    if not options.dry_run and (not torch.cuda.is_available() or _native.cuda_module is None):
        gpu, module = torch.cuda.is_available(), _native.cuda_missing or "built"
        parser.error(f"needs a GPU and the _cuda module (or --dry-run); GPU: {gpu}, _cuda: {module}")
    end_all_on_sigterm()
    begin = time.monotonic()
    record = Record(TOY if options.dry_run else REAL, options.dry_run, options.out, begin)
    if record.out is None and not options.dry_run:
        # not named like gpu_check's: the README's table is made from the newest of those
        record.out = result_path(RESULTS, record.head | {"date": f"model-{record.head['date']}"})
    if options.dry_run:
        print("DRY RUN on the CPU at toy sizes: no figure below means anything")
    print(f"{record.head['gpu']}; native kernels: {record.head['native']}", flush=True)
    with TemporaryDirectory() as work:
        if options.dry_run:
            dry(record, Path(work))
        deadline = begin
        for (backend, index), share in [] if options.dry_run else SHARES.items():
            deadline += share * options.seconds
            measure(record, list(record.plan.shapes)[index], backend, deadline, Path(work))
    found: dict[str, Any] = record.contents()
    show_ratios(found["ratios"])
    for line in found["skipped"]:
        print(f"skipped: {line}")
    record.write()
    failed = [check for check in record.checks if not check["passed"]]
    print(f"{len(found['timings'])} cases, {len(failed)} failed checks in {found['seconds']} s; {record.out}")
    return 1 if failed or any("error" in row for row in found["timings"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The step `timings` of bench/gpu_check.sh: gpu_kernels.py, begun again behind a problem that ended its process, and
without the kernel that did. Kernels whose tests failed are left out from the start: one that hangs would take the
table's time."""

from __future__ import annotations

import sys
from typing import Any

from common import GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD, OTHERS, ROOT, TRITON
from gpu_record import Record
from gpu_watch import LATE, Event, said, watch

TABLES = (GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD)
FIRST_S, SILENCE_S = 60.0, 45.0  # torch and the ceilings; a rival's first call, or the rounds of a problem
MOST_STARTS = 6
LAST_S = 5.0  # of the step, in which no problem is begun


def run(record: Record) -> str:
    log, events = record.work / "timings.log", record.work / "timings.jsonl"
    rows: list[dict[str, Any]] = []
    no_time: list[str] = []
    record.timings = {"rows": rows}
    doing: Event = {}

    def take(event: Event) -> None:
        if "begin" in event:
            doing.update(event)
        elif "row" in event:
            rows.append(event["row"])
            record.checks.extend(event["checks"])
            doing.clear()
        elif "skipped" in event:
            no_time.append(event["skipped"])
        elif "ceilings" in event:
            record.timings["ceilings"] = event["ceilings"]

    why, left_out = LATE, set[str]()
    for _ in range(MOST_STARTS):
        before, why = len(rows), LATE
        if record.left() < 2 * LAST_S:
            break
        without = broken(record)
        record.skipped += [f"timings of {name}: it failed" for name in sorted(without - left_out)]
        left_out |= without
        words = [sys.executable, str(ROOT / "bench" / "gpu_kernels.py"), "--events", str(events)]
        words += ["--seconds", f"{record.left() - LAST_S:.0f}", *(["--device", "cpu"] if record.dry else [])]
        words += [word for name in sorted(without) for word in ("--without", name)]
        why = watch(words, log, events, take, record.deadline, FIRST_S, SILENCE_S)
        named = bool(doing)
        if doing:
            name = f"{doing['begin']} {doing.get('rival', '')}".strip()
            record.check(doing.get("kernel") or "timings", "values", False, why, name)
            doing.clear()
        if why in ("", LATE) or (len(rows) == before and not named):
            break
    print(said(log, 9000))
    record.skipped += [f"timing of {name}: {LATE}" for name in no_time]
    if why or no_time:
        last = said(log).splitlines()[-1:] or ["nothing"]
        record.check("timings", "ran", False, f"{len(no_time)} problems without time; {why}: {last[0]}"[:500])
    return f"{len(rows)} problems, {len(no_time)} skipped"


def broken(record: Record) -> set[str]:
    """The names, as gpu_kernels.py --without takes them, of kernels with a failed value."""
    named = {name: {name} for name in (*OTHERS, *TRITON)}
    for table in TABLES:
        for name, (kernel, _) in table.items():
            named.setdefault(name, set()).add(kernel)
    failed = {
        check["kernel"] for check in record.checks if check["check"] == "values" and not check["passed"]
    }
    return {name for name, kernels in named.items() if kernels & failed}

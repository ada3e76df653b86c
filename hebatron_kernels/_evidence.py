"""Hardware evidence: which CUDA kernel, as it stands in the source, has passed every check on which GPU.

`evidence.json` is a committed table. An entry says that one kernel file with one digest (cmake/digest.py: comments and
layout do not count, the headers of csrc/cuda do), compiled by one major version of nvcc, passed all of CHECKS on one
architecture. Only `record` writes it, from the results file of a run of bench/gpu_check.sh:

    {"gpu": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "date": "2026-12-01", "torch": "2.11.0", "toolkit": 13,
     "dry_run": false,
     "kernels": {"norm": "<digest>"},            what the module that ran was compiled from: _cuda.kernels()
     "checks": [{"kernel": "norm", "check": "values", "passed": true, "detail": ""}, ...]}

A check of the kernel "*" counts for every kernel (the primitives). Further keys, the timings, are left alone.

A noun's Triton form is a kernel too, "moe/triton" (_triton.py has its digest). Its compiler is Triton: "compilers" of a
results file, {"moe/triton": "Triton 3.9"}, goes before "toolkit".
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("evidence.json")

# What a kernel must pass to be chosen unasked. The last four are compute-sanitizer's tools.
CHECKS = ("primitives", "values", "streams", "graphs", "memcheck", "racecheck", "initcheck", "synccheck")

NEVER = "never run on hardware"
KEY = ("kernel", "digest", "toolkit", "arch")
FIELDS = (*KEY, "gpu", "date", "torch", "checks", "results")

Entry = dict[str, Any]


def read() -> tuple[Entry, ...]:
    """The table as it stands on the disk. An entry lacking a field is an error, not an absent entry."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for entry in table["entries"]:
        if sorted(entry) != sorted(FIELDS):
            raise ValueError(f"evidence: an entry must have {', '.join(FIELDS)}, got {', '.join(entry)}")
    return tuple(table["entries"])


entries = read()  # at import: compiled code traces through unproven, and cannot read a file


def unproven(kernel: str, arch: str, *, digest: str, toolkit: int | str) -> str | None:
    """Why this kernel, as it was compiled, has no evidence on this architecture; None where it has.

    Args:
        kernel: its file in csrc/cuda without the ending, "norm".
        arch: of the GPU at hand, "sm_90".
        digest: `_cuda.kernels()[kernel]["digest"]`, asked once at import: compiled code cannot trace such a call.
        toolkit: `_cuda.toolkit()`, the major version of nvcc, likewise; or another compiler by its name and version.
    """
    known = [e for e in entries if e["kernel"] == kernel]
    same = [e for e in known if e["digest"] == digest]
    if any(e["arch"] == arch and e["toolkit"] == toolkit for e in same):
        return None
    if same:
        ran = ", ".join(sorted({f"{e['arch']} with {_compiler(e['toolkit'])}" for e in same}))
        return f"never run on {arch} with {_compiler(toolkit)}, only on {ran}"
    here = [e for e in known if e["arch"] == arch] or known
    if here:
        last = max(here, key=lambda e: e["date"])
        return f"the kernel changed since it ran on {last['gpu']} ({last['date']})"
    return NEVER


def _compiler(toolkit: int | str) -> str:
    return f"CUDA {toolkit}" if isinstance(toolkit, int) else toolkit


def _toolkit(results: dict[str, Any], kernel: str) -> int | str:
    return results.get("compilers", {}).get(kernel, results["toolkit"])


def summary(digests: dict[str, str], toolkit: int) -> str:
    """Where each kernel of a module has run as it was compiled, for a machine with or without a GPU: one line."""
    said: dict[str, list[str]] = {}
    for kernel, digest in digests.items():
        key = (kernel, digest, toolkit)
        ran = [
            f"{e['arch']} ({e['gpu']}, {e['date']})" for e in entries if tuple(e[k] for k in KEY[:3]) == key
        ]
        reason = unproven(kernel, "a GPU", digest=digest, toolkit=toolkit)
        said.setdefault(f"ran on {', '.join(ran)}" if ran else str(reason), []).append(kernel)
    return "; ".join(f"{', '.join(kernels)}: {where}" for where, kernels in said.items())


def judge(results: dict[str, Any], name: str) -> tuple[list[Entry], dict[str, str]]:
    """The entries a results file called `name` earns, and why each of its other kernels earns none."""
    missing = {"gpu", "arch", "date", "torch", "toolkit", "dry_run", "kernels", "checks"} - set(results)
    if missing:
        raise ValueError(
            f"evidence: results must have {', '.join(sorted(missing))}, got {', '.join(results)}"
        )
    if results["dry_run"] is not False:
        raise ValueError("evidence: results must come from a GPU, got a dry run")
    if not re.fullmatch(r"sm_\d+", results["arch"]):
        raise ValueError(f"evidence: arch must look like sm_90, got {results['arch']!r}")
    if type(results["toolkit"]) is not int:
        raise ValueError(f"evidence: toolkit must be a major version, got {results['toolkit']!r}")
    earned: list[Entry] = []
    refused: dict[str, str] = {}
    for kernel, digest in results["kernels"].items():
        mine = [c for c in results["checks"] if c["kernel"] in (kernel, "*")]
        failed = sorted({c["check"] for c in mine if c["passed"] is not True})
        absent = [check for check in CHECKS if check not in {c["check"] for c in mine}]
        if failed or absent:
            why = [f"failed {', '.join(failed)}"] if failed else []
            refused[kernel] = "; ".join(why + ([f"not checked: {', '.join(absent)}"] if absent else []))
            continue
        earned.append(
            {
                "kernel": kernel,
                "digest": digest,
                "toolkit": _toolkit(results, kernel),
                "arch": results["arch"],
                "gpu": results["gpu"],
                "date": results["date"],
                "torch": results["torch"],
                "checks": sorted({c["check"] for c in mine}),
                "results": name,
            }
        )
    return earned, refused


def record(results_path: str | Path) -> dict[str, str]:
    """Takes a results file into the table: what passed gets an entry in place of an older one of the same key, what
    failed loses the one it had. Returns a line a kernel.

    Raises:
        ValueError: the file is incomplete, or a dry run's.
    """
    global entries
    path = Path(results_path)
    results = json.loads(path.read_text(encoding="utf-8"))
    earned, refused = judge(results, path.name)
    tried = {entry["kernel"] for entry in earned} | {
        k for k, why in refused.items() if why.startswith("failed")
    }
    keys = {(k, results["kernels"][k], _toolkit(results, k), results["arch"]) for k in tried}
    rows = [entry for entry in read() if tuple(entry[k] for k in KEY) not in keys] + earned
    rows.sort(key=lambda entry: [str(entry[field]) for field in FIELDS])
    draft = TABLE.with_suffix(".new")
    draft.write_text(json.dumps({"entries": rows}, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, TABLE)
    entries = read()
    said = {entry["kernel"]: f"recorded for {entry['arch']}" for entry in earned}
    return said | {kernel: f"not recorded: {why}" for kernel, why in refused.items()}

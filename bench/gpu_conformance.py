"""Compares prim.cuh on a GPU with the emulator, bit by bit: builds bench/conformance twice, runs both, compares.

    python bench/gpu_conformance.py [--out checks.json] [--seconds 90]
    python bench/gpu_conformance.py --only emulator      without a GPU
    python bench/gpu_conformance.py --dry-run            the same, and the program for the GPU compiled by nvcc

Where bench/conformance/expected.py knows the answer it is the third voice: it says which of the two is wrong, and
without a GPU the emulator is held against it alone. A case that faults or hangs is recorded and the
rest go on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from common import ROOT, find_nvcc, save_checks

sys.path.insert(0, str(ROOT / "bench" / "conformance"))
from expected import EXPECTED

SOURCE = ROOT / "bench" / "conformance" / "conformance.cu"
STALL_SECONDS = 20  # no case takes one second on either side
# What is wrong where a case's name begins like this, the first that fits.
CONSEQUENCES = {
    "wgmma_gathered_ring": "the sm_90a products with gathered rows, and the weights' gradient",
    "wgmma_high": "every sm_90a kernel: they use all of the shared memory",
    "wgmma_rs": "attention_prefill's sm_90a form",
    "wgmma": "every sm_90a kernel",
    "registers": "every sm_90a kernel: setmaxnreg",
    "tma_load_heads": "attention_prefill's sm_90a form",
    "tma_fresh_thread": "an sm_90a kernel that is a thread's first call of CUDA, as in the backward",
    "tma_load": "every sm_90a kernel",
    "tma_multicast": "the grouped_gemm tiles of two blocks",
    "cluster": "the grouped_gemm tiles of two blocks",
    "mbarrier": "every sm_90a kernel",
    "async_copies": "what stages rows by cp.async: the products, attention, the scan",
    "ldmatrix": "every sm_80 kernel with tensor cores",
    "mma": "every sm_80 kernel with tensor cores",
}


@dataclass
class Result:
    ulps: int
    data: bytes
    failure: str = ""


def build_command(target: str, program: Path) -> list[str]:
    check = ROOT / "csrc" / "hebatron" / "check.cpp"
    if target == "hardware":
        arch = "-gencode=arch=compute_90a,code=sm_90a"
        flags = ["-std=c++17", "-O2", "-DNDEBUG", arch, f"-I{ROOT / 'csrc'}"]
        return [str(find_nvcc()), *flags, str(SOURCE), str(check), "-o", str(program)]
    emulator = ROOT / "tests" / "emulator"
    runtime = [str(p) for p in sorted(emulator.glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-DHEBATRON_EMULATOR", "-Wno-unknown-pragmas"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{emulator}"]
    sources = ["-x", "c++", str(SOURCE), str(check), *runtime]
    return ["g++", *flags, *includes, *sources, "-ldl", "-o", str(program)]


def build(target: str, folder: Path) -> Path | str:
    """The program for one target, or the compiler's own words where it fails."""
    program = folder / f"conformance_{target}"
    done = subprocess.run(build_command(target, program), capture_output=True, text=True, check=False)
    return done.stderr[-3000:] if done.returncode else program


def parse(record: Path) -> dict[str, Result]:
    """Every complete record of the file; the last one may have been cut off."""
    found: dict[str, Result] = {}
    data = record.read_bytes() if record.exists() else b""
    at = 0
    while (end := data.find(b"\n", at)) >= 0:
        kind, name, ulps, size = data[at:end].decode().split()
        body = data[end + 1 : end + 1 + int(size)]
        if len(body) < int(size):
            break
        text = body.decode(errors="replace") if kind == "fail" else ""
        found[name] = Result(int(ulps), b"" if text else body, text)
        at = end + 1 + int(size)
    return found


def run(program: Path, names: list[str], deadline: float) -> dict[str, Result]:
    """Runs the cases, starting the program again behind each one that ends or stops it."""
    found: dict[str, Result] = {}
    for attempt in range(len(names) + 1):
        waiting = [name for name in names if name not in found]
        if not waiting:
            break
        if time.monotonic() > deadline:
            return found | {name: Result(0, b"", "not run: out of time") for name in waiting}
        record = program.with_suffix(f".{attempt}")
        error = _run_once(program, waiting, record, deadline)
        new = parse(record)
        found |= new
        left = [name for name in waiting if name not in new]
        if (error or left) and not any(result.failure for result in new.values()):
            culprit = left[0] if left else waiting[-1]
            found[culprit] = Result(0, b"", error or "the program wrote no record of it")
    return found


def _run_once(program: Path, names: list[str], record: Path, deadline: float) -> str:
    """Why the program ended early or was stopped; empty when it ran to its end."""
    process = subprocess.Popen([str(program), str(record), *names], stderr=subprocess.PIPE)
    size, moved = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.02)
        now = time.monotonic()
        new = record.stat().st_size if record.exists() else 0
        if new != size:
            size, moved = new, now
        if now - moved > STALL_SECONDS or now > deadline:
            process.kill()
            process.wait()
            return f"no answer for {now - moved:.0f} s"
    assert process.stderr is not None
    words = process.stderr.read().decode(errors="replace")[-400:]
    return f"the program ended with {process.returncode} {words}" if process.returncode else ""


def difference(name: str, got: bytes, want: bytes, ulps: int, who: str, whom: str) -> str:
    """Where `who` first differs from `whom`, or an empty string."""
    if len(got) != len(want):
        return f"{who} gave {len(got)} bytes, {whom} {len(want)}"
    if ulps:
        return _distance(got, want, ulps, who, whom)
    differs = np.flatnonzero(np.frombuffer(got, np.uint8) != np.frombuffer(want, np.uint8))
    if not differs.size:
        return ""
    at = int(differs[0])
    word = at // 4 * 4
    return (
        f"byte {at} of {len(got)}: {who} {got[at]:#04x}, {whom} {want[at]:#04x} "
        f"(word {word // 4}: {got[word : word + 4][::-1].hex()} and {want[word : word + 4][::-1].hex()}; "
        f"{differs.size} bytes differ)"
    )


def _distance(got: bytes, want: bytes, ulps: int, who: str, whom: str) -> str:
    """fp32 results of approximate functions, all positive and finite: the bits count the units in the last place."""
    mine, theirs = (np.frombuffer(b, np.int32).astype(np.int64) for b in (got, want))
    apart = np.abs(mine - theirs)
    worst = int(apart.argmax())
    if apart[worst] <= ulps:
        return ""
    values = [float(np.frombuffer(b, np.float32)[worst]) for b in (got, want)]
    return f"float {worst}: {who} {values[0]!r}, {whom} {values[1]!r}: {apart[worst]} units apart, {ulps} allowed"


def check(name: str, detail: str, compared: list[str]) -> dict:
    return {
        "kernel": "*",
        "check": "primitives",
        "name": name,
        "passed": not detail,
        "detail": detail,
        "compared": compared,
    }


def compare(names: list[str], sides: dict[str, dict[str, Result]]) -> list[dict]:
    """One check a case. `sides` holds emulator and, where there is a GPU, hardware."""
    checks = []
    for name in names:
        results = {side: found[name] for side, found in sides.items()}
        troubles = [f"{side}: {r.failure}" for side, r in results.items() if r.failure]
        answers = {side: r for side, r in results.items() if not r.failure}
        ulps = max((r.ulps for r in answers.values()), default=0)
        if len(answers) == 2:
            first, second = (answers[side].data for side in ("hardware", "emulator"))
            troubles.append(difference(name, first, second, ulps, "hardware", "emulator"))
        if name in EXPECTED:
            want = EXPECTED[name]()
            troubles += [
                difference(name, r.data, want, ulps, side, "expected") for side, r in answers.items()
            ]
        detail = " | ".join(trouble for trouble in troubles if trouble)
        means = next((what for start, what in CONSEQUENCES.items() if name.startswith(start)), "")
        if detail and means:
            detail += f" (wrong then: {means})"
        checks.append(check(name, detail, [*answers, *(["expected"] if name in EXPECTED else [])]))
    return checks


def conformance(targets: list[str], seconds: float, compiled_only: str = "") -> list[dict]:
    """The checks of the targets that run; `compiled_only` is built and not run."""
    deadline = time.monotonic() + seconds
    with TemporaryDirectory() as folder:
        with ThreadPoolExecutor() as pool:  # the two compilers run side by side
            wanted = [*targets, compiled_only] if compiled_only else targets
            built = dict(zip(wanted, pool.map(lambda t: build(t, Path(folder)), wanted)))
        programs = {t: made for t, made in built.items() if isinstance(made, Path) and t in targets}
        checks = [check(f"build for {t}", made, []) for t, made in built.items() if isinstance(made, str)]
        if not programs:
            return checks
        anyone = str(next(iter(programs.values())))
        names = subprocess.run([anyone, "--list"], capture_output=True, text=True, check=True).stdout.split()
        unknown = set(EXPECTED) - set(names)
        if unknown:
            raise RuntimeError(f"conformance: expected.py knows cases that do not exist: {sorted(unknown)}")
        sides = {target: run(program, names, deadline) for target, program in programs.items()}
    return checks + compare(names, sides)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=["emulator", "hardware"], default=None)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    targets = ["hardware", "emulator"] if options.only is None else [options.only]
    if options.dry_run:
        targets = ["emulator"]
    checks = conformance(targets, options.seconds, "hardware" if options.dry_run else "")
    for row in checks:
        if not row["passed"]:
            print(f"  {row['name']}: {row['detail']}")
    good = sum(row["passed"] for row in checks)
    print(f"conformance: {good} of {len(checks)} cases agree ({' and '.join(targets)})")
    if options.out:
        save_checks(options.out, checks)
    return 0 if good == len(checks) else 1


if __name__ == "__main__":
    sys.exit(main())

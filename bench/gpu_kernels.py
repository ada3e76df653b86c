"""The timing table: every kernel and tile at the model's shapes, its floor, target and rivals, in one process.

    python bench/gpu_kernels.py [--seconds 150] [--events FILE]
    python bench/gpu_kernels.py --device cpu          dry run: the same code at toy sizes, no figure means anything

Medians of CUDA events over 15 calls, each replayed from a CUDA graph behind a flush of 256 MB, rivals in turn. A
problem's floor is the larger of its bytes over a measured copy's rate and its operations over a measured 8192^3
product's. Results are compared with the torch form before anything is timed; tests/gpu holds them to the oracle.

--events FILE tells, a line of JSON each, what is begun and every row: what hangs or faults has a name, and a second
process with the same file goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from common import OTHERS, TRITON
from gpu_device import Call, Ceilings, Clocks, Device, as_row
from gpu_problems import TINY, Maker, Problem, Sizes
from gpu_problems_attention import attentions, decodes, projections
from gpu_problems_conv import convolutions
from gpu_problems_gemm import more_products, products
from gpu_problems_loss import losses
from gpu_problems_moe import layers, mlps
from gpu_problems_norm import norms
from gpu_problems_ssd import scans
from gpu_targets import target
from gpu_watch import lines_of
from torch import Tensor

from hebatron_kernels import _native, _triton

REPEATS = 15
# One problem of each in turn, the most wanted first: time may run out.
TABLES = (products, mlps, attentions, decodes, scans, losses, norms, layers, convolutions)
LAST = (projections, more_products)
FARTHEST = (
    2e-2  # relative distance from the torch form: two bf16 roundings there against one here stay under 1e-2
)


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty holds NaN: a part of a result that no kernel wrote cannot pass for one left from before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _length(value: Tensor) -> float:
    value = value if value.is_floating_point() else value.double()
    return torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float32)).item()


def distance(got: Any, want: Any) -> float:
    """The largest ||got - want|| / ||want|| over the tensors of a result; NaN where either holds one."""
    pairs = [(got, want)] if isinstance(got, Tensor) else list(zip(got, want))
    apart = 0.0
    for g, w in pairs:
        norm, difference = _length(w), _length(g - w)
        apart = max(apart, difference / norm) if norm == norm and difference == difference else float("nan")
        if apart != apart:
            break
    return apart


def in_turn(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    """The problems by name, each name once."""
    for round_ in zip_longest(*(table(sizes, device) for table in TABLES)):
        yield from filter(None, round_)
    for table in LAST:
        yield from table(sizes, device)


def checked(
    device: Device, problem: Problem, begin: Callable[[str], None] = lambda rival: None
) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """The rivals that run and give the reference's result, and what each was found to do. Where the reference itself
    cannot run (its memory is not ours), the others have no distance and tests/gpu alone speaks for them. `begin` is
    told whose turn it is."""
    good: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    lacking = (RuntimeError, ValueError)  # a rival that this torch or GPU lacks is a row, not the end
    with poisoned():
        want = None
        with suppress(*lacking):  # its turn below says why
            want = problem.rivals[problem.reference]() if problem.reference else None
        for name, call in problem.rivals.items():
            begin(name)
            try:
                got = call()
                device.synchronize()  # a fault belongs to the rival that made it
                apart = None
                if want is not None and name not in problem.other_results:
                    apart = distance(got, want)
            except lacking as error:
                rows[name] = {"error": str(error).splitlines()[0][:200]}
                if not device.alive():
                    break
                continue
            rows[name] = {} if apart is None else {"distance": float(f"{apart:.3g}")}
            if apart is not None and not apart <= FARTHEST:
                rows[name]["error"] = f"is {apart:.2e} from the {problem.reference}, {FARTHEST} allowed"
                continue
            good[name] = call
    return good, rows


def kernel_of(problem: Problem, rival: str) -> str | None:
    """The kernel that a rival exercises, where it is one of ours; the choice among several is none of them."""
    if rival == "ours":
        return problem.kernel
    if rival == "triton":
        return _triton.kernel("ssd" if problem.kernel.startswith("ssd") else "moe")
    implementation = rival.partition(":")[0]
    return problem.forms[implementation][0] if implementation in problem.forms else None


def measure(
    device: Device,
    problem: Problem,
    ceilings: Ceilings,
    clocks: Clocks,
    repeats: int,
    begin: Callable[[str], None] = lambda rival: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    good, rivals = checked(device, problem, begin)
    begin("")
    since = time.monotonic()
    floor_ms, bound = ceilings.floor_ms(problem.bytes_moved, problem.flops)
    if device.alive():
        for name, times in device.times(good, repeats).items():
            rivals[name] |= as_row(times, floor_ms, problem.bytes_moved, problem.flops)
    row = {
        "kernel": problem.kernel,
        "case": problem.case,
        "bytes": problem.bytes_moved,
        "flops": problem.flops,
        "floor_ms": round(floor_ms, 5),
        "bound": bound,
        "clocks": clocks.between(since, time.monotonic()),
        "rivals": rivals,
    }
    set_for_it = target(problem.kernel, problem.case)
    if set_for_it is not None:
        row["target"] = set_for_it.as_row(problem.bytes_moved, problem.flops)
    if problem.sizes is not None:
        row["sizes"] = list(problem.sizes)
    checks = []
    for name, found in rivals.items():
        kernel = kernel_of(problem, name)
        if kernel is not None:
            passed = "error" not in found
            detail = "" if passed else found["error"]
            checks.append(
                {
                    "kernel": kernel,
                    "check": "values",
                    "name": f"{problem.case} {name}",
                    "passed": passed,
                    "detail": detail,
                }
            )
    return row, checks


def leave_out(problem: Problem, names: set[str]) -> None:
    """Without these implementations of grouped_gemm or other kernels; nor what may choose or run one of them."""
    forms = {"sm90a", "sm80"}
    layer = {"moe", "moe_permute", "moe_combine", *forms}
    chosen = {"grouped_gemm": forms, "grouped_gemm_wgrad": forms, "moe": layer}
    chosen["ssd_scan_bwd"] = {"ssd_scan", "ssd_scan_bwd"}  # both ways
    choice = chosen.get(problem.kernel, {problem.kernel})
    for rival in list(problem.rivals):
        name = kernel_of(problem, rival) if rival == "triton" else rival.partition(":")[0]
        if name in names or (rival == "ours" and choice & names):
            del problem.rivals[rival]


def show(row: dict[str, Any]) -> None:
    clock = row["clocks"].get("clocks.sm")
    at = f", {clock:.0f} MHz" if clock else ""
    must = f"; must {row['target']['must_ms']:.4f} ms" if "target" in row else ""
    print(f"{row['kernel']} {row['case']}: floor {row['floor_ms']:.4f} ms ({row['bound']}{at}){must}")
    for name, found in sorted(row["rivals"].items(), key=lambda item: item[1].get("ms", 1e9)):
        if "ms" not in found:
            print(f"    {name:<32} {found.get('error', 'not timed')}")
            continue
        launches = "" if found["graph"] else "  with launches"
        print(
            f"    {name:<32} {found['ms']:9.4f} ms  {found['percent_of_floor']:5.1f} % of floor  "
            f"{found['tflops']:7.1f} TFLOP/s  {found['gb_per_s']:7.1f} GB/s{launches}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--events", type=Path, default=None)
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        help=f"leave this out: {', '.join((*OTHERS, *TRITON))}, sm90a, sm80, cutlass",
    )
    options = parser.parse_args()
    if options.device == "cuda" and (not torch.cuda.is_available() or _native.cuda_module is None):
        parser.error(
            f"needs a GPU and the _cuda module; GPU: {torch.cuda.is_available()}, _cuda: {_native.cuda_missing}"
        )
    torch.manual_seed(0)
    deadline = time.monotonic() + options.seconds
    device = Device(options.device)
    dry = not device.cuda
    sizes, repeats = (TINY, 3) if dry else (Sizes(), REPEATS)
    if dry:
        print("DRY RUN on the CPU at toy sizes: no figure below means anything")
    begun = (
        {event["begin"] for event in lines_of(options.events) if "begin" in event} if options.events else {}
    )
    failed: list[str] = []
    skipped: list[str] = []

    def say(**event: Any) -> None:
        if options.events:
            with options.events.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    with Clocks(device.cuda) as clocks:
        ceilings = device.ceilings(sizes.copy_bytes, sizes.matmul_size, repeats)
        print(f"ceilings: {asdict(ceilings)}")
        say(ceilings=asdict(ceilings))
        for name, make in in_turn(sizes, device.device):
            if name in begun:
                continue
            if time.monotonic() > deadline or not device.alive():
                skipped.append(name)
                continue
            say(begin=name)
            problem = make()
            leave_out(problem, set(options.without))

            def begin(rival: str, name: str = name, problem: Problem = problem) -> None:
                say(begin=name, rival=rival, kernel=kernel_of(problem, rival))

            row, checks = measure(device, problem, ceilings, clocks, repeats, begin)
            del problem, begin
            device.free()
            show(row)
            say(row=row, checks=checks)
            failed += [f"{check['name']}: {check['detail']}" for check in checks if not check["passed"]]
    for line in failed:
        print(f"FAILED {line}")
    if device.alive():  # else what is left is for another process
        for name in skipped:
            say(skipped=name)
        say(done=True)
    if skipped:
        why = "out of time" if device.alive() else "a kernel faulted"
        print(f"{why}: {len(skipped)} problems not timed: {', '.join(skipped)}")
    return 1 if failed or skipped else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The README's GPU table, from the newest record in bench/results: python bench/gpu_table.py [--check]"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
BEGIN, END = "<!-- gpu-table -->", "<!-- /gpu-table -->"
RECORD = re.compile(r"\d{4}-\d{2}-\d{2}-.+\.json")
# What the table shows of a record besides problems with a target, in its order; the rest stays in the file.
SHOWN = re.compile(
    r"(up|down) \d+ uniform|(up|down) 16384 zipf|(plain|residual|gated) (1|4096|65536)x\d+( forward.*)?"
)
FORMS = ("sm90a:", "triton", "cutlass:")  # of ours, beside what was chosen
NOTHING = (
    "No GPU run yet: the CUDA kernels are compiled, ours are emulated, all were **never run on hardware**."
)

Record = dict[str, Any]


def newest(folder: Path) -> tuple[str, Record] | None:
    """Name and contents of the record that was finished last."""
    found = [
        (path.name, json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"))
        if RECORD.fullmatch(path.name)
    ]
    return max(found, key=lambda item: item[1]["finished"], default=None)


def _best(rivals: dict[str, dict[str, Any]], wanted: str) -> str:
    """ "0.123 (128x208)": the fastest rival whose name begins with `wanted`, and its tile; or a dash."""
    ms, name = _fastest(rivals, wanted)
    tile = name.partition(":")[2]
    return f"{ms:.4g}" + (f" ({tile})" if tile else "") if name else "-"


def _fastest(rivals: dict[str, dict[str, Any]], wanted: str) -> tuple[float, str]:
    timed = [
        (found["ms"], name) for name, found in rivals.items() if name.startswith(wanted) and "ms" in found
    ]
    return min(timed, default=(0.0, ""))


def _row(row: Record) -> str:
    rivals = row["rivals"]
    ours = rivals.get("ours", {})
    mine = f"{ours['ms']:.4g} | {ours['percent_of_floor']:.0f} %" if "ms" in ours else "- | -"
    must = f"{row['target']['must_ms']:.4g}" if "target" in row else "-"
    clock = row["clocks"].get("clocks.sm")
    forms = [_best(rivals, wanted) for wanted in FORMS]
    known = ("ours", "torch form", "sm80:", *FORMS)
    ms, name = _fastest({name: found for name, found in rivals.items() if not name.startswith(known)}, "")
    other = f"{ms:.4g} ({name})" if name else "-"
    cells = [row["kernel"], row["case"], f"{row['floor_ms']:.4g}", must, mine, *forms, other]
    return f"| {' | '.join([*cells, _best(rivals, 'torch form'), f'{clock:.0f}' if clock else '-'])} |"


def table(name: str, record: Record) -> str:
    passed = sum(check["passed"] for check in record["checks"])
    ceilings = record.get("ceilings", {})
    lines = []
    if record["dry_run"]:
        lines.append("**Dry run: the figures are of a CPU at toy sizes and mean nothing.**")
    machine, commit = record["machine"], record["commit"]
    lines.append(
        f"{record['gpu']}, driver {machine.get('driver', '-')}, CUDA {record['toolkit']}, torch {record['torch']}, "
        f"{record['date']}, commit {commit}: `bench/gpu_check.sh`, {passed} of {len(record['checks'])} checks passed; "
        f"all figures in `bench/results/{name}`."
    )
    if ceilings:
        lines.append(
            f"Floors count bytes at {ceilings['bytes_per_second'] / 1e12:.2f} TB/s (a copy) and operations at "
            f"{ceilings['flops_per_second'] / 1e12:.0f} TFLOP/s (an 8192^3 product), measured in the same process."
        )
    shown = [
        row
        for row in record.get("timings", [])
        if row["kernel"] != "baseline"
        and ("target" in row or SHOWN.fullmatch(row["case"]) or record["dry_run"])
    ]
    if shown:
        head = ["kernel", "case", "floor ms", "target ms", "ours ms", "of floor", "best sm90a tile"]
        head += ["Triton", "CUTLASS", "other rival", "torch form"]
        lines += ["", f"| {' | '.join([*head, 'SM MHz'])} |", "|---" * (len(head) + 1) + "|"]
        lines += [_row(row) for row in shown]
    return "\n".join(lines)


def generated(folder: Path = RESULTS) -> str:
    found = newest(folder)
    return f"{BEGIN}\n{NOTHING if found is None else table(*found)}\n{END}"


def rewritten(readme: str, block: str) -> str:
    """The README with the block between its markers replaced."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README must hold {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    return before + block + rest.split(END)[1]


def main() -> int:
    readme = README.read_text(encoding="utf-8")
    new = rewritten(readme, generated())
    if sys.argv[1:] == ["--check"]:
        if new != readme:
            print("README's GPU table is not that of the newest record: python bench/gpu_table.py")
        return int(new != readme)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

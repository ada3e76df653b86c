"""The tables of the curriculum experiment, from OUT/runs/*/measured.json.

    python bench/curriculum/summary.py OUT --json bench/results/curriculum.json > tables.md
    python bench/curriculum/summary.py bench/results/curriculum.json

Means over seeds, and half the range between them. A difference between two arms of one seed is taken over the same
items, which all seeds share too: each item's difference is averaged over seeds first, and the standard error is that
of the mean over items. It says nothing of other seeds than these.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Measured = dict[str, Any]  # of one run; see measure.py
Runs = dict[str, dict[int, Measured]]  # by arm and seed
ARMS = ("base", "forward", "reversed", "shuffled", "no-anchor", "sft")
HEBREW = ("easy", "middle", "hard")
ANCHOR = {
    "English": ("bible_en", "book_en", "gum_en", "play_en", "web_en"),
    "math": ("math_en",),
    "code": ("code",),
}
SETS = {
    "next, Hebrew": tuple(f"next/{c}" for c in HEBREW),
    "near, Hebrew": tuple(f"near/{c}" for c in HEBREW),
    "order, Hebrew": tuple(f"order/{c}" for c in HEBREW),
    "all three, Hebrew": tuple(f"{s}/{c}" for s in ("next", "near", "order") for c in HEBREW),
    "next, anchor": ("next/anchor",),
}


def load(path: Path) -> Runs:
    """A folder of runs, or the file that --json wrote."""
    if path.is_dir():
        found = {p.parent.name: json.loads(p.read_text()) for p in sorted(path.glob("runs/*/measured.json"))}
    else:
        found = json.loads(path.read_text())
    runs: Runs = {}
    for name, measured in found.items():
        arm, _, seed = name.rpartition("-seed")
        runs.setdefault(arm, {})[int(seed)] = measured
    return {arm: runs[arm] for arm in ARMS if arm in runs}


def bits(measured: Measured, corpora: Sequence[str], sources: Sequence[str] | None = None) -> float:
    """Bits per byte of these corpora (of these sources) together: every byte counts the same."""
    total, num_bytes = 0.0, 0
    for corpus in corpora:
        for source, value in measured["bpb"][corpus].items():
            if sources is None or source in sources:
                total += value * measured["bytes"][corpus][source]
                num_bytes += measured["bytes"][corpus][source]
    return total / num_bytes


def answers(measured: Measured, sets: Sequence[str]) -> list[int]:
    return [int(c) for name in sets for c in measured["right"][name]]


def percent(measured: Measured, sets: Sequence[str]) -> float:
    right = answers(measured, sets)
    return 100 * sum(right) / len(right)


def cell(by_seed: dict[int, Measured], value: Callable[[Measured], float], digits: int) -> str:
    values = [value(measured) for measured in by_seed.values()]
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def table(runs: Runs, first: str, rows: dict[str, Callable[[Measured], float]], digits: int) -> list[str]:
    lines = [f"| {first} | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for label, value in rows.items():
        lines.append(f"| {label} | {' | '.join(cell(by_seed, value, digits) for by_seed in runs.values())} |")
    return lines


def difference(runs: Runs, one: str, other: str, sets: Sequence[str]) -> tuple[list[float], float]:
    """Points of `one` over `other` by seed, and the standard error over items of their mean over these seeds."""
    by_seed = []
    for seed in sorted(runs[one].keys() & runs[other].keys()):
        pairs = zip(answers(runs[one][seed], sets), answers(runs[other][seed], sets), strict=True)
        by_seed.append([100.0 * (a - b) for a, b in pairs])
    means = [sum(deltas) / len(deltas) for deltas in by_seed]
    items = [sum(deltas) / len(deltas) for deltas in zip(*by_seed, strict=True)]
    mean = sum(items) / len(items)
    variance = sum((d - mean) ** 2 for d in items) / (len(items) - 1)
    return means, math.sqrt(variance / len(items))


def report(runs: Runs) -> str:
    """Every table, as Markdown."""
    groups: dict[str, Callable[[Measured], float]] = {
        f"Hebrew, {corpus}": (lambda m, c=corpus: bits(m, [c])) for corpus in HEBREW
    }
    groups["**Hebrew, all**"] = lambda m: bits(m, HEBREW)
    groups |= {name: (lambda m, s=sources: bits(m, ["anchor"], s)) for name, sources in ANCHOR.items()}
    sets = {name: (lambda m, s=names: percent(m, s)) for name, names in SETS.items()}
    first = next(iter(next(iter(runs.values())).values()))
    sources = {
        f"{corpus}/{source}": (lambda m, c=corpus, s=source: m["bpb"][c][s])
        for corpus, by_source in first["bpb"].items()
        for source in sorted(by_source)
    }
    lines = ["Bits per byte of held-out text, every byte counting the same:", ""]
    lines += table(runs, "held-out text", groups, 3)
    lines += ["", "Right answers among four, per cent (chance 25):", "", *table(runs, "set", sets, 1)]
    lines += ["", "Differences in points, the same items (by seed; mean and its standard error):", ""]
    pairs = [
        (one, other)
        for one, other in (("forward", "reversed"), ("forward", "shuffled"), ("forward", "no-anchor"))
        if one in runs and other in runs
    ]
    lines += [f"| set | {' | '.join(f'{a} over {b}' for a, b in pairs)} |", "|---" * (len(pairs) + 1) + "|"]
    for label, names in SETS.items():
        cells = []
        for one, other in pairs:
            means, error = difference(runs, one, other, names)
            by_seed = ", ".join(f"{value:+.1f}" for value in means)
            cells.append(f"{by_seed}; {sum(means) / len(means):+.1f} ± {error:.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "Bits per byte by source:", "", *table(runs, "source", sources, 3)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measured", metavar="OUT|JSON", type=Path)
    parser.add_argument("--json", type=Path, help="keep everything measured in one file")
    arguments = parser.parse_args()
    runs = load(arguments.measured)
    if not runs:
        parser.error(f"OUT must hold runs/*/measured.json, got {arguments.measured}")
    if arguments.json:
        flat = {f"{arm}-seed{seed}": m for arm, by_seed in runs.items() for seed, m in by_seed.items()}
        arguments.json.write_text(json.dumps(flat, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(report(runs))


if __name__ == "__main__":
    main()

"""All bench_<noun>.py in one run: a table, a JSON file, a roofline, and the rule by which a ratio has fallen.

    OMP_PROC_BIND=true OMP_PLACES=cores hebatron bench [NOUN ...] [--only TEXT ...] [--out FOLDER]

bench/results/kernels.json is such a run; tests/test_bench_ratios.py measures again and compares the ratios.
"""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Case, interleaved, machine, peak, read_rate, save, show

NOUNS = ("norm", "conv", "ssd", "linear", "moe", "attention", "loss")
STORED = Path(__file__).parent / "results" / "kernels.json"
FALL = 0.15  # of a stored ratio: what a test fails at
# A measurement counts when the peak of products around it reads at least this share of what it was for the stored one:
# a neighbour on the machine slows our kernels, which use all of it, more than a peer that waits for memory.
USABLE_PEAK = 0.94


def limits() -> dict[str, float]:
    """Rates a second: operations of both kinds of products, bytes read; medians of five probes."""
    probes = {
        "bfloat16": lambda: peak("bfloat16"),
        "float32": lambda: peak("float32"),
        "read": read_rate,
    }
    return {name: statistics.median(probe() for _ in range(5)) for name, probe in probes.items()}


def measured(noun: str, case: Case, rounds: int, seconds_each: float) -> dict:
    """A row, with the lower of the peaks of products just before and after it: how free the machine was. One probe of
    20 ms reads up to a fifth low by itself: the best of three."""

    def free() -> float:
        return max(peak("bfloat16") for _ in range(3))

    before = free()
    row = interleaved(case, rounds, seconds_each)
    lower = min(before, free())
    return {"noun": noun, **row, "peak_g_per_s": round(lower / 1e9, 1), "commit": machine()["commit"]}


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """The rows of both runs; a case measured anew replaces its row, unless the machine was busier than for that one."""
    rows = {row["case"]: row for row in old}
    for row in new:
        before = rows.get(row["case"])
        if before is not None and not usable([row["peak_g_per_s"]], before):
            print(
                f"{row['case']}: not stored, peak {row['peak_g_per_s']} GFLOP/s, then {before['peak_g_per_s']}"
            )
            continue
        rows[row["case"]] = row
    return sorted(rows.values(), key=lambda row: NOUNS.index(row["noun"]))


def run_suite(nouns: Sequence[str], only: Sequence[str], rounds: int, seconds_each: float, out: Path) -> None:
    """Measure and write OUT/kernels.json, where cases not measured now stay, and OUT/roofline.png."""
    file = out / "kernels.json"
    out.mkdir(parents=True, exist_ok=True)
    new: list[dict] = []
    for noun in nouns:
        module = importlib.import_module(f"bench_{noun}")
        cases = [case for case in module.cases() if not only or any(text in case.name for text in only)]
        torch.manual_seed(0)
        if cases:
            module.check()
        for case in cases:
            new.append(measured(noun, case, rounds, seconds_each))
            show(new[-1])
    now = limits()
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"results": [], "limits": {}}
    if file.exists() and comparable(old):
        raise ValueError(f"bench: --out must hold a run of this machine, got one {comparable(old)}")
    best = {name: max(round(rate / 1e9, 1), old["limits"].get(name, 0)) for name, rate in now.items()}
    results = merged(old["results"], new)
    save(str(file), results, limits=best)
    draw_roofline(results, {name: rate * 1e9 for name, rate in best.items()}, out / "roofline.png")
    print_table(new)
    print(f"{file} and {out / 'roofline.png'}")


def print_table(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "ms", "rate", "% of", "limit", "peers: times the time", box=None)
    for row in results:
        (ours, value), *peers = row["rivals"].items()
        unit = "GB/s" if row["limit"] in ("copy", "read") else "GFLOP/s"
        ratios = ", ".join(f"{name} {peer[f'times_slower_than_{ours}']:.2f}" for name, peer in peers)
        rate, share = f"{value['g_per_s']:.1f} {unit}", f"{value['percent_of_limit']:.0f}"
        table.add_row(row["case"], f"{value['ms']:.3f}", rate, share, row["limit"], ratios)
    console = Console()
    console.width = max(console.width, 130)  # a row a line, where the output is a file as well
    console.print(table)


def draw_roofline(results: list[dict], rates: dict[str, float], path: Path) -> None:
    """Every kernel at its operations for a byte that must move, against the measured limits; peers are hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), dpi=150)
    intensity = [2.0**n for n in range(-4, 15)]
    for name, style in (("bfloat16", "-"), ("float32", "--")):
        roof = [min(rates[name], x * rates["read"]) / 1e9 for x in intensity]
        label = f"{name} products, {rates[name] / 1e9:.0f} GFLOP/s"
        axes.plot(intensity, roof, style, color="black", linewidth=1, label=label)
    colours = dict(zip(NOUNS, pyplot.get_cmap("tab10").colors))  # type: ignore[attr-defined]
    for noun in dict.fromkeys(row["noun"] for row in results):
        for first, row in enumerate(row for row in results if row["noun"] == noun):
            for n, value in enumerate(row["rivals"].values()):
                axes.scatter(
                    row["operations"] / row["bytes"],
                    row["operations"] / value["ms"] / 1e6,
                    s=28 if n == 0 else 14,
                    edgecolors=colours[noun],
                    facecolors=colours[noun] if n == 0 else "none",
                    label=noun if first == n == 0 else None,
                )
    axes.set(xscale="log", yscale="log", xlabel="operations for a byte that must move", ylabel="GFLOP/s")
    what = machine()
    axes.set_title(
        f"{what['cpu']}, {what['threads']} threads; memory read at {rates['read'] / 1e9:.0f} GB/s; peers hollow",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


# ---- what a stored run is held to


def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return found


def comparable(run: dict[str, Any]) -> str | None:
    """Why ratios of this machine say nothing about the stored ones, or None."""
    here = machine()
    for name in ("cpu", "threads"):
        if run[name] != here[name]:
            return f"stored with {name} {run[name]}, here {here[name]}"
    return None


def usable(peaks: Sequence[float], row: dict[str, Any]) -> bool:
    """Whether peaks of products (G operations a second) show a machine as free as when the row was stored."""
    return min(peaks) >= USABLE_PEAK * row["peak_g_per_s"]


def fallen(before: dict, after: dict) -> list[str]:
    """The peers whose ratio to ours is more than FALL below the stored one, in words."""
    ours = next(iter(before["rivals"]))
    found = []
    for name in before["rivals"]:
        old, new = (row["rivals"][name][f"times_slower_than_{ours}"] for row in (before, after))
        if name != ours and new < (1 - FALL) * old:
            found.append(f"{before['case']}: {name} took {old} times our time when stored, now {new}")
    return found

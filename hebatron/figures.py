"""Pictures of metrics.jsonl, drawn with matplotlib: one run in four panels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .metrics import Record, read_metrics


def plot(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Draw metrics.jsonl of a run as one PNG (default: run_dir/metrics.png) and return its path.

    Four panels over steps, with phase bands: training loss, bits per byte by source, learning rate, and by MoE
    layer the entropy of the experts' load.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display, 0.4 s only when used

    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    steps = [r for r in records if r["kind"] == "step" and not r["skipped"]]
    evals = [r for r in records if r["kind"] == "eval"]
    if not steps:
        raise ValueError(f"plot: run_dir must hold at least one training step, got {run_dir}")
    sources = sorted({source for r in evals for source in r["bpb"]})
    figure = Figure(figsize=(12, 7 + 0.09 * len(sources)), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    x = [r["step"] for r in steps]
    axes[0, 0].plot(x, [r["loss"] for r in steps], linewidth=0.8)
    axes[0, 0].set(ylabel="loss (nats per token)", title="training loss")
    for i, source in enumerate(sources):
        points = [(r["step"], r["bpb"][source]) for r in evals if source in r["bpb"]]
        style = ("-", "--", ":", "-.")[i // 10 % 4]  # ten colours, then the next line style
        axes[0, 1].plot(*zip(*points, strict=True), marker=".", linestyle=style, label=source)
    axes[0, 1].set(ylabel="bits per byte", title="held-out text by source")
    axes[1, 0].plot(x, [r["lr"] for r in steps])
    axes[1, 0].set(ylabel="learning rate", xlabel="step", title="learning rate")
    for layer in range(len(steps[0]["router"])):
        axes[1, 1].plot(
            x, [r["router"][layer]["load_entropy"] for r in steps], linewidth=0.8, label=f"MoE {layer}"
        )
    axes[1, 1].set(ylabel="entropy of the load / ln E", xlabel="step", title="router (1 = even)")
    for axis in axes.flat:
        _phase_bands(axis, steps)
    if sources:  # below the panels: names may be many and long
        figure.legend(
            *axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7
        )
    if steps[0]["router"]:
        axes[1, 1].legend(fontsize=8)
    path = Path(out) if out is not None else run_dir / "metrics.png"
    figure.savefig(path, dpi=120)
    return path


def _phase_bands(axis: Any, steps: Sequence[Record]) -> None:
    start = 0
    for i, record in enumerate(steps):
        if i + 1 == len(steps) or steps[i + 1]["phase"] != record["phase"]:
            index = len({r["phase"] for r in steps[:start]})
            axis.axvspan(
                steps[start]["step"] - 0.5, record["step"] + 0.5, alpha=0.06 + 0.08 * (index % 2), color="C0"
            )
            axis.annotate(
                record["phase"],
                (steps[start]["step"], 0.98),
                xycoords=("data", "axes fraction"),
                fontsize=7,
                va="top",
            )
            start = i + 1

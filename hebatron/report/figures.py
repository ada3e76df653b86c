"""Pictures of metrics.jsonl, drawn with matplotlib: one run in four panels, several runs on one page.

The charts of reports are drawn with the same pieces (charts.py). Series are cut to POINTS means, so that a picture
of a long run costs what one of a short run does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..training.metrics import Record, printable_name
from .history import History, load_history, mean, mean_groups, require_steps, seed_groups, together

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too, without the yellow that white paper swallows
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
DASHES = ("-", "--", ":", "-.")
INK = "#1c2330"
POINTS = 600  # of a line: twice the pixels of a panel in a report
Floats = npt.NDArray[np.float64]
Xs = dict[int, float]  # step -> place on the x axis


@contextmanager
def drawing() -> Iterator[type[Figure]]:
    """The Figure class, under this file's style. Not pyplot: no global state, no display, 0.4 s only when used."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(
            'figures: matplotlib must be installed, got none; run: pip install "matplotlib>=3.8"'
        ) from error
    style: dict[str, Any] = {
        "text.parse_math": False,  # a "$" in a source's name is a "$"
        "svg.fonttype": "none",  # text stays text: small, searchable, and Hebrew is ordered by the browser
        "svg.hashsalt": "hebatron",  # the same run gives the same bytes
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": INK,
        "grid.alpha": 0.12,
        "legend.frameon": False,
        "legend.handlelength": 2.6,
        "legend.fontsize": 8,
        **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
        **{f"axes.{part}": INK for part in ("edgecolor", "labelcolor")},
    }
    with matplotlib.rc_context(style):  # type: ignore[arg-type]  # a Literal of 300 keys
        yield Figure


def look(index: int) -> dict[str, Any]:
    """Colour and line style of the index-th series: 28 different ones."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": DASHES[index // len(PALETTE) % len(DASHES)],
    }


def label(name: str) -> str:
    """A name out of a file as a label: matplotlib leaves out labels that begin with an underscore."""
    text = printable_name(name)
    return f" {text}" if text.startswith("_") else text


def thin(values: npt.ArrayLike, points: int = POINTS) -> Floats:
    """Means of runs of nearly equal length, at most `points`."""
    array = np.asarray(values, np.float64)
    if len(array) <= points:
        return array
    edges = np.linspace(0, len(array), points + 1).astype(np.int64)
    return np.add.reduceat(array, edges[:-1]) / np.diff(edges)


def smooth(values: Sequence[float]) -> Floats:
    """Exponential moving average, corrected for its start: over about a fortieth of the run, 5 steps at least."""
    keep = 1 - 1 / max(5.0, len(values) / 40)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return np.array(out)


# ---------------------------------------------------------------- pieces


def draw_loss(axis: Axes, steps: Sequence[Record], x: Xs, **style: Any) -> None:
    """The loss as it was, faint, and smoothed."""
    places, losses = thin([x[r["step"]] for r in steps]), [r["loss"] for r in steps]
    faint = {key: value for key, value in style.items() if key not in ("linestyle", "label")}
    axis.plot(places, thin(losses), linewidth=0.6, alpha=0.3, **faint)
    axis.plot(places, thin(smooth(losses)), linewidth=1.5, **style)
    axis.set(ylabel="loss (nats per token)", title="training loss")


def draw_rate(axis: Axes, steps: Sequence[Record], x: Xs, **style: Any) -> None:
    axis.plot(thin([x[r["step"]] for r in steps]), thin([r["lr"] for r in steps]), **style)
    axis.set(ylabel="learning rate", title="learning rate", ylim=(0, None))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def draw_source(axis: Axes, evals: Sequence[Record], x: Xs, source: str, **style: Any) -> None:
    """One source's bits per byte; an evaluation without the source is left out."""
    points = [(x[r["step"]], r["bpb"][source]) for r in evals if source in r["bpb"]]
    axis.plot(*zip(*points, strict=True), marker=".", **style)


def draw_mean(axis: Axes, evals: Sequence[Record], x: Xs, sources: Sequence[str], **style: Any) -> None:
    """The mean of `sources` in the evaluations that have them all."""
    whole = [r for r in evals if all(source in r["bpb"] for source in sources)]
    if whole and sources:
        means = [mean(r["bpb"][source] for source in sources) for r in whole]
        axis.plot([x[r["step"]] for r in whole], means, marker=".", **style)


def phase_bands(axis: Axes, phases: Iterable[tuple[str, float, float]], chars: float = 0.0) -> None:
    """A band for each phase (name, start, end on the x axis), its name above the panel as far as it fits in.

    `chars`: characters of small print that fit over the whole x axis."""
    spans = list(phases)
    begin, end = (spans[0][1], spans[-1][2]) if spans else (0.0, 1.0)
    for i, (name, start, stop) in enumerate(spans):
        axis.axvspan(start, stop, alpha=0.05 + 0.07 * (i % 2), color=PALETTE[0], linewidth=0)
        room = int(chars * (stop - start) / max(end - begin, 1e-9))
        text = printable_name(name)
        text = text if len(text) <= room else text[: room - 1] + "…" if room > 2 else ""
        axis.annotate(
            text, (start, 1.0), xycoords=("data", "axes fraction"), xytext=(2, -2),
            textcoords="offset points", fontsize=7, va="top", alpha=0.75,
        )  # fmt: skip


# ---------------------------------------------------------------- one run


def by_step(history: History) -> Xs:
    return {record["step"]: float(record["step"]) for record in history.records}


def by_tokens(history: History) -> Xs:
    return {step: tokens / 1e6 for step, tokens in history.tokens_after.items()}


def plot(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Draw metrics.jsonl of a run as one PNG (default: run_dir/metrics.png) and return its path.

    Four panels over steps, with phase bands: training loss, bits per byte by source, learning rate, and by MoE
    layer the entropy of the experts' load.
    """
    history = load_history(run_dir)
    require_steps(history)
    with drawing() as new_figure:
        figure = new_figure(figsize=(12, 7 + 0.09 * len(history.sources)), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        steps, x = history.steps, by_step(history)
        draw_loss(axes[0, 0], steps, x, **look(0))
        groups = history.by_language(history.sources)
        for i, source in enumerate(itertools.chain.from_iterable(groups.values())):
            draw_source(axes[0, 1], history.evals, x, source, label=label(source), **look(i))
        axes[0, 1].set(ylabel="bits per byte", title="held-out text by source")
        draw_rate(axes[1, 0], steps, x, **look(0))
        for layer in range(len(steps[0]["router"])):
            values = thin([r["router"][layer]["load_entropy"] for r in steps])
            line = {"linewidth": 0.9, "label": f"expert layer {layer}", **look(layer)}
            axes[1, 1].plot(thin([x[r["step"]] for r in steps]), values, **line)
        axes[1, 1].set(ylabel="entropy of the load / ln E", title="router (1 = even)")
        for axis in axes.flat:
            phase_bands(axis, history.phases, chars=90)
        for axis in axes[1]:
            axis.set_xlabel("step")
        if history.sources:  # below the panels: names may be many and long
            named = axes[0, 1].get_legend_handles_labels()
            figure.legend(*named, loc="outside lower center", ncols=3, fontsize=7)
        if steps[0]["router"]:
            axes[1, 1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=6, fontsize=7)
        path = Path(out) if out is not None else Path(run_dir) / "metrics.png"
        figure.savefig(path, dpi=120)
    return path


# ---------------------------------------------------------------- several runs

SMALL_COLUMNS = 6  # of the panels by source


def run_looks(names: Sequence[str]) -> list[dict[str, Any]]:
    """Runs that differ in their seed alone share a colour and differ in the line."""
    looks: dict[int, dict[str, Any]] = {}
    for colour, members in enumerate(seed_groups(names).values()):
        for place, member in enumerate(members):
            looks[member] = {**look(colour), "linestyle": DASHES[place % len(DASHES)]}
    return [looks[i] for i in range(len(names))]


def plot_runs(
    histories: Sequence[History], names: Sequence[str], out: str | Path, over: str = "tokens"
) -> Path:
    """Draw runs on top of each other as one PNG and return its path.

    Over tokens (or steps): training loss, learning rate, the means of Hebrew and of the anchor's languages over the
    sources that all runs have, then one small panel a source.
    """
    with drawing() as new_figure:
        figure = draw_runs(new_figure, histories, names, over)
        figure.savefig(out, dpi=110)
    return Path(out)


Panel = tuple[str, "Callable[[Axes], None]"]  # title, what fills it


def run_panels(
    histories: Sequence[History], names: Sequence[str], over: str
) -> tuple[list[Panel], list[Panel]]:
    """Large panels (loss, learning rate, a mean of each of `mean_groups`), and a small one for every source."""
    looks = run_looks(names)
    places = [by_step(history) if over == "steps" else by_tokens(history) for history in histories]

    def each(draw: Callable[..., None], *arguments: Any, **style: Any) -> Callable[[Axes], None]:
        def fill(axis: Axes) -> None:
            for history, name, x, line in zip(histories, names, places, looks, strict=True):
                draw(axis, history, x, *arguments, label=label(name), **style, **line)
            axis.set_xlabel("step" if over == "steps" else "million tokens")

        return fill

    def loss(axis: Axes, history: History, x: Xs, **line: Any) -> None:
        draw_loss(axis, history.steps, x, **line)

    def rate(axis: Axes, history: History, x: Xs, **line: Any) -> None:
        draw_rate(axis, history.steps, x, **line)

    def averaged(axis: Axes, history: History, x: Xs, sources: Sequence[str], **line: Any) -> None:
        draw_mean(axis, history.evals, x, sources, **line)
        axis.set_ylabel("bits per byte")

    def single(axis: Axes, history: History, x: Xs, source: str, **line: Any) -> None:
        if source in history.sources:
            draw_source(axis, history.evals, x, source, **line)

    large: list[Panel] = [("training loss", each(loss)), ("learning rate", each(rate))]
    for what, members in mean_groups(histories).items():
        large.append((f"{what}, mean of {len(members)} sources", each(averaged, members)))
    sources = dict.fromkeys(source for history in histories for source in history.sources)
    small: list[Panel] = []
    for group, listed in together(histories).by_language(sources).items():
        for source in listed:
            text = label(source)
            title = f"{text if len(text) <= 26 else text[:25] + '…'} ({group})"
            small.append((title, each(single, source, linewidth=1, markersize=3)))
    return large, small


def draw_runs(
    new_figure: type[Figure], histories: Sequence[History], names: Sequence[str], over: str
) -> Figure:
    large, small = run_panels(histories, names, over)
    upper, rows = math.ceil(len(large) / 2), math.ceil(len(small) / SMALL_COLUMNS)
    figure = new_figure(figsize=(13, 0.4 + 3 * upper + 1.75 * rows), layout="constrained")
    grid = figure.add_gridspec(upper + rows, 12, height_ratios=[3] * upper + [1.9] * rows)
    for i, (title, fill) in enumerate(large):
        axis = figure.add_subplot(grid[i // 2, i % 2 * 6 : i % 2 * 6 + 6])
        fill(axis)
        axis.set_title(title)
    for i, (title, fill) in enumerate(small):
        row, column = divmod(i, SMALL_COLUMNS)
        axis = figure.add_subplot(grid[upper + row, column * 2 : column * 2 + 2])
        fill(axis)
        axis.set_title(title, fontsize=7.5)
        axis.set(xlabel="", ylabel="")
        axis.tick_params(labelsize=7)
        if column == 0:
            axis.set_ylabel("bits per byte", fontsize=7)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(names)), fontsize=9)
    return figure

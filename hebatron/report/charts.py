"""The charts of a report as SVG: figures.py's pieces in single panels, and the experts' maps.

E experts, V evaluations.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..router import ENTROPY_ALARM, OVERLAP_ALARM
from ..training.metrics import Record
from .figures import (
    INK,
    PALETTE,
    by_step,
    draw_loss,
    draw_mean,
    draw_rate,
    draw_source,
    drawing,
    label,
    look,
    phase_bands,
    run_panels,
    thin,
)
from .history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Chart = tuple[str, bytes]  # what it shows, SVG
SIZE = (6.4, 3.3)
MAP_COLUMNS = 200  # of an expert map: as many as a small panel has pixels for
MAP_RANGE = 3  # powers of two around an even share


def to_svg(figure: Figure) -> bytes:
    """The figure without its background; its ink follows the reader's light or dark page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], count=1, flags=re.S)
    # the first colour, of most lines, is dark: on a dark page it takes a lighter one
    light, dark = f"color:{INK};--first:{PALETTE[0]}", "color:#e4e8ef;--first:#4ba3e3"
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    at = svg.index(">") + 1
    body = svg[at:].replace(INK, "currentColor").replace(PALETTE[0], "var(--first)")
    return (svg[:at] + style + body).encode()


def panel(
    what: str, fill: Callable[[Axes], None], history: History | None = None, size: float = 1.0
) -> Chart:
    """One panel that `fill` draws in, with the phase bands of `history`. Its legend, of two names or more, stands
    below it; a smaller panel has none."""
    with drawing() as new_figure:
        width, height = SIZE[0] * size, SIZE[1] * size
        figure = new_figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        fill(axis)
        axis.set_title(what)
        if history is not None:
            axis.set_xlabel("step")
            phase_bands(axis, history.phases, chars=80)
        handles, labels = axis.get_legend_handles_labels()
        if len(handles) > 1 and size == 1:
            columns = 3 if max(map(len, labels)) < 24 else 2
            figure.set_size_inches(width, height + 0.17 * -(-len(handles) // columns))
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7.5)
        return what, to_svg(figure)


def comparison_charts(histories: Sequence[History], names: Sequence[str]) -> tuple[list[Chart], list[Chart]]:
    """Several runs over tokens: large panels, and a small one for every source."""
    large, small = run_panels(histories, names, "tokens")
    return [panel(*each) for each in large], [panel(*each, size=0.68) for each in small]


def training_charts(history: History) -> Iterator[Chart]:
    """Loss, learning rate, tokens of a step, the gradient's norm and, where it was trained with, the anchor's KL."""
    steps, x = history.steps, by_step(history)
    yield panel("training loss", lambda axis: draw_loss(axis, steps, x, **look(0)), history)
    yield panel("learning rate", lambda axis: draw_rate(axis, steps, x, **look(0)), history)
    for key, what, unit in (
        ("tokens", "batch size", "tokens of a step"),
        ("grad_norm", "gradient norm before clipping", "L2 norm"),
        ("anchor_kl", "divergence from the frozen base on anchor rows", "KL (nats per token)"),
    ):
        measured = [record for record in steps if record.get(key) is not None]
        if measured:

            def draw(
                axis: Axes, measured: Sequence[Record] = measured, key: str = key, unit: str = unit
            ) -> None:
                places = thin([x[r["step"]] for r in measured])
                axis.plot(places, thin([r[key] for r in measured]), linewidth=1, **look(0))
                axis.set(ylabel=unit, ylim=(0, None))

            yield panel(what, draw, history)


def source_charts(history: History, key: str = "bpb", unit: str = "bits per byte") -> Iterator[Chart]:
    """Held-out text by source, one panel a language, with the mean of its sources."""
    x = by_step(history)
    evals = [{**record, "bpb": record[key]} for record in history.evals if record.get(key)]
    sources = list(dict.fromkeys(source for record in evals for source in record["bpb"]))
    groups = history.by_language(sources) if key == "bpb" else {"chats": sources}
    for group, members in groups.items():

        def draw(axis: Axes, members: Sequence[str] = members) -> None:
            for i, source in enumerate(members):
                draw_source(axis, evals, x, source, label=label(source), linewidth=1, markersize=3, **look(i))
            if len(members) > 1 and key == "bpb":
                draw_mean(axis, evals, x, members, color=INK, linewidth=2, label="mean")
            axis.set_ylabel(unit)

        what = f"held-out text: {group}" if key == "bpb" else "held-out chats"
        yield panel(what, draw, history)


# ---------------------------------------------------------------- experts


def expert_charts(history: History) -> Iterator[Chart]:
    """Entropy of the load, idle experts and overlap of Hebrew and English, a line a layer."""
    steps = [record for record in history.steps if record.get("router")]
    x = by_step(history)
    if not steps:
        return
    layers = range(len(steps[0]["router"]))
    overlaps = [record for record in history.evals if record.get("expert_overlap")]
    series: list[tuple[str, str, list[Record], Any, float | None]] = [
        ("evenness of the experts' load", "entropy / ln E (1 = even)", steps,
         lambda record, layer: record["router"][layer]["load_entropy"], ENTROPY_ALARM),
        ("idle experts", "share of a layer's experts", steps,
         lambda record, layer: record["router"][layer]["dead"], None),
        ("experts shared by Hebrew and English", "overlap of the load (1 = alike)", overlaps,
         lambda record, layer: record["expert_overlap"][layer], OVERLAP_ALARM),
    ]  # fmt: skip
    for what, unit, records, value, alarm in series:
        if records:

            def draw(axis: Axes, unit: str = unit, records: list[Record] = records, value: Any = value,
                     alarm: float | None = alarm) -> None:  # fmt: skip
                places = thin([x[r["step"]] for r in records])
                for layer in layers:
                    line = thin([value(r, layer) for r in records])
                    axis.plot(places, line, linewidth=1, label=f"expert layer {layer}", **look(layer))
                if alarm is not None:
                    axis.axhline(alarm, color=INK, linestyle=":", linewidth=1, label="alarm below")
                axis.set(ylabel=unit, ylim=(-0.02, 1.09))

            yield panel(what, draw, history)


def map_colours() -> Any:
    from matplotlib import colormaps

    # blue to red: told apart by colour-blind readers too
    return colormaps["RdBu_r"].resampled(25).with_extremes(bad="#000000")


def load_image(loads_VE: npt.ArrayLike) -> np.ma.MaskedArray[Any, Any]:
    """log2 of each expert's load over an even share, within +-MAP_RANGE; masked where it got no token."""
    loads = np.asarray(loads_VE, np.float64)
    share = loads * loads.shape[1] / np.maximum(loads.sum(1, keepdims=True), 1)
    with np.errstate(divide="ignore"):
        return np.ma.masked_where(loads == 0, np.log2(share).clip(-MAP_RANGE, MAP_RANGE))


def expert_maps(history: History) -> Iterator[Chart]:
    """For each expert layer, every expert's load at every evaluation, held until the next one before it."""
    evals = [record for record in history.evals if record.get("router_load")]
    if not evals:
        return
    steps = np.array([record["step"] for record in evals])
    columns = np.linspace(0, steps[-1], min(MAP_COLUMNS, int(steps[-1])), endpoint=False)
    shown = np.searchsorted(steps, columns, side="right")
    for layer in range(len(evals[0]["router_load"])):
        image = load_image([record["router_load"][layer] for record in evals])[shown].T
        with drawing() as new_figure:
            import matplotlib
            from matplotlib.ticker import MaxNLocator

            matplotlib.rcParams["image.composite_image"] = False  # a pixel a cell, enlarged by the reader
            figure = new_figure(figsize=(4.3, 2.6), layout="constrained")
            axis = figure.subplots()
            extent = (0, float(steps[-1]), -0.5, image.shape[0] - 0.5)
            look = {"cmap": map_colours(), "vmin": -MAP_RANGE, "vmax": MAP_RANGE, "interpolation": "none"}
            axis.imshow(image, aspect="auto", origin="lower", extent=extent, **look)
            axis.set(xlabel="step", ylabel="expert", title=f"expert layer {layer}")
            axis.grid(False)
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            for _, _, end in history.phases[:-1]:
                axis.axvline(end, color=INK, linewidth=0.8, linestyle=":")
            yield f"load of every expert of layer {layer} at each evaluation", to_svg(figure)


def map_key() -> Chart:
    """The colours of the maps."""
    with drawing() as new_figure:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        figure = new_figure(figsize=(6.4, 0.8), layout="constrained")
        scale = ScalarMappable(Normalize(-MAP_RANGE, MAP_RANGE), map_colours())
        ticks = range(-MAP_RANGE, MAP_RANGE + 1)
        bar = figure.colorbar(scale, cax=figure.subplots(), orientation="horizontal", ticks=list(ticks))
        bar.ax.grid(False)
        bar.set_ticklabels([f"{2.0**t:g}×" for t in ticks])
        bar.set_label("tokens of an expert over an even share; black: none")
        return "colours of the maps, from an eighth of an even share to eight times it", to_svg(figure)

"""A picture of a scored corpus: one panel a measure, in it a box for every source, drawn with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..report.figures import drawing
from ..training.metrics import printable_name
from .corpus import Corpus
from .difficulty import MEASURES, SCORE, split_phases

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "rarity": "rarity of words (bits)",
    "sentence_words": "words a sentence (log scale)",
    "mattr": "variety of words (MATTR-50)",
    "zstd_bits": "compressed bits a character",
    "model_bits": "a small model's bits a character",
    SCORE: "difficulty (mean rank)",
}
MAX_SOURCES, MAX_NAME = 40, 34
EASY, HARD = (0.27, 0.51, 0.71), (0.80, 0.36, 0.26)


def plot_difficulty(corpus: Corpus, out: Path, phases: int = 3) -> Path:
    """Draw every column of `data score` as one PNG and return its path.

    A row is a source, the easiest at the top: thin line 5 to 95 %, box 25 to 75 %, white line the median, all by
    tokens, so that a book counts for more than a caption. The score's panel marks where `phases` equal phases cut.
    Beyond the MAX_SOURCES largest, sources are one row.
    """
    with drawing() as new_figure:
        _draw(new_figure, corpus, phases).savefig(out, dpi=130)
    return out


def _draw(new_figure: type[Figure], corpus: Corpus, phases: int) -> Figure:
    from matplotlib.ticker import NullLocator

    names = [name for name in (SCORE, *MEASURES) if name in corpus.columns]
    if SCORE not in names:
        raise ValueError("plot_difficulty: corpus must be scored, got no scores; run hebatron data score")
    groups = _groups(corpus)
    score, weight = corpus.columns[SCORE], corpus.lengths
    groups.sort(key=lambda group: _quantiles(score[group[1]], weight[group[1]])[2], reverse=True)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(
        figsize=(3.4 + 3.3 * columns, 0.9 + rows * (0.9 + 0.24 * len(groups))), layout="constrained"
    )
    axes = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    medians = [_quantiles(score[inside], weight[inside])[2] for _, inside in groups]
    for axis, name in zip(axes, names, strict=False):
        for y, ((_, inside), median) in enumerate(zip(groups, medians, strict=True)):
            low, first, middle, third, high = _quantiles(corpus.columns[name][inside], weight[inside])
            color = tuple(e + (h - e) * median for e, h in zip(EASY, HARD, strict=True))
            axis.plot([low, high], [y, y], color=color, linewidth=1.2)
            axis.plot([first, third], [y, y], color=color, linewidth=7, solid_capstyle="butt")
            axis.plot([middle, middle], [y - 0.26, y + 0.26], color="white", linewidth=1.8)
        if name == "sentence_words":
            limits = axis.get_xlim()
            limits = max(limits[0], 1), max(limits[1], 2)
            axis.set_xscale("log")
            axis.set_xticks([2, 5, 10, 20, 50, 100, 200, 500], minor=False)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlim(*limits)
        axis.set_title(LABELS[name], fontsize=10)
        axis.grid(False, axis="y")
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    axes[0].set_yticks(range(len(groups)), [label for label, _ in groups])
    axes[0].set_ylim(-0.7, len(groups) - 0.3)
    phase = split_phases(score, weight, [1.0] * phases)
    for part in range(1, phases):
        if (phase == part).any():
            cut = float(score[phase == part].min())
            axes[0].axvline(cut, color="0.25", linewidth=1, linestyle=(0, (4, 3)))
            axes[0].annotate(
                f"{part} | {part + 1}", (cut, 1), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    figure.suptitle(
        f"{len(corpus):,} documents, {corpus.num_tokens:,} tokens by source; median, 25-75 % and 5-95 % of the "
        f"tokens; dashed: {phases} phases of equal tokens",
        fontsize=9,
    )
    return figure


def _groups(corpus: Corpus) -> list[tuple[str, np.ndarray]]:
    """(label, mask) of the largest sources by tokens, and one of the rest."""
    tokens = np.bincount(corpus.source_ids, corpus.lengths, len(corpus.sources))
    largest = [int(i) for i in np.argsort(-tokens, kind="stable") if tokens[i]]
    groups = []
    for i in largest[:MAX_SOURCES]:
        inside = corpus.source_ids == i
        name = printable_name(corpus.sources[i])
        half = MAX_NAME // 2  # both ends: names of one origin differ at the end
        short = name if len(name) <= MAX_NAME else f"{name[: half - 1]}…{name[-half:]}"
        size = f"{tokens[i] / 1e6:.2f} M" if tokens[i] >= 1e5 else f"{tokens[i] / 1e3:.1f} k"
        groups.append((f"{short}  {size}", inside))
    rest = np.isin(corpus.source_ids, largest[MAX_SOURCES:])
    if rest.any():
        groups.append((f"{len(largest) - MAX_SOURCES} smaller sources", rest))
    return groups


def _quantiles(values: np.ndarray, weight: np.ndarray) -> list[float]:
    """5, 25, 50, 75 and 95 % of the weight lie at or below."""
    order = np.argsort(values, kind="stable")
    at = np.searchsorted(np.cumsum(weight[order]) / weight.sum(), (0.05, 0.25, 0.5, 0.75, 0.95))
    return [float(value) for value in values[order][np.minimum(at, len(values) - 1)]]

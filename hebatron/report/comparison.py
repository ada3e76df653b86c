"""Runs beside each other: final bits per byte by source, with differences to the first run.

Runs whose names differ in a trailing -seedN alone are one column: their mean and, from two on, the standard
deviation over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..files import replace_text
from ..training.metrics import printable_name
from ..training.trees import differences, to_table
from . import html
from .charts import comparison_charts
from .history import History, load_histories, mean, mean_groups, seed_groups, spread, together
from .page import order_name


@dataclass(frozen=True)
class Cell:
    """One value of a column: the mean of its runs and their standard deviation (NaN for one run)."""

    mean: float
    deviation: float

    def text(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if self.deviation == self.deviation else "")


@dataclass(frozen=True)
class Comparison:
    """columns: a name and its runs. rows: (language or "means", source, a cell per column; None: not measured)."""

    columns: list[tuple[str, list[int]]]
    rows: list[tuple[str, str, list[Cell | None]]]

    def difference(self, cells: Sequence[Cell | None], column: int) -> str:
        """Against the first column; empty in it, and where one of the two has no value."""
        first, cell = cells[0], cells[column]
        return f"{cell.mean - first.mean:+.3f}" if column and first and cell else ""


def compare(histories: Sequence[History], names: Sequence[str]) -> Comparison:
    """The last evaluation of every run. A source that a run of a column lacks has no value in that column; the means
    are over the sources that every run has."""
    columns = list(seed_groups(names).items())
    finals = [history.evals[-1]["bpb"] if history.evals else {} for history in histories]

    def cell(members: Sequence[int], sources: Sequence[str]) -> Cell | None:
        if not sources or not all(source in finals[i] for i in members for source in sources):
            return None
        means = [mean(finals[i][source] for source in sources) for i in members]
        return Cell(mean(means), spread(means))

    groups = together(histories).by_language(
        dict.fromkeys(source for history in histories for source in history.sources)
    )
    wanted = [
        ("means", f"{name}, mean of {len(sources)}", sources)
        for name, sources in mean_groups(histories).items()
    ]
    wanted += [(group, source, [source]) for group, members in groups.items() for source in members]
    rows = [
        (group, name, [cell(members, sources) for _, members in columns]) for group, name, sources in wanted
    ]
    return Comparison(columns, rows)


def comparison_lines(comparison: Comparison, histories: Sequence[History], names: Sequence[str]) -> list[str]:
    """The table for a terminal: names, which may be Hebrew, stand last or on lines of their own."""
    lines = []
    for i, (column, members) in enumerate(comparison.columns, 1):
        lines.append(
            f"[{i}] {printable_name(column)}" + (f": {len(members)} seeds" if len(members) > 1 else "")
        )
        for member in members:
            steps = histories[member].all_steps
            done, tokens = (steps[-1]["step"], sum(r["tokens"] for r in steps)) if steps else (0, 0)
            lines.append(f"      {done:>8,} steps {tokens:>14,} tokens  {printable_name(names[member])}")
    width = 16 if any(len(members) > 1 for _, members in comparison.columns) else 9
    head = "".join(
        f"{f'[{i + 1}]':>{width}}" + (f"{f'[{i + 1}]-[1]':>9}" if i else "")
        for i in range(len(comparison.columns))
    )
    if len({sum(r["tokens"] for r in history.all_steps) for history in histories}) > 1:
        lines.append("these runs ended, or stand, at different numbers of tokens")
    lines += ["", "final bits per byte of held-out text", f"{head}  source"]
    for group, source, cells in comparison.rows:
        values = "".join(
            f"{cell.text() if cell else '-':>{width}}"
            + (f"{comparison.difference(cells, i) or '-':>9}" if i else "")
            for i, cell in enumerate(cells)
        )
        lines.append(f"{values}  {printable_name(group)}: {printable_name(source)}")
    return lines


# ---------------------------------------------------------------- the page


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Several runs as one HTML page: what they ended at, their curves, where their configurations differ."""
    histories, names = load_histories(run_dirs)
    large, small = comparison_charts(histories, names)
    sections = [
        ("Runs", runs_table(histories, names)),
        ("Final bits per byte", final_table(compare(histories, names))),
        ("Curves", html.charts(large) + "<h3>By source</h3>" + html.charts(small, small=True)),
        (
            "Configuration",
            "".join(map(configuration_table, histories, names, [histories[0]] * len(histories))),
        ),
    ]
    absent = [
        f"{name}: {line}" for history, name in zip(histories, names, strict=True) for line in history.absent
    ]
    replace_text(out, html.page(f"{len(names)} runs compared", html.notices(absent), sections))
    return out


def runs_table(histories: Sequence[History], names: Sequence[str]) -> str:
    means = mean_groups(histories)
    rows = []
    for history, name in zip(histories, names, strict=True):
        last, config = history.steps[-20:], history.config
        bpb = history.evals[-1]["bpb"] if history.evals else {}
        finals = [mean(bpb.get(source, math.nan) for source in sources) for sources in means.values()]
        order = "&ndash;" if config is None else html.text(order_name(config))
        rows.append(
            (
                html.text(name),
                order,
                "&ndash;" if config is None else str(config.training.seed),
                f"{history.all_steps[-1]['step']:,}",
                f"{sum(record['tokens'] for record in history.all_steps):,}",
                f"{mean(record['loss'] for record in last):.3f}",
                *(f"{value:.3f}" for value in finals),
                f"<code>{html.text(str(history.state.get('plan_hash', 'not known'))[:12])}</code>",
            )
        )
    head = ("run", "order", "seed", "steps", "tokens", "last loss", *map(html.text, means), "plan")
    note = "Last loss: mean of the last 20 steps; means in bits per byte over the sources that every run has."
    return html.soft(note) + html.table(head, rows, range(2, 6 + len(means)))


def final_table(comparison: Comparison) -> str:
    if not comparison.rows:
        return html.soft("Absent: no run has an evaluation of held-out text yet.")
    head, rows, group = ["source"], [], ""
    for i, (name, members) in enumerate(comparison.columns):
        seeds = f" ({len(members)} seeds)" if len(members) > 1 else ""
        head += [html.text(name) + seeds] + (["difference"] if i else [])
    for language, source, cells in comparison.rows:
        if language != group:
            rows.append([html.text(language)])
        group = language
        best = min(cell.mean for cell in cells if cell) if any(cells) else math.nan
        line = [html.text(source)]
        for i, cell in enumerate(cells):
            text = (
                "&ndash;" if cell is None else f"<b>{cell.text()}</b>" if cell.mean == best else cell.text()
            )
            line += [text] + ([comparison.difference(cells, i) or "&ndash;"] if i else [])
        rows.append(line)
    note = (
        "At the last evaluation; the lowest in bold, differences to the first column. Runs that differ in a "
        "trailing -seedN are one column: mean ± standard deviation over seeds."
    )
    return html.soft(note) + html.table(head, rows, range(1, len(head)))


def configuration_table(history: History, name: str, first: History) -> str:
    """Where a run's configuration differs from the first run's."""
    title = f"<h3>{html.text(name)}</h3>"
    if history is first:
        return title + html.soft("The others are compared with this one.")
    if history.config is None or first.config is None:
        return title + html.soft("Absent: one of the two configurations cannot be read.")
    old, new = (to_table(replace(config, run_dir=Path())) for config in (first.config, history.config))
    lines = differences(old, new)
    return title + (html.pre("\n".join(lines)) if lines else html.soft("The same but for the folder."))

"""Runs beside each other: final bits per byte by source, with differences to the first run.

Runs whose names differ in a trailing -seedN alone are one column: their mean and, from two on, the standard
deviation over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .history import History, mean, mean_groups, seed_groups, spread, together
from .metrics import printable_name


@dataclass(frozen=True)
class Cell:
    """One value of a column: the mean of its runs and their standard deviation (NaN for one run)."""

    mean: float
    deviation: float

    def text(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if self.deviation == self.deviation else "")


@dataclass(frozen=True)
class Comparison:
    """columns: a name and its runs. rows: (language or mean, source, a cell per column; None: not measured)."""

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
    wanted = [(f"mean of {len(sources)}", name, sources) for name, sources in mean_groups(histories).items()]
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

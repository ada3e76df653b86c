"""The table of final bits per byte: differences to the first run, seeds as mean and deviation, other sources."""

import math
from pathlib import Path

import pytest
from run_records import evaluation, step

from hebatron.report.comparison import compare, comparison_lines
from hebatron.report.history import History


def history(steps: int, **bpb: float) -> History:
    records = [step(i) for i in range(1, steps + 1)]
    return History(Path("."), [*records, evaluation(1, he=9.0, en=9.0), evaluation(steps, **bpb)])


def test_comparison_is_of_the_last_evaluations_against_the_first_run() -> None:
    table = compare([history(3, he=2.0, en=1.0), history(3, he=1.5, en=1.25)], ["a", "b"])
    assert table.columns == [("a", [0]), ("b", [1])]
    assert [row[:2] for row in table.rows] == [
        ("means", "language not known, mean of 2"),
        ("language not known", "he"),
        ("language not known", "en"),
    ]
    means, he, _ = (row[2] for row in table.rows)
    assert [cell.mean for cell in means if cell] == [1.5, 1.375]
    assert [table.difference(he, i) for i in range(2)] == ["", "-0.500"]


def test_comparison_of_seeds_has_mean_and_deviation() -> None:
    runs = [history(3, he=2.0), history(3, he=1.0), history(3, he=3.0)]
    table = compare(runs, ["plain", "x-seed0", "x-seed1"])
    row = next(cells for _, source, cells in table.rows if source == "he")
    assert row[1] is not None and (row[1].mean, row[1].deviation) == (2.0, pytest.approx(math.sqrt(2)))
    assert row[1].text() == "2.000 ± 1.414" and row[0] is not None and row[0].text() == "2.000"


def test_comparison_leaves_open_what_a_run_did_not_measure() -> None:
    table = compare([history(3, he=2.0), history(3, he=1.0, new=5.0), History(Path("."), [step(1)])], "abc")
    cells = {source: row for _, source, row in table.rows}
    assert cells["new"][0] is None and cells["new"][1] is not None and cells["he"][2] is None
    assert table.difference(cells["new"], 1) == "" and table.difference(cells["he"], 2) == ""
    assert not any(group == "means" for group, _, _ in table.rows)  # the third run has no source


def test_comparison_lines_put_names_last_and_say_other_lengths() -> None:
    runs = [history(3, he=2.0), history(4, he=1.0)]
    lines = comparison_lines(compare(runs, ["א\n", "b"]), runs, ["א\n", "b"])
    assert lines[0] == "[1] א\ufffd" and lines[1].split() == ["3", "steps", "192", "tokens", "א\ufffd"]
    assert any("different numbers of tokens" in line for line in lines)
    assert lines[-1].split() == ["-", "-", "-", "language", "not", "known:", "en"]
    assert "    2.000    1.000   -1.000  language not known: he" in lines
    same = [history(3, he=2.0), history(3, he=1.0)]
    assert not any("different" in line for line in comparison_lines(compare(same, "ab"), same, "ab"))

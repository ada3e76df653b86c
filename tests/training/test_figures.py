"""Pictures of one run and of several: what is on them, whatever the names are and however long the run was."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from run_records import EVAL, evaluation, step, write

from hebatron.cli import main
from hebatron.report import figures
from hebatron.report.figures import drawing, label, look, phase_bands, plot, smooth, thin
from hebatron.report.history import History, load_histories

HOSTILE = "_$\\frac{<script>&א\n\u202e"


def runs(root: Path) -> list[Path]:
    """Three runs of other lengths and sources, the last two the same but for the seed."""
    a = [step(i) for i in range(1, 9)] + [evaluation(8, he=2.0, en=1.5, **{HOSTILE: 3.0})]
    b = [step(1), evaluation(1, he=4.0, en=3.0), step(2), evaluation(2, he=2.5, en=1.25)]
    c = [step(1), step(2), evaluation(2, he=1.5, en=1.75)]
    return [write(root / name, records) for name, records in (("a", a), ("b-seed0", b), ("b-seed1", c))]


def test_plot_draws_a_png(tmp_path: Path) -> None:
    records = [step(1), step(2), EVAL, step(3, "formal"), step(4, "formal", skipped=True), step(5, "formal")]
    write(tmp_path, records)
    path = plot(tmp_path)
    assert path == tmp_path / "metrics.png" and path.read_bytes().startswith(b"\x89PNG")
    assert plot(tmp_path, tmp_path / "other.png") == tmp_path / "other.png"
    write(tmp_path, [])
    with pytest.raises(ValueError, match="must hold at least one training step"):
        plot(tmp_path)


def test_plot_takes_any_name(tmp_path: Path) -> None:
    write(tmp_path, [step(1, HOSTILE), evaluation(1, HOSTILE, **{HOSTILE: 1.0})])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot(tmp_path).stat().st_size > 0


@pytest.mark.parametrize(("over", "ends"), [("tokens", [8 * 64e-6, 2 * 64e-6]), ("steps", [8, 2])])
def test_comparison_draws_every_run_and_source(tmp_path: Path, over: str, ends: list[float]) -> None:
    histories, names = load_histories(runs(tmp_path))
    with drawing() as new_figure:
        figure = figures.draw_runs(new_figure, histories, names, over)
        figure.draw_without_rendering()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["training loss", "learning rate", "language not known, mean of 2 sources"]
    shown = "_$\\frac{<script>&א\ufffd\ufffd"
    assert titles[3:] == [f"{name} (language not known)" for name in ("he", "en", f" {shown}")]
    assert [len(axis.lines) for axis in figure.axes] == [6, 3, 3, 3, 3, 1]
    smoothed = figure.axes[0].lines[1::2]
    assert [line.get_xdata()[-1] for line in smoothed[:2]] == pytest.approx(ends)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    colours = [line.get_color() for line in smoothed]
    assert colours[0] != colours[1] == colours[2]
    assert smoothed[1].get_linestyle() != smoothed[2].get_linestyle()


def test_comparison_without_evaluations_has_loss_and_rate(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, [step(1), step(2)]) for name in "ab"]
    histories, names = load_histories(folders)
    path = figures.plot_runs(histories, names, tmp_path / "out.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_verb_compares_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders, out = runs(tmp_path), tmp_path / "x.png"
    assert main(["plot", *map(str, folders), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert out.is_file() and lines[-1] == str(out)
    assert [line for line in lines if line.endswith("language not known: he")] == [
        "           2.000   2.000 ± 0.707   +0.000  language not known: he"
    ]
    assert main(["plot", str(folders[0])]) == 0
    assert capsys.readouterr().out == f"{folders[0] / 'metrics.png'}\n"


def test_plot_names_the_library_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match='matplotlib must be installed, got none; run: pip install "matplot'):
        plot(write(tmp_path, [step(1)]))


def test_thin_keeps_the_mean_and_the_length_in_bounds() -> None:
    for count in (0, 1, 7, 8, 9, 1000):
        values = np.arange(count, dtype=float)
        thinned = thin(values, 8)
        assert len(thinned) == min(count, 8) and (np.diff(thinned) > 0).all()
    assert thin([1.0, 3.0, 5.0, 7.0], 2).tolist() == [2.0, 6.0]


def test_smooth_is_exact_on_a_constant_and_between_its_values() -> None:
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    values = np.sin(np.arange(400.0) * 9)
    assert np.abs(smooth(values)[50:]).max() < 0.4 and smooth(values)[0] == pytest.approx(values[0])
    assert len(smooth([])) == 0


def test_looks_are_all_different_and_labels_are_never_left_out() -> None:
    assert len({tuple(look(i).items()) for i in range(28)}) == 28
    assert label("_x") == " _x" and label("x") == "x"


def test_phase_bands_cut_names_to_their_room() -> None:
    history = History(Path("."), [step(i, "a long name" if i <= 50 else "b") for i in range(1, 101)])
    with drawing() as new_figure:
        axis = new_figure().subplots()
        phase_bands(axis, history.phases, chars=12)
        phase_bands(axis, [])
    assert [text.get_text() for text in axis.texts] == ["a lon…", "b"] and len(axis.patches) == 2

"""metrics.jsonl is cut and continued exactly; router figures; the two reporters."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from run_records import EVAL, SAMPLE, step, write

from hebatron.training import metrics
from hebatron.training.metrics import (
    METRICS,
    LiveReporter,
    MetricsWriter,
    PlainReporter,
    duration,
    load_bars,
    make_reporter,
    printable,
    printable_name,
    read_metrics,
    sparkline,
)


def test_metrics_writer_cuts_what_is_later_than_the_resumed_step(tmp_path: Path) -> None:
    write(tmp_path, [step(1), step(2), EVAL, SAMPLE, step(3), step(4)])
    write(tmp_path, [step(3), step(4)], at=2)
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path)] == [
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("sample", 2),
        ("step", 3),
        ("step", 4),
    ]
    write(tmp_path, [], at=0)
    assert read_metrics(tmp_path) == []


def test_metrics_writer_drops_a_line_cut_by_a_crash(tmp_path: Path) -> None:
    write(tmp_path, [step(1), step(2)])
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-9])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    write(tmp_path, [step(2)], at=1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_read_metrics_names_a_damaged_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run_dir must hold metrics\.jsonl, got"):
        read_metrics(tmp_path)
    for line in ("nonsense", "[1]", '{"step": true}', '{"kind": "step"}'):
        (tmp_path / METRICS).write_text(json.dumps(step(1)) + f"\n{line}\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 must be"):
            read_metrics(tmp_path)


def test_metrics_writer_refuses_nan(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / METRICS, 0) as writer, pytest.raises(ValueError, match="JSON compliant"):
        writer.write({"kind": "step", "step": 1, "loss": math.nan})


def test_bars_and_durations_are_readable() -> None:
    assert load_bars([0, 1, 2, 4, 100]) == " ▁▁▁█" and load_bars([0, 0]) == "  "
    assert len(load_bars([1] * 128)) == 64 and set(load_bars([1] * 128)) == {"▄"}
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█" and sparkline([1.0]) == "▁"
    assert duration(5) == "0:05" and duration(3725) == "1:02:05"


def test_plain_reporter_prints_a_line_every_n_steps_and_each_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with PlainReporter(total_steps=5, every=2) as reporter:
        for number in range(1, 6):
            reporter.step(step(number, skipped=number == 3), [[3, 1, 0, 4]])
        reporter.event(EVAL)
        reporter.event(SAMPLE)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 2/5 (40%)  base  loss 2.5000  lr 1.00e-03  640 tok/s  ETA 1:15"
    assert "skipped, gradient not finite" in lines[1] and lines[3].startswith("step 5/5 (100%)")
    assert lines[4] == "step 2  bits per byte: he 2.000  en 1.500" and lines[6] == "שלום עולם [b]"


def test_live_reporter_shows_loss_sources_phase_and_expert_loads() -> None:
    reporter = LiveReporter(total_steps=4, title="run")
    for record in (step(1), step(2, skipped=True)):
        reporter.step(record, [[3, 1, 0, 4]])
    reporter.event({**EVAL, "chat_loss": {"task/qa": 1.25}})
    reporter.event(SAMPLE)
    console = Console(file=io.StringIO(), width=100, record=True)
    assert reporter.last is not None
    console.print(reporter._panel(reporter.last))
    text = console.export_text()
    for part in ("step 2/4", "base", "ETA 1:15", "640 tok/s", "grad not finite", "5.0000", "bpb he", "2.000"):
        assert part in text
    assert "chat loss task/qa" in text and "1.250" in text
    assert "experts 0" in text and load_bars([3, 1, 0, 4]) in text and "שלום עולם [b]" in text
    assert [
        line for line in text.splitlines() if "loss" in line and "━" in line
    ] == []  # the bar has its own line
    with reporter:
        reporter.note("a note [b]")


def test_reporters_show_names_as_they_are_and_never_obey_them(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a/b [/x] [red]\n\u202e\x1b[2J"
    shown = "a/b [/x] [red]\ufffd\ufffd\ufffd[2J"
    record, event = step(1, phase=name), {**EVAL, "bpb": {name: 2.0}}
    live = LiveReporter(total_steps=4, title=name)
    plain = PlainReporter(total_steps=4, every=1)
    for reporter in (live, plain):
        reporter.step(record, [[3, 1, 0, 4]])
        reporter.event(event)
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(live._panel(record))
    assert console.export_text().count(shown) == 3  # title, phase, source
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(shown in line for line in lines)


def test_printable_shows_control_characters_instead_of_sending_them() -> None:
    assert printable("א\x1b[2J\u202eב\nג\tד") == "א\ufffd[2J\ufffdב\nג\tד"  # code is indented with tabs
    assert printable_name("a\tb\nc") == "a\ufffdb\ufffdc"


def test_make_reporter_is_plain_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_reporter(3, 1, "t"), PlainReporter)
    monkeypatch.setattr(metrics.sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(make_reporter(3, 1, "t"), LiveReporter)

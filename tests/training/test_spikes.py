"""Loss spikes: a rule over the step records alone, told with the rows and documents of the step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import Silent, toy_config, write_corpora

from hebatron.training import spikes
from hebatron.training.metrics import PlainReporter, Record, read_metrics, without_time
from hebatron.training.run import Run, open_run
from hebatron.training.spikes import ENOUGH, WINDOW, LossWatch, spike
from hebatron.training.train import train


def test_spike_needs_enough_losses_and_a_rise_over_their_noise() -> None:
    noise = np.random.default_rng(0).normal(3.0, 0.1, WINDOW).tolist()
    assert spike(noise[: ENOUGH - 1], 100.0) is None
    what = spike(noise[:ENOUGH], 4.0)
    assert what is not None and what.startswith("loss 4.0000 is ") and f"last {ENOUGH} steps" in what
    mean, sigma = np.mean(noise), np.std(noise, ddof=1)
    assert spike(noise, float(mean + 5.99 * sigma)) is None
    assert spike(noise, float(mean + 6.01 * sigma)) is not None
    assert spike([50.0] * 200 + noise, float(mean + 6.01 * sigma)) is not None  # the last WINDOW alone
    assert spike(noise, 0.0) is None  # a fall is none
    assert spike([2.0] * ENOUGH, 2.0 * 1.059) is None and spike([2.0] * ENOUGH, 2.0 * 1.061) is not None


def test_spike_is_rare_on_noise_and_absent_from_a_falling_loss() -> None:
    losses = np.random.default_rng(1).normal(3.0, 0.2, 20_000).tolist()
    assert sum(spike(losses[max(0, i - WINDOW) : i], losses[i]) is not None for i in range(20_000)) == 0
    falling = [10.0 * 0.99**i for i in range(300)]
    assert not any(spike(falling[:i], falling[i]) for i in range(300))


def record(step: int, loss: float | None, phase: str = "p") -> Record:
    return {"kind": "step", "step": step, "phase": phase, "loss": loss, "skipped": loss is None}


def judge(records: list[Record]) -> list[bool]:
    watch = LossWatch([])
    return [watch._judge(one) is not None for one in records]


def test_watch_starts_anew_in_a_phase_and_gets_used_to_a_new_level() -> None:
    level = [record(i, 2.0 + 0.01 * (i % 2)) for i in range(60)]
    assert not any(judge(level))
    assert not any(judge([*level, *(record(60 + i, 5.0, "q") for i in range(30))]))  # another text
    jumped = judge([*level, *(record(60 + i, 5.0) for i in range(60))])
    assert jumped[60] and not any(jumped[70:])
    assert judge([*level, record(60, None), record(61, 2.0)])[-2:] == [
        True,
        False,
    ]  # not finite: told, not kept


def test_watch_started_from_records_says_the_same() -> None:
    rng = np.random.default_rng(2)
    records = [record(i, float(rng.normal(3.0, 0.2)) + 5.0 * (i in (70, 130))) for i in range(200)]
    expected = judge(records)
    assert [i for i, told in enumerate(expected) if told] == [70, 130]
    for stop in range(0, 200, 7):
        watch = LossWatch([{"kind": "eval", "step": 1}, *records[:stop]])
        assert [watch._judge(one) is not None for one in records[stop:]] == expected[stop:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


def test_train_writes_a_spike_with_its_rows_and_documents_and_again_after_a_resume(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spikes, "ENOUGH", 2)
    runs: list[Run] = []

    def opened(config: Any) -> Run:
        runs.append(open_run(config))
        return runs[-1]

    monkeypatch.setattr("hebatron.training.train.open_run", opened)

    def shake(step: int) -> None:  # the weights jump after step 7, the last but one of the second phase
        if step == 7:
            with torch.no_grad():
                runs[-1].model.lm_head.weight.mul_(-30.0)

    found = []
    for name, stops in (("whole", [10]), ("parts", [6, 7, 8, 10])):
        for stop in stops:
            train(toy_config(root, tmp_path / name), stop, reporter=Silent(shake))
        found.append([without_time(r) for r in read_metrics(tmp_path / name)])
    assert found[0] == found[1]
    (alarm,) = [r for r in found[0] if r["kind"] == "alarm"]
    run = runs[0]
    rows = run.steps[7].rows
    assert (alarm["step"], alarm["phase"], alarm["rows"]) == (8, "formal", [rows.start, rows.stop - 1])
    assert "sigma over the" in alarm["what"] and "last 3 steps" in alarm["what"]
    seen = {
        (list(run.plan.corpora)[corpus], document)
        for row in rows
        for corpus, document, _, _ in run.plan.segments[
            run.plan.row_segments[row] : run.plan.row_segments[row + 1]
        ].tolist()
    }
    told = {(name, text) for name, texts in alarm["documents"].items() for text in texts}
    assert told == {(name, f"#{run.plan.corpora[name].hash(i).hex()}") for name, i in seen}
    PlainReporter(12, 1).event(alarm)
    line = capsys.readouterr().out
    assert line.startswith(
        f"ALARM step 8  {alarm['what']} (phase formal, rows {rows.start}..{rows.stop - 1}, "
    )
    assert f"{len(seen)} documents" in line


def test_plan_documents_are_ids_where_there_are_some(root: Path, tmp_path: Path) -> None:
    run = open_run(toy_config(root, tmp_path))
    corpus = run.plan.corpora["en"]
    corpus._ids = np.array([f"doc-{i}".encode() for i in range(len(corpus))])
    documents = run.plan.documents(range(run.plan.num_rows))
    assert set(documents) == {"he", "en"} and len(documents["en"]) == len(set(documents["en"]))
    assert all(name.startswith("doc-") for name in documents["en"])
    assert all(name.startswith("#") and len(name) == 33 for name in documents["he"])

"""What is read back from a run folder: phases, languages, what is absent, names and seeds of several runs."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from run_records import EVAL, evaluation, step, write
from toy import toy_config, toy_train, write_corpora

from hebatron.report.history import (
    History,
    load_histories,
    load_history,
    mean,
    mean_groups,
    seed_groups,
    spread,
    unique_names,
)
from hebatron.training.metrics import METRICS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run of 12 steps with its corpora beside it."""
    root = tmp_path_factory.mktemp("history")
    write_corpora(root)
    toy_train(toy_config(root, root / "run"))
    return root


def test_history_of_a_run_has_all_of_it(trained: Path) -> None:
    history = load_history(trained / "run")
    assert history.absent == [] and history.config is not None
    assert history.phases == [("base", 0, 4), ("formal", 4, 8), ("long", 8, 12)]
    assert history.languages == {"he": "he", "he/he": "he", "en": "en", "en/en": "en"}
    assert history.by_language(["en", "x", "he"]) == {
        "Hebrew": ["he"],
        "English": ["en"],
        "language not known": ["x"],
    }
    assert [name for name, _ in history.phase_evals] == ["base", "formal", "long"]
    assert history.tokens_after[12] == 12 * 64
    assert history.model is not None and history.model.hidden_size == 32
    assert history.plan().hash == history.state["plan_hash"]


def test_history_finds_the_tokenizer_in_the_run_folder(trained: Path) -> None:
    (trained / "tok").rename(trained / "elsewhere")
    try:
        history = load_history(trained / "run")
        assert history.plan().hash == history.state["plan_hash"]
    finally:
        (trained / "elsewhere").rename(trained / "tok")


def test_history_says_what_is_absent(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained / "run", run_dir)
    config = json.loads((run_dir / "config.json").read_text())
    config["data"]["corpora"][1]["path"] = str(tmp_path / "moved")
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "checkpoints" / "step-000012" / "state.json").write_text("{")
    history = load_history(run_dir)
    assert [line.partition(":")[0] for line in history.absent] == ["corpus en", "checkpoint step-000012"]
    assert str(tmp_path / "moved") in history.absent[0]
    assert history.languages == {"he": "he", "he/he": "he"} and history.state == {}
    assert history.model is not None  # final/ states it too
    with pytest.raises(ValueError, match="moved"):
        history.plan()
    (run_dir / "final/config.json").write_text('{"vocab_size":')
    history = load_history(run_dir)
    assert (
        history.model is None
        and history.absent[-1].startswith("model: ")
        and "config.json" in history.absent[-1]
    )
    (run_dir / "config.json").write_text("[]")
    assert load_history(run_dir).config is None
    config["phases"][0]["tokens"] = "many"
    (run_dir / "config.json").write_text(json.dumps(config))
    history = load_history(run_dir)
    assert history.config is None and "phases[0].tokens must be an integer" in history.absent[0]


def test_history_of_metrics_alone(tmp_path: Path) -> None:
    history = load_history(write(tmp_path, [step(1)]))
    assert history.absent == ["configuration: no config.json in the run folder"]
    assert history.model is None and history.languages == {}
    with pytest.raises(ValueError, match="plan: run_dir must hold its configuration, got"):
        history.plan()
    with pytest.raises(ValueError, match=r"run_dir must hold metrics\.jsonl"):
        load_history(tmp_path / "none")


def test_history_keeps_what_is_before_a_damaged_line(tmp_path: Path) -> None:
    write(tmp_path, [step(1), step(2)])
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b"\0\0\n" + json.dumps(step(4)).encode() + b'\n{"kind": "st')
    history = load_history(tmp_path)
    assert [record["step"] for record in history.steps] == [1, 2]
    assert "line 3 must be JSON" in history.absent[0] and "what follows it is not shown" in history.absent[0]


def test_history_refuses_records_without_their_fields(tmp_path: Path) -> None:
    record = step(7)
    del record["lr"], record["phase"]
    with pytest.raises(ValueError, match="must have phase, lr, got none at step 7"):
        load_history(write(tmp_path, [record]))
    with pytest.raises(ValueError, match="must have kind, got none at step 3"):
        load_history(write(tmp_path, [{"step": 3}]))


def test_history_of_one_phase_compares_its_first_and_last_evaluation() -> None:
    records = [evaluation(2), evaluation(5), evaluation(9)]
    names = [name for name, _ in History(Path("."), records).phase_evals]
    assert names == ["step 2", "step 9"]
    assert [name for name, _ in History(Path("."), [EVAL]).phase_evals] == ["base"]


def test_skipped_steps_count_as_tokens_and_not_as_loss() -> None:
    history = History(Path("."), [step(1), step(2, skipped=True), step(3, "next")])
    assert [record["step"] for record in history.steps] == [1, 3]
    assert history.tokens_after == {1: 64, 2: 128, 3: 192}
    assert history.phases == [("base", 0, 2), ("next", 2, 3)]


def test_names_of_runs_are_unique(tmp_path: Path) -> None:
    folders = [tmp_path / part for part in ("a/run", "b/run", "c/other")]
    assert unique_names(folders) == ["a/run", "b/run", "c/other"]
    assert unique_names(folders[1:]) == ["run", "other"]
    with pytest.raises(ValueError, match="runs must be given once each, got run, run"):
        unique_names([folders[0], folders[0]])


def test_runs_that_differ_in_their_seed_are_a_group() -> None:
    names = ["a-seed0", "b", "a-seed12", "a-seedx", "b-seed1"]
    assert seed_groups(names) == {"a": [0, 2], "b": [1, 4], "a-seedx": [3]}


def test_means_are_over_the_sources_that_every_run_has(trained: Path) -> None:
    whole = load_history(trained / "run")
    other = replace(whole, records=[evaluation(1, he=1.0, en=2.0, new=3.0)])
    assert mean_groups([whole, other]) == {"Hebrew": ["he"], "anchor": ["en"]}
    fewer = replace(whole, records=[evaluation(1, he=1.0, new=3.0)])
    assert mean_groups([other, fewer]) == {"Hebrew": ["he"], "language not known": ["new"]}
    assert mean_groups([whole, replace(whole, records=[step(1)])]) == {}


def test_mean_and_spread() -> None:
    assert mean([1.0, 2.0, 6.0]) == 3.0 and math.isnan(mean([]))
    assert spread([1.0, 3.0]) == pytest.approx(math.sqrt(2)) and math.isnan(spread([1.0]))


def test_runs_without_a_step_are_not_compared(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", [step(1)]), write(tmp_path / "b", [step(1, skipped=True)])]
    with pytest.raises(ValueError, match=r"must hold at least one training step, got .*b"):
        load_histories(folders)

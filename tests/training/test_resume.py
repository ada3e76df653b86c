"""A run stopped anywhere and started again has the same bits as one that never stopped."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import Silent, assert_same_run, checkpoint_bits, toy_config, toy_train, write_corpora

from hebatron.curriculum.build import Phase
from hebatron.data.prepare import prepare
from hebatron.tokenizer import load_tokenizer
from hebatron.training.checkpoint import checkpoints, step_of
from hebatron.training.sections import RunConfig
from hebatron.training.train import train

STEPS = 12  # 4 in each of three phases


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(corpora, run folder) of an uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    write_corpora(root)
    result = toy_train(toy_config(root, root / "run"))
    assert result.finished and result.step == STEPS
    return root, root / "run"


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_resume_at_every_step_equals_the_uninterrupted_run_bitwise(
    whole: tuple[Path, Path], tmp_path: Path, stop: int
) -> None:
    config = toy_config(whole[0], tmp_path)
    first = toy_train(config, stop_after=stop)
    assert (first.step, first.finished, first.final) == (stop, False, None)
    assert toy_train(config).finished
    assert_same_run(tmp_path, whole[1])


def test_resume_after_each_single_step_equals_the_uninterrupted_run(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    config = toy_config(whole[0], tmp_path)
    for step in range(1, STEPS + 1):
        assert toy_train(config, stop_after=step).step == step
    assert_same_run(tmp_path, whole[1])


def test_resume_after_each_step_of_a_shuffled_run_with_a_ramp(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    def config(run_dir: Path) -> RunConfig:
        plain = toy_config(whole[0], run_dir)
        phases = (replace(plain.phases[0], batch_tokens=(32, 128)), *plain.phases[1:])
        return replace(plain, phases=phases, order="shuffled")

    total = toy_train(config(tmp_path / "whole")).step
    for step in range(1, total + 1):
        assert toy_train(config(tmp_path / "parts"), stop_after=step).step == step
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_resume_of_a_finished_run_changes_nothing(whole: tuple[Path, Path]) -> None:
    files = [
        path for path in whole[1].rglob("*") if path.is_file() and path.name not in ("config.json", "lock")
    ]
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in files if path.name != "metrics.jsonl"}
    result = toy_train(toy_config(*whole))
    assert result.finished and result.final == whole[1] / "final"
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in before} == before


def test_resume_goes_back_over_a_damaged_checkpoint_and_its_metrics(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    config = toy_config(whole[0], tmp_path, checkpoint_every=3)
    toy_train(config, stop_after=6)
    with (tmp_path / "checkpoints/step-000006/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    reporter = Silent()
    train(config, reporter=reporter)
    assert any("skipped damaged step-000006" in note for note in reporter.notes)
    assert "resuming from step-000003 of 12 steps" in reporter.notes
    assert_same_run(tmp_path, whole[1])


def test_resume_says_when_metrics_are_missing(whole: tuple[Path, Path], tmp_path: Path) -> None:
    config = toy_config(whole[0], tmp_path)
    toy_train(config, stop_after=4)
    (tmp_path / "metrics.jsonl").unlink()
    reporter = Silent()
    train(config, stop_after=5, reporter=reporter)
    assert "metrics.jsonl ends at step 0: the steps after it are not in it" in reporter.notes
    assert checkpoints(tmp_path / "checkpoints")[0].name == "step-000005"


# ---------------------------------------------------------------- signals and kills


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_returns(
    whole: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    config = toy_config(whole[0], tmp_path)
    handler = signal.getsignal(number)

    def after(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), number)

    result = train(config, reporter=Silent(after))
    assert result.step == 5 and signal.getsignal(number) is handler
    assert checkpoints(tmp_path / "checkpoints")[0].name == "step-000005"
    toy_train(config)
    assert_same_run(tmp_path, whole[1])


def test_second_signal_interrupts_at_once(whole: tuple[Path, Path], tmp_path: Path) -> None:
    # A job started in the background of a script inherits an ignored SIGINT; this is about one that listens.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            train(toy_config(whole[0], tmp_path), reporter=Silent(twice))
    finally:
        signal.signal(signal.SIGINT, before)


def train_in_child(config: RunConfig, threads: int) -> None:
    torch.set_num_threads(threads)  # the bits are those of one number of threads
    toy_train(config)


def test_kill_at_any_moment_still_ends_with_the_same_bits(whole: tuple[Path, Path], tmp_path: Path) -> None:
    # forkserver: torch is imported once and not forked from a process whose thread pool runs
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hebatron.training.train", "torch._dynamo"])
    config = toy_config(whole[0], tmp_path, checkpoint_every=1)
    kills, reached = 0, 0
    while reached < STEPS - 1:
        child = context.Process(target=train_in_child, args=(config, torch.get_num_threads()))
        child.start()
        deadline = time.monotonic() + 60
        while child.is_alive() and time.monotonic() < deadline:
            found = checkpoints(tmp_path / "checkpoints")
            if found and step_of(found[0]) >= reached + 3:
                break
            time.sleep(0.001)
        time.sleep(0.004 * (kills % 5))  # into the forward, the backward, the next save
        child.kill()
        child.join()
        now = step_of(checkpoints(tmp_path / "checkpoints")[0])
        assert now > reached, "a restart after a kill made no progress"
        kills, reached = kills + 1, now
    assert kills >= 2
    toy_train(config)
    assert_same_run(tmp_path, whole[1])


# ---------------------------------------------------------------- another run


def test_resume_refuses_another_configuration_naming_it(whole: tuple[Path, Path], tmp_path: Path) -> None:
    config = toy_config(whole[0], tmp_path)
    toy_train(config, stop_after=2)
    before = checkpoint_bits(tmp_path)
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-2))
    with pytest.raises(
        ValueError, match=r"got .*step-000002 of another: optimizer.learning_rate: 0.003 -> 0.01;"
    ):
        toy_train(other)
    assert checkpoint_bits(tmp_path) == before
    assert toy_train(other, stop_after=3, force=True).step == 3


def test_resume_refuses_another_plan_naming_it(whole: tuple[Path, Path], tmp_path: Path) -> None:
    config = toy_config(whole[0], tmp_path)
    toy_train(config, stop_after=2)
    longer = replace(config, phases=(*config.phases, Phase("more", {"en": 1.0}, tokens=64, seq_len=16)))
    with pytest.raises(
        ValueError, match=r"phases: .*plan: [0-9a-f]{12} -> [0-9a-f]{12} \(corpora, phases or order\)"
    ):
        toy_train(longer)
    assert toy_train(longer, force=True).step == STEPS + 1


def test_resume_refuses_a_corpus_prepared_anew_from_other_files(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    config = toy_config(tmp_path, tmp_path / "run")
    toy_train(config, stop_after=2)
    tokenizer, texts = load_tokenizer(tmp_path / "tok"), [tmp_path / "he.jsonl", tmp_path / "more.txt"]
    texts[1].write_text("עוד", encoding="utf-8")
    prepare(texts, tmp_path / "he", tokenizer, overwrite=True)
    with pytest.raises(ValueError, match=r"got .*step-000002 of another: plan: [0-9a-f]{12} -> [0-9a-f]{12}"):
        toy_train(config)
    prepare(texts[:1], tmp_path / "he", tokenizer, overwrite=True)  # the files it had: the run it was
    assert toy_train(config).finished


def test_resume_accepts_another_cadence(whole: tuple[Path, Path], tmp_path: Path) -> None:
    config = toy_config(whole[0], tmp_path)
    toy_train(config, stop_after=2)
    other = replace(config, training=replace(config.training, checkpoint_every=3, keep_last=1, log_every=1))
    toy_train(other)
    assert_same_run(tmp_path, whole[1])
    assert [folder.name for folder in checkpoints(tmp_path / "checkpoints")] == ["step-000012"]

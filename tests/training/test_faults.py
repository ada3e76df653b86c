"""A trainer among faults: the disk refuses, the process is killed at a phase boundary, a signal ends the command."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_cases import bits, saved, trained
from safetensors.torch import save_file
from toy import Silent, checkpoint_bits, toy_config, toy_train, write_corpora

from hebatron.training import checkpoint
from hebatron.training.checkpoint import MODEL, OPTIMIZER, checkpoints, load_checkpoint, newest_valid
from hebatron.training.metrics import read_metrics, without_time
from hebatron.training.sections import RunConfig
from hebatron.training.train import train

CALLS = ("os.rename", "os.fsync", "os.open", "pathlib.Path.mkdir", "pathlib.Path.write_text")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_save_checkpoint_survives_an_error_of_the_disk_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The error comes out as it is, with a name; the old checkpoint is whole; nothing half-written stays."""
    saved(tmp_path, 1)
    errors = 0
    for point in range(100):
        left = point

        def failing(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **keywords: object) -> object:
                nonlocal left
                left -= 1
                if left == -1:
                    raise OSError(number, os.strerror(number))
                return real(*args, **keywords)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", failing(save_file))
            for name in CALLS:
                module, _, attribute = name.rpartition(".")
                owner = Path if module == "pathlib.Path" else sys.modules[module]
                patch.setattr(owner, attribute, failing(getattr(owner, attribute)))
            try:
                saved(tmp_path, 2)
            except OSError as error:
                assert error.errno == number
                errors += 1
            else:
                break
        found, notices = newest_valid(tmp_path)
        assert found is not None and not notices
        names = sorted(path.name for path in tmp_path.iterdir())
        if found.name == "step-000002":  # only the last flush of the parent was refused
            assert names == ["step-000001", "step-000002"]
            shutil.rmtree(found)
        else:
            assert names == ["step-000001"]
    assert errors > 10
    model, optimizer = trained(seed=1)
    load_checkpoint(tmp_path / "step-000001", model, optimizer)
    assert bits(model, optimizer) == bits(*trained())


def test_save_checkpoint_flushes_every_byte_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill cannot show: a page that was never flushed is lost with the power."""
    events: list[tuple[str, str]] = []
    real_fsync, real_rename = checkpoint.fsync, os.rename

    def rename(source: Path, target: Path) -> None:
        events.append(("rename", Path(source).name))
        real_rename(source, target)

    def flush(path: Path) -> None:
        events.append(("fsync", path.name))
        real_fsync(path)

    monkeypatch.setattr(checkpoint, "fsync", flush)
    monkeypatch.setattr(os, "rename", rename)
    final = saved(tmp_path / "checkpoints", 7)
    at = events.index(("rename", ".tmp-step-000007"))
    assert {name for kind, name in events[:at]} == {path.name for path in final.iterdir()} | {
        ".tmp-step-000007"
    }
    assert events[at - 1] == ("fsync", ".tmp-step-000007")  # the folder after its files
    assert events[at + 1 :] == [("fsync", "checkpoints")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(corpora, run folder) of an uninterrupted run of 12 steps, phases ending at 4, 8 and 12."""
    root = tmp_path_factory.mktemp("whole")
    write_corpora(root)
    assert toy_train(toy_config(root, root / "run")).finished
    return root, root / "run"


def test_train_stops_with_the_error_of_a_full_disk_and_goes_on_later(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(whole[0], tmp_path, checkpoint_every=2)
    (tmp_path / "checkpoints").mkdir(parents=True)
    stale = tmp_path / "checkpoints/.tmp-step-000001"
    stale.mkdir()  # of a save that was killed
    (stale / MODEL).write_bytes(b"half")
    real, saves = save_file, 0

    def fills_up(*args: object) -> object:
        nonlocal saves
        saves += 1
        if saves > 2:  # the second checkpoint, at step 4
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / OPTIMIZER))
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fills_up)
        with pytest.raises(OSError, match="No space left on device") as caught:
            toy_train(config)
    assert caught.value.filename is not None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert toy_train(config).finished
    assert checkpoint_bits(tmp_path) == checkpoint_bits(whole[1])


def train_and_die(config: RunConfig, step: int, threads: int) -> None:
    torch.set_num_threads(threads)  # the bits are those of one number of threads

    def die(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, reporter=Silent(die))


def test_kill_around_every_phase_boundary_ends_with_the_same_bits(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """Killed after the step before, at and after each boundary, its checkpoint not yet written."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hebatron.training.train", "torch._dynamo"])
    config = toy_config(whole[0], tmp_path, checkpoint_every=1)
    for step in (3, 4, 5, 7, 8, 9, 11, 12):
        child = context.Process(target=train_and_die, args=(config, step, torch.get_num_threads()))
        child.start()
        child.join(300)
        assert child.exitcode == -signal.SIGKILL
        assert checkpoints(tmp_path / "checkpoints")[0].name == f"step-{step - 1:06d}"
    assert toy_train(config).finished
    assert checkpoint_bits(tmp_path) == checkpoint_bits(whole[1])
    ours, theirs = ([without_time(r) for r in read_metrics(folder)] for folder in (tmp_path, whole[1]))
    assert ours == theirs


def test_sigterm_ends_the_command_with_a_checkpoint_and_exit_code_0(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """`hebatron train` as a supervisor runs it: exit within a step and a save of the signal, not later."""
    run_dir = tmp_path / "run"
    text = f"""
run_dir = "{run_dir}"
[model]
preset = "tiny"
fields = {{ hidden_size = 32 }}
[data]
tokenizer = "{whole[0]}/tok"
held_out_permille = 0
corpora = [{{ name = "he", path = "{whole[0]}/he" }}]
[[phases]]
name = "only"
tokens = 1_000_000
seq_len = 16
sources = {{ he = 1.0 }}
[training]
tokens_per_batch = 64
tokens_per_microbatch = 64
device = "cpu"
"""
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "hebatron.cli", "train", str(tmp_path / "run.toml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if (run_dir / "metrics.jsonl").is_file() and read_metrics(run_dir):
                break
            time.sleep(0.05)
        process.terminate()
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    steps = [record["step"] for record in read_metrics(run_dir) if record["kind"] == "step"]
    assert 1 <= len(steps) < 1_000_000 // 64
    assert checkpoints(run_dir / "checkpoints")[0].name == f"step-{steps[-1]:06d}"

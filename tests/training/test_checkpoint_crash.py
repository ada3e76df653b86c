"""Dying, or running out of disk, while a checkpoint is saved: the old state or the new one, never less."""

import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from checkpoint_cases import saved, trained
from safetensors.torch import save_file

from hebatron.training import checkpoint
from hebatron.training.checkpoint import MODEL, load_checkpoint, newest_valid, remove_old, save_checkpoint

CALLS = ("os.rename", "os.fsync", "os.open", "shutil.rmtree", "pathlib.Path.mkdir", "pathlib.Path.write_text")


class Died(BaseException):
    """Not an Exception: no handler in the code under test may see it, as none sees a kill."""


def test_save_checkpoint_leaves_old_or_new_state_at_every_call_it_dies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template"
    saved(template, 1)
    deaths = 0
    for point in range(100):
        root = tmp_path / f"{point}"
        shutil.copytree(template, root)
        left = point

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **keywords: object) -> object:
                nonlocal left
                if left == 0:
                    raise Died
                left -= 1
                return real(*args, **keywords)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", dying(save_file))
            for name in CALLS:
                module, _, attribute = name.rpartition(".")
                owner = Path if module == "pathlib.Path" else sys.modules[module]
                patch.setattr(owner, attribute, dying(getattr(owner, attribute)))
            try:
                saved(root, 2)
                remove_old(root, 2, 1)
            except Died:
                deaths += 1
            else:
                break
        found, notices = newest_valid(root)
        assert found is not None and found.name in ("step-000001", "step-000002") and not notices
        load_checkpoint(found, *trained(seed=1))
        saved(root, 2)  # a leftover temporary folder must not stop the next save
        assert newest_valid(root)[0] == root / "step-000002"
    assert deaths > 12 and [path.name for path in root.iterdir()] == ["step-000002"]


def test_save_checkpoint_keeps_the_old_one_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            saved(tmp_path, 2)
    assert newest_valid(tmp_path)[0] == old and list(tmp_path.iterdir()) == [old]
    assert saved(tmp_path, 2).name == "step-000002"


def test_save_checkpoint_names_the_file_and_cleans_up_when_a_write_fails(tmp_path: Path) -> None:
    """safetensors reports a full disk in its own way; a limit on the size of files has the same effect."""
    old = saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename.endswith(MODEL)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]


def save_forever(root: Path, ready: Connection) -> None:
    model, optimizer = trained()
    found, _ = newest_valid(root)
    step = load_checkpoint(found, model, optimizer)["step"] if found else 0
    ready.send(step)
    while True:
        step += 1
        save_checkpoint(root, step, model, optimizer, {})
        remove_old(root, step, 2)


def test_kill_during_a_save_loop_always_leaves_progress(tmp_path: Path) -> None:
    # forkserver: torch is imported once and not forked from a process whose thread pool runs
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["hebatron.training.checkpoint", "hebatron.training.optim", "torch._dynamo"]
    )
    last = 0
    for kill in range(10):
        ready, theirs = context.Pipe(duplex=False)
        child = context.Process(target=save_forever, args=(tmp_path, theirs))
        child.start()
        assert ready.poll(60) and ready.recv() == last
        first = tmp_path / f"step-{last + 1:06d}"
        deadline = time.monotonic() + 60
        while not first.exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(0.003 * kill)  # a save takes a few ms; where inside one the kill lands moves
        child.kill()
        child.join()
        found, notices = newest_valid(tmp_path)
        assert found is not None and not notices
        step = load_checkpoint(found, *trained(seed=1))["step"]
        assert step > last, "a restart after a kill made no progress"
        last = step

"""Checkpoints: atomic at every file-system call, every kind of damage refused, nothing half-loaded."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_cases import Toy, bits, saved, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from hebatron.training import checkpoint
from hebatron.training.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointError,
    checkpoints,
    load_checkpoint,
    load_weights,
    newest_valid,
    remove_old,
    run_lock,
    save_checkpoint,
)


def test_load_checkpoint_restores_every_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, 3, model, optimizer, {"plan_hash": "p"})
    expected, rng = bits(model, optimizer), torch.get_rng_state()
    other, other_optimizer = trained(steps=0, seed=1)
    state = load_checkpoint(folder, other, other_optimizer)
    assert bits(other, other_optimizer) == expected
    assert torch.equal(torch.get_rng_state(), rng)
    assert state["step"] == 3 and state["plan_hash"] == "p"
    assert "router_bias" in load_file(folder / MODEL) and "scratch" not in load_file(folder / MODEL)


def test_save_checkpoint_keeps_an_intact_one_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = (folder / MANIFEST).stat().st_ino
    assert saved(tmp_path) == folder and (folder / MANIFEST).stat().st_ino == before
    (folder / MODEL).write_bytes(b"")
    saved(tmp_path)
    checkpoint.verify(folder)


def test_save_checkpoint_refuses_what_is_not_finite(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for spoil in ("weight", "buffer", "moment"):
        model, optimizer = trained()
        moment = optimizer.state[model.head.bias]["exp_avg"]
        target = {"weight": model.head.bias.data, "buffer": model.router_bias, "moment": moment}[spoil]
        target[1] = torch.inf
        with pytest.raises(CheckpointError, match="step 2 must be finite to be saved, got NaN or Inf in"):
            save_checkpoint(tmp_path, 2, model, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_load_weights_reads_no_optimizer(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model, rng = Toy(), torch.get_rng_state()
    load_weights(folder, model)
    expected = load_file(folder / MODEL)
    assert all(torch.equal(expected[name], t) for name, t in checkpoint.model_tensors(model).items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_remove_old_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        saved(tmp_path, step)
    remove_old(tmp_path, 10, 2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000010", "step-000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000010"]
    remove_old(tmp_path, 3, 1)  # back at step 3, because step 10 is damaged: 3 is all there is
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000010", "step-000003"]


# ---------------------------------------------------------------- damage


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def swap(folder: Path) -> None:
    (folder / MODEL).rename(folder / "x")
    (folder / OPTIMIZER).rename(folder / MODEL)
    (folder / "x").rename(folder / OPTIMIZER)


def become(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def link(folder: Path) -> None:
    shutil.move(folder / MODEL, folder.parent / "outside")
    (folder / MODEL).symlink_to(folder.parent / "outside")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "model empty": (lambda f: (f / MODEL).write_bytes(b""), "model.safetensors must have .* bytes, got 0"),
    "optimizer missing": (lambda f: (f / OPTIMIZER).unlink(), "must hold .*got"),
    "manifest missing": (
        lambda f: (f / MANIFEST).unlink(),
        "manifest.json must be a regular file, got no file",
    ),
    "manifest flipped": (lambda f: flip(f / MANIFEST, 0), "manifest.json must be valid JSON"),
    "manifest a list": (lambda f: (f / MANIFEST).write_text("[]"), "must hold a JSON object, got list"),
    "manifest deep": (lambda f: (f / MANIFEST).write_text("[" * 10**6), "must be valid JSON"),
    "manifest outside": (
        lambda f: (f / MANIFEST).write_text('{"files": {"../x": {}}}'),
        "manifest.json must list .*got",
    ),
    "shards swapped": (swap, "model.safetensors must have"),
    "extra pickle": (lambda f: (f / "extra.pkl").write_bytes(pickle.dumps(print)), "must hold .*extra.pkl"),
    "state flipped": (lambda f: flip(f / STATE, 5), "state.json must have sha256"),
    "model a link": (link, "model.safetensors must be a regular file, got a link"),
    "model a folder": (lambda f: become(f / MODEL, Path.mkdir), "got another kind of file"),
    "model a fifo": (lambda f: become(f / MODEL, os.mkfifo), "got another kind of file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_load_checkpoint_refuses_damage_and_changes_nothing(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = saved(tmp_path / "c")
    damage(folder)
    model, optimizer = trained(seed=1)
    before = bits(model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, model, optimizer)
    assert bits(model, optimizer) == before


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_verify_catches_every_truncation_and_any_flipped_bit(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    path = folder / name
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little") if name != STATE else 200
    lengths = [*range(header), *range(header, len(good), max(1, len(good) // 50))]
    for length in lengths:
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=f"must have {len(good)} bytes, got {length}"):
            checkpoint.verify(folder)
    for offset in range(0, len(good), max(1, len(good) // 100)):
        path.write_bytes(good)
        flip(path, offset)
        with pytest.raises(CheckpointError, match="must have sha256"):
            checkpoint.verify(folder)


def reseal(folder: Path) -> None:
    """Make the manifest agree with the files again: the damage then has to be caught by meaning."""
    files = {name: checkpoint._entry(folder / name) for name in (MODEL, OPTIMIZER, STATE)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}))


def edit(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def header(folder: Path, length: int, text: bytes = b"{}") -> None:
    (folder / MODEL).write_bytes(length.to_bytes(8, "little") + text)


def state(folder: Path, **changes: object) -> None:
    (folder / STATE).write_text(json.dumps(json.loads((folder / STATE).read_text()) | changes))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda f: edit(f, MODEL, lambda t: t.pop("head.bias")), "missing head.bias"),
    "extra tensor": (lambda f: edit(f, MODEL, lambda t: t.update(x=torch.ones(1))), "unexpected x"),
    "hostile name": (
        lambda f: edit(f, MODEL, lambda t: t.update({"../../x": torch.ones(1)})),
        "unexpected ../../x",
    ),
    "long name": (
        lambda f: edit(f, MODEL, lambda t: t.update({"x" * 10**6: torch.ones(1)})),
        "unexpected xxx",
    ),
    "transposed": (
        lambda f: edit(f, MODEL, lambda t: t.update({"embed.weight": torch.ones(4, 5)})),
        r"embed.weight must be \(5, 4\) torch.float32, got \(4, 5\)",
    ),
    "other dtype": (
        lambda f: edit(f, MODEL, lambda t: t.update({"router_bias": torch.ones(3, dtype=torch.int8)})),
        r"router_bias must be .*got \(3,\) torch.int8",
    ),
    "nan weight": (lambda f: edit(f, MODEL, lambda t: t["router_bias"].fill_(torch.nan)), "must be finite"),
    "inf moment": (
        lambda f: edit(f, OPTIMIZER, lambda t: t["head.bias.exp_avg"].fill_(torch.inf)),
        "head.bias.exp_avg must be finite",
    ),
    "no moments": (lambda f: edit(f, OPTIMIZER, dict.clear), "6 differences: missing embed.weight.exp_avg"),
    "header 0": (lambda f: header(f, 0), "must be a safetensors file"),
    "header 2^63": (lambda f: header(f, 2**63), "must be a safetensors file"),
    "header 100 MB": (lambda f: header(f, 100 * 2**20 + 1), "must be a safetensors file"),
    "pickle": (lambda f: (f / MODEL).write_bytes(pickle.dumps({"a": 1})), "must be a safetensors file"),
    "step of another folder": (lambda f: state(f, step=4), "must state the step of its folder, got 4"),
    "step a bool": (lambda f: state(f, step=True), "must state the step of its folder, got True"),
    "other format": (lambda f: state(f, format=2), "must have format 1, got 2"),
    "rng cut": (lambda f: state(f, rng="00"), "rng must be .* bytes in hex, got '00'"),
}


@pytest.mark.parametrize(("damage", "message"), WRONG.values(), ids=list(WRONG))
def test_load_checkpoint_refuses_a_sealed_but_wrong_checkpoint(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = saved(tmp_path)
    damage(folder)
    reseal(folder)
    model, optimizer = trained(seed=1)
    before = bits(model, optimizer)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, model, optimizer)
    assert bits(model, optimizer) == before and time.monotonic() - started < 1


def test_newest_valid_passes_over_damage_with_a_notice(tmp_path: Path) -> None:
    old, new = saved(tmp_path, 3), saved(tmp_path, 4)
    flip(new / MODEL, 100)
    found, notices = newest_valid(tmp_path)
    assert found == old and len(notices) == 1 and "skipped damaged step-000004" in notices[0]
    flip(old / MODEL, 100)
    with pytest.raises(CheckpointError, match="must hold an intact checkpoint"):
        newest_valid(tmp_path)
    assert newest_valid(tmp_path / "none") == (None, [])


# ---------------------------------------------------------------- lock


def test_run_lock_refuses_a_second_holder_and_survives_release(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(ValueError, match=f"got .* held by process {os.getpid()}"):
        with run_lock(tmp_path):
            pass
    with run_lock(tmp_path):
        pass

"""The mean of the last checkpoints is exactly that, and it is a model like any other."""

import json
from pathlib import Path

import pytest
import torch
from toy import toy_config, toy_train, write_corpora

from hebatron.cli import main
from hebatron.model import Hebatron
from hebatron.training.average import average_checkpoints
from hebatron.training.checkpoint import CheckpointError, checkpoints, load_weights, model_tensors


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_corpora(tmp_path)
    toy_train(toy_config(tmp_path, tmp_path / "run", checkpoint_every=1, keep_last=4), stop_after=6)
    return tmp_path / "run"


@pytest.mark.parametrize("last", [1, 3])
def test_average_is_the_mean_of_the_last_checkpoints(run_dir: Path, last: int) -> None:
    assert main(["average", str(run_dir), "--last", str(last)]) == 0
    averaged = Hebatron.from_pretrained(run_dir / "averaged", dtype=torch.float32)
    told = json.loads((run_dir / "averaged/generation_config.json").read_text(encoding="utf-8"))
    assert told["eos_token_id"] == list(averaged.config.eos_token_ids) and told["eos_token_id"]
    model = Hebatron(averaged.config)
    exact = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in model_tensors(model).items()}
    folders = checkpoints(run_dir / "checkpoints")[:last]
    assert [folder.name for folder in folders] == [f"step-{6 - i:06d}" for i in range(last)]
    for folder in folders:
        load_weights(folder, model)
        for name, tensor in model_tensors(model).items():
            exact[name] += tensor.detach().double() / last
    got = model_tensors(averaged)
    assert got.keys() == exact.keys()
    for name, tensor in exact.items():  # each of the mean's steps rounds once: a few units in the last place
        bound = 0.0 if last == 1 else 2e-7 * float(tensor.abs().max()) + 1e-12
        assert float((got[name].detach().double() - tensor).abs().max()) <= bound, name


def test_average_refuses_too_many_none_and_a_damaged_one(run_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"average: last must be at most the 4 checkpoints in .*, got 5; "):
        average_checkpoints(run_dir, 5)
    with pytest.raises(ValueError, match="average: last must be at least 1, got 0"):
        average_checkpoints(run_dir, 0)
    with (run_dir / "checkpoints/step-000005/model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="step-000005"):
        average_checkpoints(run_dir, 3)
    assert not (run_dir / "averaged").exists()


def test_an_average_that_fails_leaves_the_earlier_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged = average_checkpoints(run_dir, 1)
    before = (averaged / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Hebatron, "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            average_checkpoints(run_dir, 3)
    assert (averaged / "model.safetensors").read_bytes() == before
    average_checkpoints(run_dir, 3)
    assert (averaged / "model.safetensors").read_bytes() != before
    assert not [path.name for path in run_dir.iterdir() if path.name.startswith(".tmp-")]

"""Adapters through the trainer: a frozen base, small checkpoints, bit-exact resume, a merged final model."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_toy import chat_config, write_chats
from safetensors.torch import load_file
from toy import assert_same_run, toy_config, toy_train

from hebatron.model import Hebatron
from hebatron.training.average import average_checkpoints
from hebatron.training.checkpoint import CheckpointError, load_checkpoint, model_tensors
from hebatron.training.lora import ADAPTER
from hebatron.training.metrics import read_metrics
from hebatron.training.run import open_checkpoint, open_run, open_trained
from hebatron.training.runconfig import check_run_config
from hebatron.training.sections import LoraConfig, ModelSection, RunConfig
from hebatron.training.train import evaluate_chats, train_step

pytest.importorskip("jinja2")
pytest.importorskip("peft")
STEPS = 5
EXPERTS, DROPOUT = LoraConfig(rank=2), LoraConfig(rank=2, dropout=0.2, experts=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's texts and chats, and `base`: a model trained on the text for four steps."""
    folder = tmp_path_factory.mktemp("lora")
    write_chats(folder)
    base = toy_config(folder, folder / "text")
    final = toy_train(replace(base, phases=base.phases[:1])).final
    assert final is not None
    final.rename(folder / "base")
    return folder


def lora_config(root: Path, run_dir: Path, lora: LoraConfig = EXPERTS) -> RunConfig:
    training = {"tokens_per_batch": 640, "checkpoint_every": 1, "keep_last": 2}
    config = chat_config(root, run_dir, training, neftune_alpha=5.0)
    config = replace(config, model=ModelSection(path=root / "base"), lora=lora)
    return replace(config, optimizer=replace(config.optimizer, learning_rate=2e-2))


@pytest.fixture(scope="module", params=[EXPERTS, DROPOUT], ids=["experts", "dropout"])
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> RunConfig:
    """The configuration of an uninterrupted run, done."""
    config = lora_config(root, tmp_path_factory.mktemp("whole"), request.param)
    result = toy_train(config)
    assert result.finished and result.step == STEPS
    return config


def test_training_leaves_the_base_as_it_was_and_learns(root: Path, whole: RunConfig, tmp_path: Path) -> None:
    run = open_run(replace(whole, run_dir=tmp_path))
    before = {name: t.detach().clone() for name, t in run.model.state_dict().items() if "lora_" not in name}
    for _ in range(run.total):
        train_step(run)
    after = run.model.state_dict()
    base = Hebatron.from_pretrained(root / "base").state_dict()
    assert len(before) == len(base) and sorted(n.replace(".base_layer", "") for n in before) == sorted(base)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) and torch.equal(
            tensor, base[name.replace(".base_layer", "")]
        ), name
    evals = [r["chat_loss"]["all"] for r in read_metrics(whole.run_dir) if r["kind"] == "eval"]
    start = open_run(replace(whole, run_dir=tmp_path, lora=None))
    assert start.chats is not None
    assert evals[-1] < evaluate_chats(start)[0]["all"] - 0.05


def test_checkpoint_holds_the_adapters_alone(whole: RunConfig) -> None:
    folder = whole.run_dir / f"checkpoints/step-{STEPS:06d}"
    saved = load_file(folder / "model.safetensors")
    assert saved and all("lora_A" in name or "lora_B" in name for name in saved)
    assert saved.keys() == {name.rpartition(".")[0] for name in load_file(folder / "optimizer.safetensors")}


def test_resume_at_every_step_equals_the_uninterrupted_run_bitwise(whole: RunConfig, tmp_path: Path) -> None:
    for step in range(1, STEPS + 1):
        assert toy_train(replace(whole, run_dir=tmp_path), stop_after=step).step == step
    assert_same_run(tmp_path, whole.run_dir)
    name = f"final/{ADAPTER}/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole.run_dir / name).read_bytes()


def test_dropout_of_a_step_depends_on_seed_and_step_alone(root: Path, tmp_path: Path) -> None:
    found = []
    for drawn in (0, 7):
        run = open_run(lora_config(root, tmp_path, DROPOUT))
        with torch.random.fork_rng(devices=[]):
            torch.rand(drawn)  # a resumed run's generator on a GPU is not where the uninterrupted one's was
            found.append([train_step(run)[0]["grad_norm"] for _ in range(2)])
    assert found[0] == found[1] and found[0][0] != found[0][1]


def test_final_model_is_the_merged_one(whole: RunConfig, tmp_path: Path) -> None:
    run = open_run(replace(whole, run_dir=tmp_path))
    load_checkpoint(whole.run_dir / f"checkpoints/step-{STEPS:06d}", run.model, run.optimizer)
    ids = torch.arange(10, 40)[None]
    with_adapters = run.model.eval()(ids).logits
    final = Hebatron.from_pretrained(whole.run_dir / "final").eval()
    torch.testing.assert_close(final(ids).logits, with_adapters, rtol=0, atol=1e-5)
    trained, _, _ = open_trained(whole.run_dir)
    torch.testing.assert_close(trained.eval()(ids).logits, with_adapters, rtol=0, atol=1e-5)
    assert trained.config.eos_token_ids == final.config.eos_token_ids == (2, 4)
    base = Hebatron.from_pretrained(whole.model.path or "").eval()
    assert float((base(ids).logits - with_adapters).abs().max()) > 1e-2
    assert os.listdir(whole.run_dir / "final" / ADAPTER)


def test_average_of_adapters_is_that_of_the_merged_models(whole: RunConfig) -> None:
    mean = Hebatron.from_pretrained(average_checkpoints(whole.run_dir, 2))
    one, two = (
        model_tensors(open_checkpoint(whole.run_dir / f"checkpoints/step-{step:06d}", "cpu"))
        for step in (STEPS - 1, STEPS)
    )
    for name, tensor in model_tensors(mean).items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6)


def test_another_base_is_refused(root: Path, tmp_path: Path) -> None:
    config = lora_config(root, tmp_path / "run")
    other = tmp_path / "base"
    Hebatron.from_pretrained(root / "base").save_pretrained(other)
    config = replace(config, model=ModelSection(path=other))
    toy_train(config, stop_after=1)
    changed = Hebatron.from_pretrained(other)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    for path in other.iterdir():
        path.unlink()
    changed.save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"model\.path: [0-9a-f]{12} -> [0-9a-f]{12} \(hash of the frozen weights\)"
    ):
        toy_train(config)
    with pytest.raises(
        CheckpointError, match=r"has adapters for the model [0-9a-f]{12}, got [0-9a-f]{12} in"
    ):
        open_trained(tmp_path / "run")


def test_the_base_of_an_unfinished_run_is_found_from_any_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora_config(root, tmp_path / "run")
    base, elsewhere = tmp_path / "here/base", tmp_path / "elsewhere"
    Hebatron.from_pretrained(root / "base").save_pretrained(base)
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    toy_train(replace(config, model=ModelSection(path=Path("base"))), stop_after=1)
    ids = torch.arange(5)[None]
    expected = open_trained(tmp_path / "run")[0].eval()(ids).logits
    monkeypatch.chdir(elsewhere)
    assert torch.equal(open_trained(tmp_path / "run")[0].eval()(ids).logits, expected)
    base.rename(tmp_path / "base")  # moved away: model.path still leads to it, from the folder beside
    with pytest.raises(CheckpointError, match=rf"must be at {base} or base, got no folder there"):
        open_trained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(open_trained(tmp_path / "run")[0].eval()(ids).logits, expected)


def test_adapters_need_a_model_to_adapt(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path must be given with \[lora\].* got none"):
        check_run_config(replace(lora_config(root, tmp_path), model=ModelSection(preset="tiny")))
    with pytest.raises(ValueError, match=r"lora\.rank must be > 0, got 0"):
        check_run_config(lora_config(root, tmp_path, LoraConfig(rank=0)))


def test_adapters_train_on_text_too(root: Path, tmp_path: Path) -> None:
    config = replace(toy_config(root, tmp_path), model=ModelSection(path=root / "base"), lora=EXPERTS)
    result = toy_train(config, stop_after=2)
    assert result.step == 2 and read_metrics(tmp_path)[0]["kind"] == "step"

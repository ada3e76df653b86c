"""What a run leaves in its folder, the inputs it refuses, and the committed run files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import Silent, checkpoint_bits, toy_config, toy_train, write_corpora

from hebatron.model import Hebatron
from hebatron.tokenizer import load_tokenizer
from hebatron.training.checkpoint import checkpoints, load_checkpoint
from hebatron.training.metrics import read_metrics
from hebatron.training.run import open_run
from hebatron.training.runconfig import load_run_config
from hebatron.training.sections import CorpusConfig, ModelSection
from hebatron.training.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


# ---------------------------------------------------------------- the run folder


def same_state(model: Hebatron, other: Hebatron) -> None:
    assert len(model.state_dict()) > 10
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_train_leaves_config_metrics_checkpoints_and_a_final_model(root: Path, tmp_path: Path) -> None:
    config = toy_config(
        root, tmp_path, sample_prompts=("שלום",), sample_tokens=4, checkpoint_every=5, keep_last=2
    )
    result = toy_train(config)
    assert json.loads((tmp_path / "config.json").read_text())["phases"][1]["anchor_share"] == 0.25
    assert [folder.name for folder in checkpoints(tmp_path / "checkpoints")] == ["step-000012", "step-000010"]
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 13))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 5, 8, 10, 12]  # phase ends and every 5
    assert [r["prompt"] for r in records if r["kind"] == "sample"] == ["שלום"] * 5
    # 4 rows of 16 in the middle phase hold one anchor row; of the last, 2 of 8 rows of 32
    anchor = [r["anchor_tokens"] for r in records if r["kind"] == "step"]
    assert anchor[:8] == [0, 0, 0, 0, 16, 16, 16, 16] and sum(anchor[8:]) == 64
    assert result.final == tmp_path / "final" and set(result.bits_per_byte) == {"he", "en"}

    exported = Hebatron.from_pretrained(result.final)
    run = open_run(config)
    load_checkpoint(tmp_path / "checkpoints/step-000012", run.model, run.optimizer)
    same_state(exported, run.model)
    for folder in (result.final, tmp_path / "tokenizer"):
        assert load_tokenizer(folder).fingerprint == run.tokenizer.fingerprint


def test_train_continues_from_a_model_folder(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path / "base")
    config = replace(config, phases=config.phases[:1])
    base = toy_train(config)
    second = replace(config, run_dir=tmp_path / "second", model=ModelSection(path=base.final))
    run, trained = open_run(second), open_run(config)
    load_checkpoint(tmp_path / "base/checkpoints/step-000004", trained.model, trained.optimizer)
    same_state(run.model, trained.model)
    assert run.model.config == trained.model.config
    assert toy_train(second).bits_per_byte["en"] < base.bits_per_byte["en"]


def test_what_ends_the_texts_ends_generation_too(root: Path, tmp_path: Path) -> None:
    """A folder's config may name another end than the tokenizer, whose own is written behind every document."""
    config = toy_config(root, tmp_path / "run")
    eos = load_tokenizer(config.data.tokenizer).eos_id
    model = open_run(config).model
    model.config = model.config.replace(eos_token_id=eos + 3)
    model.save_pretrained(tmp_path / "hub")
    run = open_run(replace(config, model=ModelSection(path=tmp_path / "hub")))
    assert run.model.config.eos_token_ids == (eos + 3, eos)


def test_train_is_the_same_twice_and_another_seed_differs(root: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.rand(1)  # the caller's generator is none of the run's business
        toy_train(toy_config(root, tmp_path / name), stop_after=3)
    toy_train(toy_config(root, tmp_path / "c", seed=1), stop_after=3)
    assert checkpoint_bits(tmp_path / "a") == checkpoint_bits(tmp_path / "b")
    assert checkpoint_bits(tmp_path / "a") != checkpoint_bits(tmp_path / "c")


def test_train_leaves_the_callers_random_generator_alone(root: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    toy_train(toy_config(root, tmp_path), stop_after=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["three_phases", "continue", "hebatron"])
def test_example_run_files_train(root: Path, tmp_path: Path, name: str) -> None:
    """The committed run files, shrunk from the command line to the toy's text, a few steps each."""
    example = Path(__file__).parents[2] / "examples" / f"{name}.toml"
    config = load_run_config(example)
    overrides = ["--run-dir", str(tmp_path / "run"), "--data.tokenizer", str(root / "tok")]
    for i, corpus in enumerate(config.data.corpora):
        overrides += [f"--data.corpora.{i}.path", str(root / ("en" if corpus.name == "anchor" else "he"))]
    for i, phase in enumerate(config.phases if name != "hebatron" else ()):
        overrides += [f"--phases.{i}.tokens", str(8 * phase.seq_len)]
    overrides += [
        "--data.held-out-permille",
        "150",
        "--data.held-out-tokens",
        "60",
        "--training.sample-tokens",
        "2",
    ]
    if name == "hebatron":
        overrides += ["--curriculum.scale", "1.2e-7", "--curriculum.max-seq-len", "128"]
        overrides += ["--training.tokens-per-batch", "1024", "--anchor-max-epochs", "1000"]
    if name in ("continue", "hebatron"):
        base = toy_config(root, tmp_path / "base")
        overrides += ["--model.path", str(toy_train(replace(base, phases=base.phases[:1])).final)]
    else:
        overrides += ["--model.preset", "tiny"]
    config = load_run_config(example, overrides)
    assert toy_train(config).finished
    steps = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "step"]
    assert list(dict.fromkeys(step["phase"] for step in steps)) == [phase.name for phase in config.phases]
    assert [step["step"] for step in steps if step.get("anchor_kl", -1) >= 0] == (
        [step["step"] for step in steps] if name == "hebatron" else []
    )


def test_train_past_a_final_model_removes_it(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path)
    short = replace(config, phases=config.phases[:1])
    assert toy_train(short).final == tmp_path / "final"
    assert toy_train(config, stop_after=5, force=True).final is None
    assert not (tmp_path / "final").exists()  # it was the model of step 4
    final = toy_train(config).final
    run = open_run(config)
    load_checkpoint(tmp_path / "checkpoints/step-000012", run.model, run.optimizer)
    assert final is not None
    assert torch.equal(Hebatron.from_pretrained(final).lm_head.weight, run.model.lm_head.weight)


def test_train_makes_the_final_model_durable(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr("hebatron.training.train.fsync", lambda path: flushed.append(path.name))
    config = toy_config(root, tmp_path)
    final = toy_train(replace(config, phases=config.phases[:1])).final
    assert final is not None and {path.name for path in final.iterdir()} <= set(flushed)
    assert flushed[-2:] == [".tmp-final", tmp_path.name]


def test_train_saves_no_checkpoint_of_weights_that_are_not_finite(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path, checkpoint_every=1, keep_last=1)
    toy_train(config, stop_after=2)
    wild = replace(config, optimizer=replace(config.optimizer, learning_rate=1e38))
    with pytest.raises(ValueError, match="step 3 must be finite to be saved, got NaN or Inf in"):
        toy_train(wild, force=True)
    assert [folder.name for folder in checkpoints(tmp_path / "checkpoints")] == ["step-000002"]


# ---------------------------------------------------------------- refused


def test_train_refuses_a_folder_in_use(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path)

    def second(step: int) -> None:
        with pytest.raises(ValueError, match="run_dir must not be in use"):
            toy_train(config)

    train(config, stop_after=1, reporter=Silent(second))


def test_train_refuses_held_out_text_that_is_trained_on(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path)
    data = replace(config.data, held_out_permille=0, held_out=(CorpusConfig("test", root / "he"),))
    with pytest.raises(
        ValueError, match=r"'test' must share no document with data\.corpora, got 60 that are also in 'he'"
    ):
        toy_train(replace(config, data=data))


def test_train_refuses_a_model_that_does_not_fit(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path)
    cases = [
        (ModelSection(preset="tiny", fields={"vocab_size": 100}), r"model\.vocab_size must be at least"),
        (ModelSection(preset="tiny", fields={"hiden_size": 64}), "model: .*hiden_size"),
        (
            ModelSection(preset="tiny", fields={"max_position_embeddings": 16}),
            "seq_len must be at most .*16, got 32",
        ),
        (ModelSection(preset="tinny"), r"model\.preset must be one of .*; did you mean 'tiny'\?"),
        (ModelSection(pattern="MXE"), "model: "),
        (ModelSection(pattern="M"), "model: .*hidden_size"),
    ]
    for section, message in cases:
        with pytest.raises(ValueError, match=message):
            toy_train(replace(config, model=section))
    assert not (tmp_path / "checkpoints").exists()


def test_train_refuses_a_prompt_that_cannot_be_continued(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample_prompts\[1\] must have 1 to 976 tokens, got 0 in ''"):
        toy_train(toy_config(root, tmp_path, sample_prompts=("a", "")))


def test_train_refuses_no_tokenizer_and_a_bad_stop(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path)
    with pytest.raises(ValueError, match="stop_after must be >= 1, got 0"):
        toy_train(config, stop_after=0)
    with pytest.raises(ValueError, match=r"folder must contain tokenizer\.json"):
        toy_train(replace(config, data=replace(config.data, tokenizer=tmp_path)))

"""A run small enough to repeat dozens of times: three phases with an anchor, two corpora, a tiny hybrid model."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hebatron.curriculum.build import Phase
from hebatron.data.prepare import prepare
from hebatron.tokenizer import train_bpe
from hebatron.training.checkpoint import model_tensors
from hebatron.training.metrics import Record, read_metrics, without_time
from hebatron.training.run import Run
from hebatron.training.sections import (
    CorpusConfig,
    DataConfig,
    ModelSection,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from hebatron.training.train import TrainResult, train

WORDS = "שלום עולם ספר ילד בית גדול קטן הלך אמר יום".split()


def write_corpora(root: Path) -> None:
    """root/tok, root/he and root/en: sentences that go round a circle of words, so there is something to learn."""
    rng = random.Random(0)

    def text(words: list[str]) -> str:
        start = rng.randrange(len(words))
        return " ".join(words[(start + i) % len(words)] for i in range(12))

    he = [text(WORDS) + f" {i}" for i in range(60)]
    en = [text([f"word{i}" for i in range(8)]) + f" {i}" for i in range(40)]
    tokenizer = train_bpe(he + en, 322)
    tokenizer.save(root / "tok")
    for name, texts in (("he", he), ("en", en)):
        lines = [json.dumps({"text": t, "source": name, "lang": name}, ensure_ascii=False) for t in texts]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        prepare([root / f"{name}.jsonl"], root / name, tokenizer)


def toy_config(root: Path, run_dir: Path, **training: Any) -> RunConfig:
    """12 steps: three phases, an anchor in the last two, sequence length 16 then 32."""
    settings = TrainingConfig(
        tokens_per_batch=64,
        tokens_per_microbatch=32,
        checkpoint_every=100,
        eval_every=5,
        device="cpu",
        router_aux_coefficient=1e-2,
        router_bias_rate=1e-2,
    )
    return RunConfig(
        run_dir=run_dir,
        model=ModelSection(preset="tiny", fields={"hidden_size": 32}),
        data=DataConfig(
            corpora=(CorpusConfig("he", root / "he"), CorpusConfig("en", root / "en")),
            tokenizer=root / "tok",
            held_out_permille=150,
            held_out_tokens=60,
        ),
        phases=(
            Phase("base", {"en": 1.0}, tokens=256, seq_len=16),
            Phase("formal", {"he": 1.0}, tokens=256, seq_len=16, anchor_share=0.25),
            Phase("long", {"he": 1.0}, tokens=256, seq_len=32, anchor_share=0.25),
        ),
        anchor={"en": 1.0},
        optimizer=OptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(warmup_steps=2, phase_warmup_steps=2),
        training=replace(settings, **training),
    )


def state_bits(run: Run) -> dict[str, bytes]:
    """Every bit that the next step depends on."""
    tensors: dict[str, Tensor] = dict(model_tensors(run.model))
    for name, parameter in run.model.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in run.optimizer.state[parameter].items()}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def checkpoint_bits(run_dir: Path) -> dict[str, bytes]:
    """The newest checkpoint, whole: two equal runs have the same bytes."""
    folder = max((run_dir / "checkpoints").iterdir())
    return {
        name: (folder / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    }


def assert_same_run(run_dir: Path, whole_dir: Path) -> None:
    """Equal bits in checkpoint and final model, equal records but for the clock."""
    assert checkpoint_bits(run_dir) == checkpoint_bits(whole_dir)
    ours, theirs = read_metrics(run_dir), read_metrics(whole_dir)
    assert [without_time(record) for record in ours] == [without_time(record) for record in theirs]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (run_dir / "final" / name).read_bytes() == (whole_dir / "final" / name).read_bytes()


class Silent:
    """A reporter that keeps what it is told, and can act after a step."""

    def __init__(self, after_step: Callable[[int], object] = lambda step: None) -> None:
        self.notes: list[str] = []
        self.after_step = after_step

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, record: Record, load: Sequence[Sequence[int]]) -> None:
        self.after_step(record["step"])

    def event(self, record: Record) -> None:
        return None


def toy_train(config: RunConfig, stop_after: int | None = None, force: bool = False) -> TrainResult:
    return train(config, stop_after, force, Silent())

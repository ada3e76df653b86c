"""Does easy-to-hard matter? One base, then the same Hebrew rows forward, reversed, shuffled, and without the anchor.

    python bench/curriculum/experiment.py DATA OUT                     # everything; goes on where it stopped
    python bench/curriculum/experiment.py DATA OUT --only forward-seed0

DATA holds train/phase{1,2,3}_he.jsonl.zst and anchor/anchor_en_code_math.jsonl.zst: a record has text, lang, genre and,
in train, phase_score, the difficulty (1 to 3) that its phase is taken from. OUT gets text/, tokenizer/, corpora/
and runs/: base-seedN, then an arm that starts from its weights. The arms of one seed read the same
rows; only their order, or whether the anchor is there, differs. sft-seedN goes on from forward-seedN with the chats of
DATA/sft/sft_messages.jsonl.zst (`messages`, `task`, `lang`), a fifth of them.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import zstandard

from hebatron.curriculum.build import Phase
from hebatron.data.corpus import Corpus
from hebatron.data.documents import read_texts
from hebatron.data.prepare import prepare
from hebatron.files import new_folder
from hebatron.tokenizer import load_tokenizer, train_bpe
from hebatron.training.sections import (
    CorpusConfig,
    DataConfig,
    ModelSection,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SftConfig,
    TrainingConfig,
)
from hebatron.training.train import train

PHASES = ("easy", "middle", "hard")
ARMS = {  # order and anchor share
    "forward": ("forward", 0.15),
    "reversed": ("reversed", 0.15),
    "shuffled": ("shuffled", 0.15),
    "no-anchor": ("forward", 0.0),
}
LANGUAGES = ("he", "en", "he-en", "en-he")  # of the chats
CHAT_PROMPTS = ("תרגם לאנגלית: שלום", "What is 7 plus 5?", "מהי צורת הרבים של המילה ספר?")
PROMPTS = ("הכנסת החליטה", "בית המשפט קבע כי", "Once upon a time")


@dataclass(frozen=True)
class Size:
    """What is spent: a run of an arm is about twelve minutes of one core at these numbers."""

    vocab_size: int = 8192
    base_tokens: int = 1_000_000
    phase_tokens: int = 650_000  # of each of the three
    seq_len: int = 512  # of every phase: the arms differ in difficulty alone, not in length
    tokens_per_batch: int = 1024
    learning_rate: float = 2e-3
    sft_share: float = 0.2  # of the chats
    sft_learning_rate: float = 1e-3
    held_out_permille: int = 30
    held_out_tokens: int = 4_000  # by source, while training; the last evaluation reads all


def write_text(data: Path, out: Path) -> None:
    """Into the folder `out` a file a phase, by `phase_score`, and the anchor."""
    files = {name: io.StringIO() for name in (*PHASES, "anchor")}
    for path in (
        *sorted(data.glob("train/phase*_he.jsonl.zst")),
        data / "anchor/anchor_en_code_math.jsonl.zst",
    ):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                name = PHASES[record["phase_score"] - 1] if "phase_score" in record else "anchor"
                kept = {"id": record["id"], "source": record["genre"], "lang": record["lang"]}
                files[name].write(json.dumps({**kept, "text": record["text"]}, ensure_ascii=False) + "\n")
    for name, text in files.items():
        (out / f"{name}.jsonl").write_text(text.getvalue(), encoding="utf-8")


def prepare_corpora(data: Path, out: Path, size: Size) -> None:
    """Text, tokenizer and corpora; what is there is kept."""
    if not (out / "text").exists():
        with new_folder(out / "text") as folder:  # whole or not at all: what is there is taken as it is
            write_text(data, folder)
    files = {name: out / "text" / f"{name}.jsonl" for name in (*PHASES, "anchor")}
    if not (out / "tokenizer").exists():
        with new_folder(out / "tokenizer") as folder:
            train_bpe(read_texts(list(files.values())), size.vocab_size).save(folder)
    tokenizer = load_tokenizer(out / "tokenizer")
    for name, path in files.items():
        prepare([path], out / "corpora" / name, tokenizer)


def held_out(out: Path, size: Size) -> dict[str, Corpus]:
    """The documents that no run reads, by corpus."""
    names = (*PHASES, "anchor")
    return {name: Corpus.open(out / "corpora" / name).split(size.held_out_permille)[1] for name in names}


def run_config(data: Path, out: Path, name: str, size: Size) -> RunConfig:
    """The run of `name`: base-seedN, an arm's, or sft-seedN."""
    arm, _, seed = name.rpartition("-seed")
    corpora = tuple(CorpusConfig(corpus, out / "corpora" / corpus) for corpus in (*PHASES, "anchor"))
    base = RunConfig(
        run_dir=out / "runs" / name,
        model=ModelSection(preset="quickstart"),
        data=DataConfig(
            corpora=corpora,
            tokenizer=out / "tokenizer",
            held_out_permille=size.held_out_permille,
            held_out_tokens=size.held_out_tokens,
        ),
        phases=(Phase("base", {"anchor": 1.0}, tokens=size.base_tokens, seq_len=size.seq_len),),
        optimizer=OptimizerConfig(learning_rate=size.learning_rate),
        schedule=ScheduleConfig(warmup_steps=50, decay_share=0.2),
        training=TrainingConfig(
            tokens_per_batch=size.tokens_per_batch,
            tokens_per_microbatch=size.tokens_per_batch,
            seed=int(seed),
            eval_every=500,
            sample_prompts=PROMPTS,
        ),
    )
    if arm == "base":
        return base
    if arm == "sft":
        return replace(
            base,
            model=ModelSection(path=out / "runs" / f"forward-seed{seed}" / "final"),
            phases=(),
            sft=SftConfig(
                chats=(data / "sft" / "sft_messages.jsonl.zst",),
                seq_len=size.seq_len,
                lang_weights=dict.fromkeys(LANGUAGES, size.sft_share),
                held_out_permille=size.held_out_permille,
            ),
            optimizer=OptimizerConfig(learning_rate=size.sft_learning_rate),
            schedule=ScheduleConfig(name="cosine", warmup_steps=20, floor=0.1),
            training=replace(base.training, sample_prompts=CHAT_PROMPTS),
        )
    order, anchor_share = ARMS[arm]
    phases = tuple(
        Phase(phase, {phase: 1.0}, tokens=size.phase_tokens, seq_len=size.seq_len, anchor_share=anchor_share)
        for phase in PHASES
    )
    return replace(
        base,
        model=ModelSection(path=out / "runs" / f"base-seed{seed}" / "final"),
        phases=phases,
        anchor={"anchor": 1.0} if anchor_share else {},
        order=order,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", help="these runs, for example base-seed0 forward-seed0")
    arguments = parser.parse_args()
    size = Size()
    prepare_corpora(arguments.data, arguments.out, size)
    names = [f"{arm}-seed{seed}" for seed in arguments.seeds for arm in ("base", *ARMS, "sft")]
    for name in arguments.only or names:
        if not train(run_config(arguments.data, arguments.out, name, size)).finished:
            return  # a signal; the same command goes on


if __name__ == "__main__":
    main()

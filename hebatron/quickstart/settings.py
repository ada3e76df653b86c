"""What the quickstart trains and for how long: every number in one place, every step count fixed for a kind of CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hebatron.curriculum.build import Phase
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

BASE = "base"  # the phase before the Hebrew ones; "before" figures are taken at its end
CORPUS = "text"  # name of the one prepared corpus; its sources are "text/narrative" and so on

PHASES = (
    Phase(BASE, {"text/english": 1.0, "text/python": 1.0}, tokens=165_000, seq_len=256),
    Phase(
        "1 simple",
        {"text/exercises": 1.0, "text/interface": 1.0, "text/narrative": 3.0},
        tokens=270_000,
        seq_len=256,
        anchor_share=0.15,
    ),
    Phase(
        "2 poetry",
        {"text/narrative": 1.0, "text/poetry": 3.0},
        tokens=210_000,
        seq_len=512,
        anchor_share=0.15,
    ),
    Phase(
        "3 long",
        {"text/books": 1.0, "text/mishnah": 1.5, "text/narrative": 0.5},
        tokens=285_000,
        seq_len=1024,
        anchor_share=0.15,
    ),
)
CHAT_PROMPTS = ("7 + 5 =", "תרגם לעברית: Open file", "Translate to English: שמירה")
PROMPTS = ("ויאמר יהוה אל משה", "ויהי בימים ההם", "רבי יהודה אומר", "לדוד היו חמישה ספרים.")


@dataclass(frozen=True)
class Settings:
    """One quickstart. `published` has a machine's; tests make a miniature with `replace`."""

    phases: tuple[Phase, ...] = PHASES
    vocab_size: int = 4096
    tokens_per_batch: int = 1024
    learning_rate: float = 2e-3
    warmup_steps: int = 40
    eval_every: int = 1_000  # and at the end of each phase
    held_out_tokens: int = 4_000  # a source and evaluation
    prompts: tuple[str, ...] = PROMPTS
    sample_tokens: int = 48
    chat_prompts: tuple[str, ...] = CHAT_PROMPTS
    chat_seq_len: int = 256
    chat_epochs: int = 1
    chat_learning_rate: float = 1e-3
    chat_warmup_steps: int = 10
    resume_rows: int = 6  # rows of each phase in the stop-and-resume check: at least one a source
    resume_stop: int = 5  # the step after which that check stops, in the middle of a phase
    prefill: tuple[int, int] = (8, 512)  # batch and length of the speed comparison
    speed_repeats: int = 5


# How much of the phases a CPU trains, by its instruction set, so that two cores are done in 5 minutes. Tokens a second
# of a step on two cores: Zen 4 with AVX-512 some 6,000, Zen 3 with AVX2 2,900, the same with the portable kernels 820.
SHARES = {"avx512_bf16": 1.0, "avx512": 1.0, "avx2": 0.4, "portable": 0.1}


def published(isa: str) -> Settings:
    """The quickstart of a CPU with this instruction set, or with none of ours."""
    share = SHARES.get(isa, SHARES["portable"])
    return Settings(tuple(replace(phase, tokens=round(phase.tokens * share)) for phase in PHASES))


def run_config(settings: Settings, out: Path, seed: int) -> RunConfig:
    """The training run of a quickstart in folder `out`."""
    return RunConfig(
        run_dir=out / "run",
        model=ModelSection(preset="quickstart"),
        data=DataConfig(
            corpora=(CorpusConfig(CORPUS, out / "corpus"),),
            held_out=(CorpusConfig("held out", out / "held_out"),),
            held_out_permille=0,  # held_out is a split by document of every source, made before preparing
            held_out_tokens=settings.held_out_tokens,
            tokenizer=out / "tokenizer",
        ),
        phases=settings.phases,
        anchor={"text/english": 1.0, "text/python": 1.0},
        optimizer=OptimizerConfig(learning_rate=settings.learning_rate),
        schedule=ScheduleConfig(warmup_steps=settings.warmup_steps, decay_share=0.3),
        training=TrainingConfig(
            tokens_per_batch=settings.tokens_per_batch,
            tokens_per_microbatch=settings.tokens_per_batch,
            seed=seed,
            checkpoint_every=1_000_000,  # where it stops: a crash starts again
            keep_last=1,
            eval_every=settings.eval_every,
            sample_prompts=settings.prompts,
            sample_tokens=settings.sample_tokens,
        ),
    )


def chat_config(settings: Settings, out: Path, seed: int) -> RunConfig:
    """The run over chats that follows: from the model of `run_config`, with the same text to see what is forgotten."""
    text = run_config(settings, out, seed)
    return replace(
        text,
        run_dir=out / "sft",
        model=ModelSection(path=text.run_dir / "final"),
        data=replace(text.data, corpora=()),
        phases=(),
        anchor={},
        sft=SftConfig(
            chats=(out / "text" / "chats.jsonl",),
            seq_len=settings.chat_seq_len,
            epochs=settings.chat_epochs,
            held_out_permille=50,
        ),
        optimizer=OptimizerConfig(learning_rate=settings.chat_learning_rate),
        schedule=ScheduleConfig(name="cosine", warmup_steps=settings.chat_warmup_steps, floor=0.1),
        training=replace(text.training, sample_prompts=settings.chat_prompts),
    )


def resume_config(settings: Settings, out: Path, seed: int, name: str) -> RunConfig:
    """A short run over all phases without evaluations: the same model and text, few rows."""
    config = run_config(settings, out, seed)
    phases = tuple(replace(phase, tokens=settings.resume_rows * phase.seq_len) for phase in settings.phases)
    return replace(
        config,
        run_dir=out / "resume_check" / name,
        phases=phases,
        anchor={"text/english": 1.0},  # one row a phase, too few for both sources
        data=replace(config.data, held_out=()),
        training=replace(
            config.training,
            tokens_per_batch=max(phase.seq_len for phase in phases),
            tokens_per_microbatch=max(phase.seq_len for phase in phases),
            sample_prompts=(),
        ),
    )

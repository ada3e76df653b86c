"""What a run file holds: one frozen dataclass a section, with the condition that each field must meet.

runconfig.py reads, checks and hashes the tree. A field is in the hash unless it cannot change the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..curriculum.phases import EpochLimits, Phase
from ..curriculum.presets import LONG_SEQ_LEN

CONDITIONS: dict[str, Callable[[Any], bool]] = {
    "> 0": lambda value: value > 0,
    "> 1": lambda value: value > 1,
    ">= 0": lambda value: value >= 0,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1000)": lambda value: 0 <= value < 1000,
    "in [0, 2**63)": lambda value: 0 <= value < 2**63,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "not empty": lambda value: len(value) > 0,
}


def _checked(default: Any, condition: str, *, hashed: bool = True) -> Any:
    """A field whose value must meet CONDITIONS[condition]; `hashed=False` if it cannot change the weights."""
    return field(default=default, metadata={"condition": condition, "hashed": hashed})


# Left out of the hash while at its default: checkpoints of before it can still be resumed.
YOUNG = {"young": True}


@dataclass(frozen=True)
class ModelSection:
    """Exactly one of preset, path and pattern; `fields` replaces fields of the resulting ModelConfig."""

    preset: str | None = None  # a name that `hebatron info` knows: fresh weights of that shape
    path: Path | None = None  # a checkpoint folder: its configuration and its weights
    pattern: str | None = None  # layer letters, for example "MEM*EME", with `fields` for the rest
    fields: dict[str, Any] = field(default_factory=dict)  # names of the hub's config.json: see config.py
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters are fp32 masters either way


@dataclass(frozen=True)
class CorpusConfig:
    """One prepared corpus folder and the name that phases and anchor call it by."""

    name: str = field(metadata={"condition": "not empty"})  # without "/": phases say name or name/source
    path: Path = field(
        metadata={"hashed": False}
    )  # what `data prepare --out` wrote; the plan's hash covers it


@dataclass(frozen=True)
class DataConfig:
    """Corpora and held-out text: documents chosen by the hash of their text, in no row of the plan."""

    corpora: tuple[CorpusConfig, ...] = ()  # for chats: only their held-out part is read
    tokenizer: Path = field(
        default=Path("tokenizer"), metadata={"hashed": False}
    )  # a folder with tokenizer.json: the one that the corpora were prepared with
    held_out_permille: int = _checked(20, "in [0, 1000)")  # of each corpus; 0: none
    held_out: tuple[CorpusConfig, ...] = field(
        default=(), metadata={"hashed": False}
    )  # whole folders, besides
    held_out_tokens: int = _checked(20_000, "> 1", hashed=False)  # evaluated per source, the first by hash


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and what happens when a gradient is not finite."""

    learning_rate: float = _checked(3e-3, "> 0")  # the peak
    beta1: float = _checked(0.9, "in [0, 1)")  # decay of the gradients' mean
    beta2: float = _checked(0.95, "in [0, 1)")  # and of their squares'
    eps: float = _checked(1e-8, "> 0")  # added to the root of the squares' mean
    weight_decay: float = _checked(0.1, ">= 0")  # of matrices; norms, biases and the scan's vectors have none
    grad_clip: float = _checked(1.0, ">= 0")  # global L2 norm; 0: measured, not clipped
    max_bad_steps: int = _checked(3, "> 0")  # non-finite steps are skipped; this many in a row stop the run


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the step alone; see hebatron.training.optim.learning_rate."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"  # wsd: warm up, stay, decay
    warmup_steps: int = _checked(20, ">= 0")  # linear, from 0 to the peak
    decay_share: float = _checked(0.2, "in [0, 1]")  # of the steps: the last ones, in wsd
    decay: Literal["linear", "sqrt"] = "linear"  # shape of wsd's decay: sqrt falls fast, then slowly
    floor: float = _checked(0.0, "in [0, 1]")  # share of the peak that the decay aims at
    phase_warmup_steps: int = _checked(0, ">= 0")  # climb again at the start of each later phase


@dataclass(frozen=True)
class TrainingConfig:
    """Batch, router, random seed, and how often to evaluate, save and print."""

    tokens_per_batch: int = _checked(4096, "> 0")  # of one optimizer step
    tokens_per_microbatch: int = _checked(4096, "> 0")  # of one forward and backward
    router_aux_coefficient: float = _checked(1e-4, ">= 0")  # weight of the balance loss of each sequence
    router_bias_rate: float = _checked(1e-3, ">= 0")  # a step's change of the bias that evens out the experts
    seed: int = _checked(0, "in [0, 2**63)")  # of fresh weights, the plan and samples
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    checkpoint_every: int = _checked(200, "> 0", hashed=False)  # steps; a stopped run saves besides
    keep_last: int = _checked(2, "> 0", hashed=False)  # checkpoints that stay on the disk
    eval_every: int = _checked(100, "> 0", hashed=False)  # steps; the end of a phase is measured besides
    log_every: int = _checked(10, "> 0", hashed=False)  # steps per printed line where there is no terminal
    sample_prompts: tuple[str, ...] = field(
        default=(), metadata={"hashed": False}
    )  # continued at each evaluation
    sample_tokens: int = _checked(48, "> 0", hashed=False)  # the most that a sample gets


@dataclass(frozen=True)
class CurriculumConfig:
    """Phases by name instead of written out: see curriculum/presets.py. They follow those that are written."""

    preset: str | None = None  # hebatron: formal, colloquial and long-context Hebrew
    scale: float = 1.0  # of the preset's tokens
    sources: dict[str, dict[str, float]] = field(default_factory=dict)  # of each phase, weighted as in phases
    max_seq_len: int = LONG_SEQ_LEN  # of the long phase's rows; the others' hold an eighth
    anchor_share: float = 0.25  # of every phase's tokens
    batch_ramp: int = 8  # the first batches hold tokens_per_batch / batch_ramp; 1: all the same
    max_epochs: float | None = None  # refuse a plan that reads a source more often


@dataclass(frozen=True)
class AnchorKLConfig:
    """KL(base || model) on anchor rows, to a frozen base: see anchor_kl.py."""

    coefficient: float = _checked(0.0, ">= 0")  # 0: no base is loaded
    base: Path | None = field(default=None, metadata={"hashed": False})  # default: model.path
    temperature: float = _checked(1.0, "> 0")  # of both distributions


@dataclass(frozen=True)
class SftConfig:
    """Chats instead of phases: what chats.py reads, weighs and packs into rows, and what of it is kept out."""

    chats: tuple[Path, ...] = field(metadata={"condition": "not empty", "hashed": False})  # .jsonl(.zst)
    seq_len: int = field(metadata={"condition": "> 1"})  # of a row, which holds whole chats
    template: str = field(default="nemotron3", metadata={"hashed": False})  # or a file; in the rows' hash
    epochs: int = _checked(1, "> 0")  # how often the chats are read
    task_weights: dict[str, float] = field(default_factory=dict)  # readings an epoch; 1 where not named
    lang_weights: dict[str, float] = field(default_factory=dict)  # by language; multiplies the task's
    truncation: Literal["drop", "cut"] = "drop"  # of a chat longer than a row
    bad: Literal["error", "drop"] = "error"  # what a broken chat does
    held_out_permille: int = _checked(20, "in [0, 1000)")  # by hash; data.held_out_tokens of a task measured
    neftune_alpha: float = _checked(0.0, ">= 0")  # noise on embeddings in training; 0: none, 5 is customary


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen model: see lora.py."""

    rank: int = _checked(16, "> 0")  # of an adapter's two matrices
    alpha: float = _checked(32.0, "> 0")  # what an adapter computes is scaled by alpha / rank
    dropout: float = _checked(0.0, "in [0, 1)")  # before the projections' adapters; 0 with experts
    targets: tuple[str, ...] = ()  # names of projections, such as "in_proj"; none named: all of them
    experts: bool = True  # on the routed experts' tensors as well


@dataclass(frozen=True)
class RunConfig:
    """A training run, whole: phases of text, or chats."""

    run_dir: Path = field(
        default=Path("runs/default"), metadata={"hashed": False}
    )  # gets checkpoints, metrics and final/
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    phases: tuple[Phase, ...] = ()
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig, metadata={"hashed": False})
    anchor: dict[str, float] = field(default_factory=dict)  # source weights of the anchor stream
    anchor_max_epochs: EpochLimits = field(
        default=None, metadata=YOUNG
    )  # refuse a plan whose anchor reads a source more often than this
    anchor_kl: AnchorKLConfig = field(default_factory=AnchorKLConfig, metadata=YOUNG)
    order: str | tuple[str, ...] = "forward"  # "reversed", "shuffled" or phase names
    lora: LoraConfig | None = field(
        default=None, metadata=YOUNG
    )  # adapters on model.path instead of its weights
    sft: SftConfig | None = field(default=None, metadata=YOUNG)  # instead of phases, anchor and order
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

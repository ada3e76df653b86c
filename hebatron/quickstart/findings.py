"""What a quickstart finds, stage by stage: the report's whole input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hebatron.doctor import Diagnosis
from hebatron.metrics import Record


@dataclass(frozen=True)
class TokenizerRow:
    """How one language's held-out text is cut: UTF-8 bytes and tokens."""

    name: str
    num_bytes: int
    num_tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens


@dataclass(frozen=True)
class PhaseRow:
    """One phase of the curriculum as it was planned."""

    name: str
    sources: str
    tokens: int
    steps: int
    seq_len: int
    anchor_share: float


@dataclass(frozen=True)
class ResumeCheck:
    """A segment run through against the same segment stopped and resumed: sha256 of weights and optimizer."""

    steps: int
    stopped_at: int
    digest_through: str
    digest_resumed: str

    @property
    def bit_exact(self) -> bool:
        return self.digest_through == self.digest_resumed


@dataclass(frozen=True)
class Sample:
    """What the model wrote after one prompt, after the base and at the end."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class ExportCheck:
    """The exported folder opened by unpatched transformers: logits and greedy text against ours."""

    folder: Path
    transformers_version: str
    max_logit_difference: float
    same_greedy_text: bool


@dataclass(frozen=True)
class SpeedCheck:
    """Prefill of one batch through both models: medians of interleaved runs, and the sizes."""

    batch: int
    length: int
    repeats: int
    total_moe: int
    total_dense: int
    active_moe: int
    active_dense: int
    tokens_per_s_moe: float
    tokens_per_s_dense: float

    @property
    def speed_ratio(self) -> float:
        return self.tokens_per_s_moe / self.tokens_per_s_dense

    @property
    def size_ratio(self) -> float:
        return self.active_dense / self.active_moe


@dataclass(frozen=True)
class Measured:
    """What the stages after training found."""

    metrics: Sequence[Record]
    resume: ResumeCheck
    samples: Sequence[Sample]
    bpb_before: dict[str, float]
    bpb_after: dict[str, float]
    languages: dict[str, str]  # source -> he, en or code
    export: ExportCheck
    speed: SpeedCheck


@dataclass(frozen=True)
class Findings:
    """Everything the report shows."""

    diagnosis: Diagnosis
    command: str
    seed: int
    stages: Sequence[tuple[str, float]]  # name, seconds
    vocab_size: int
    tokenizer: Sequence[TokenizerRow]
    model_card: str
    phases: Sequence[PhaseRow]
    tokens_per_step: int
    figure: Path  # the PNG of hebatron.figures.plot
    measured: Measured

"""What the stages of a quickstart find besides its training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hebatron.doctor import Diagnosis


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
    """What the model wrote after one prompt, before and after what the stage trained."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class ChatCheck:
    """Training on chats: what was read, and what the model says and how it fares on held-out ones, before and after.

    masked_shares: of the tokens read, those without loss, by task. losses: nats per learnt token by task.
    bpb_before, bpb_after: bits per byte of held-out text by source.
    """

    steps: int
    used: int
    held_out: int
    masked_shares: dict[str, float]
    losses_before: dict[str, float]
    losses_after: dict[str, float]
    bpb_before: dict[str, float]
    bpb_after: dict[str, float]
    samples: Sequence[Sample]


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
class Findings:
    """Everything the report shows besides the run itself."""

    run_dir: Path
    diagnosis: Diagnosis
    command: str
    seed: int
    stages: Sequence[tuple[str, float]]  # name, seconds
    vocab_size: int
    tokenizer: Sequence[TokenizerRow]
    model_card: str
    resume: ResumeCheck
    chats: ChatCheck
    export: ExportCheck
    speed: SpeedCheck

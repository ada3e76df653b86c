"""A run as one frozen dataclass tree, read from TOML and overridden by `--section.field value`.

    config = load_run_config("examples/three_phases.toml", ["--training.seed", "7"])

Everything a run depends on is in the tree: it is printed, saved in the run folder and hashed. Unknown keys
are refused with "did you mean", and every error names the place: `phases[1].tokens must be > 0, got -5`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .curriculum import Curriculum, Phase
from .curriculum_presets import CURRICULA, LONG_SEQ_LEN
from .phases import EpochLimits
from .presets import PRESETS
from .trees import did_you_mean, from_table, to_table

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

    preset: str | None = None  # a function of hebatron.presets
    path: Path | None = None  # a checkpoint folder: its configuration and its weights
    pattern: str | None = None  # layer letters, for example "MEM*EME", with `fields` for the rest
    fields: dict[str, Any] = field(default_factory=dict)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters are fp32 masters either way


@dataclass(frozen=True)
class CorpusConfig:
    """One prepared corpus folder and the name that phases and anchor call it by."""

    name: str = field(metadata={"condition": "not empty"})
    path: Path = field(metadata={"hashed": False})  # the plan's hash covers the content


@dataclass(frozen=True)
class DataConfig:
    """Corpora and held-out text: documents chosen by the hash of their text, in no row of the plan."""

    corpora: tuple[CorpusConfig, ...] = ()  # for chats: only their held-out part is read
    tokenizer: Path = field(default=Path("tokenizer"), metadata={"hashed": False})
    held_out_permille: int = _checked(20, "in [0, 1000)")  # of each corpus; 0: none
    held_out: tuple[CorpusConfig, ...] = field(
        default=(), metadata={"hashed": False}
    )  # whole folders, besides
    held_out_tokens: int = _checked(20_000, "> 1", hashed=False)  # evaluated per source, the first by hash


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and what happens when a gradient is not finite."""

    learning_rate: float = _checked(3e-3, "> 0")
    beta1: float = _checked(0.9, "in [0, 1)")
    beta2: float = _checked(0.95, "in [0, 1)")
    eps: float = _checked(1e-8, "> 0")
    weight_decay: float = _checked(0.1, ">= 0")
    grad_clip: float = _checked(1.0, ">= 0")  # global L2 norm; 0: measured, not clipped
    max_bad_steps: int = _checked(3, "> 0")  # non-finite steps are skipped; this many in a row stop the run


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the step alone; see hebatron.optim.learning_rate."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = _checked(20, ">= 0")
    decay_share: float = _checked(0.2, "in [0, 1]")
    decay: Literal["linear", "sqrt"] = "linear"
    floor: float = _checked(0.0, "in [0, 1]")  # share of the peak that the decay aims at
    phase_warmup_steps: int = _checked(0, ">= 0")  # climb again at the start of each later phase


@dataclass(frozen=True)
class TrainingConfig:
    """Batch, router, random seed, and how often to evaluate, save and print."""

    tokens_per_batch: int = _checked(4096, "> 0")  # of one optimizer step
    tokens_per_microbatch: int = _checked(4096, "> 0")  # of one forward and backward
    router_aux_coefficient: float = _checked(1e-4, ">= 0")
    router_bias_rate: float = _checked(1e-3, ">= 0")
    seed: int = _checked(0, "in [0, 2**63)")  # of fresh weights, the plan and samples
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    checkpoint_every: int = _checked(200, "> 0", hashed=False)
    keep_last: int = _checked(2, "> 0", hashed=False)
    eval_every: int = _checked(100, "> 0", hashed=False)
    log_every: int = _checked(10, "> 0", hashed=False)  # steps per printed line where there is no terminal
    sample_prompts: tuple[str, ...] = field(default=(), metadata={"hashed": False})
    sample_tokens: int = _checked(48, "> 0", hashed=False)


@dataclass(frozen=True)
class CurriculumConfig:
    """Phases by name instead of written out: see curriculum_presets.py. They follow those that are written."""

    preset: str | None = None
    scale: float = 1.0  # of the preset's tokens
    sources: dict[str, dict[str, float]] = field(default_factory=dict)  # by phase
    max_seq_len: int = LONG_SEQ_LEN
    anchor_share: float = 0.25
    batch_ramp: int = 8
    max_epochs: float | None = None


@dataclass(frozen=True)
class AnchorKLConfig:
    """KL(base || model) on anchor rows, to a frozen base: see anchor_kl.py."""

    coefficient: float = _checked(0.0, ">= 0")  # 0: no base is loaded
    base: Path | None = field(default=None, metadata={"hashed": False})  # default: model.path
    temperature: float = _checked(1.0, "> 0")


@dataclass(frozen=True)
class SftConfig:
    """Chats instead of phases: what chats.py reads, weighs and packs into rows, and what of it is kept out."""

    chats: tuple[Path, ...] = field(metadata={"condition": "not empty", "hashed": False})  # .jsonl(.zst)
    seq_len: int = field(metadata={"condition": "> 1"})  # of a row, which holds whole chats
    template: str = field(default="nemotron3", metadata={"hashed": False})  # or a file; in the rows' hash
    epochs: int = _checked(1, "> 0")
    task_weights: dict[str, float] = field(default_factory=dict)  # readings an epoch; 1 where not named
    lang_weights: dict[str, float] = field(default_factory=dict)
    truncation: Literal["drop", "cut"] = "drop"  # of a chat longer than a row
    bad: Literal["error", "drop"] = "error"
    held_out_permille: int = _checked(20, "in [0, 1000)")  # by hash; data.held_out_tokens of a task measured
    neftune_alpha: float = _checked(0.0, ">= 0")  # noise on embeddings in training; 0: none, 5 is customary


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen model: see lora.py."""

    rank: int = _checked(16, "> 0")
    alpha: float = _checked(32.0, "> 0")  # what an adapter computes is scaled by alpha / rank
    dropout: float = _checked(0.0, "in [0, 1)")  # before the projections' adapters; 0 with experts
    targets: tuple[str, ...] = ()  # names of projections, such as "in_proj"; none named: all of them
    experts: bool = True  # on the routed experts' tensors as well


@dataclass(frozen=True)
class RunConfig:
    """A training run, whole: phases of text, or chats."""

    run_dir: Path = field(default=Path("runs/default"), metadata={"hashed": False})
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    phases: tuple[Phase, ...] = ()
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig, metadata={"hashed": False})
    anchor: dict[str, float] = field(default_factory=dict)  # source weights of the anchor stream
    anchor_max_epochs: EpochLimits = field(default=None, metadata=YOUNG)
    anchor_kl: AnchorKLConfig = field(default_factory=AnchorKLConfig, metadata=YOUNG)
    order: str | tuple[str, ...] = "forward"  # "reversed", "shuffled" or phase names
    lora: LoraConfig | None = field(
        default=None, metadata=YOUNG
    )  # adapters on model.path instead of its weights
    sft: SftConfig | None = field(default=None, metadata=YOUNG)  # instead of phases, anchor and order
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


# ---------------------------------------------------------------- reading


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML run file, apply `--section.field value` overrides and check the result.

    Raises ValueError that names the file and the place for a missing file, bad TOML, an unknown key, a wrong
    type or a value out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"run file: path must be a TOML file, got {path}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be valid TOML, got {error}") from error
    try:
        config = from_table(RunConfig, table)
        if overrides:
            config = _override(config, overrides)
        config = resolve_phases(config)
        check_run_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    import tyro  # 0.1 s, and only a command line with overrides needs it

    def parse(arguments: Sequence[str]) -> RunConfig | None:
        told = io.StringIO()
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                kind = tyro.conf.AvoidSubcommands[RunConfig]  # [sft] is there or not; its fields are options
                return tyro.cli(kind, default=config, args=list(arguments))
        except SystemExit:  # tyro refuses with a box of several lines
            return None

    changed = parse(overrides)
    if changed is not None:
        return changed
    starts = [i for i, word in enumerate(overrides) if i == 0 or word.startswith("--")]
    for start, stop in itertools.pairwise([*starts, len(overrides)]):
        group = overrides[start:stop]
        if parse(group) is None:  # each alone, to find the one to name
            option = group[0].partition("=")[0]
            key = option.removeprefix("--").replace("-", "_")
            known = [
                re.sub(r"\[(\d+)\]", r".\1", line.split(" = ")[0]) for line in describe(config).splitlines()
            ]
            if key in known:
                raise ValueError(f"{option} must have a value of its field's type, got {' '.join(group)!r}")
            raise ValueError(f"{option} must name a field of the run file{did_you_mean(key, known)}")
    raise ValueError(f"{' '.join(overrides)!r} must be options that go together, each given once")


# ---------------------------------------------------------------- checking


def check_run_config(config: RunConfig) -> None:
    """Check every range and every cross-reference; the error names the place, as in `phases[1].tokens`."""
    if resolve_phases(config) != config:
        raise ValueError("phases must end with those of curriculum.preset, got others; see resolve_phases")
    _check_ranges(config, "")
    model = config.model
    given = [name for name in ("preset", "path", "pattern") if getattr(model, name) is not None]
    if len(given) != 1:
        raise ValueError(f"model must have exactly one of preset, path, pattern, got {given or 'none'}")
    if model.preset is not None and model.preset not in PRESETS:
        hint = did_you_mean(model.preset, PRESETS)
        raise ValueError(f"model.preset must be one of {', '.join(PRESETS)}, got {model.preset!r}{hint}")
    if model.path is not None and model.fields:
        raise ValueError(f"model.fields must be empty with model.path, got {sorted(model.fields)}")
    if config.lora is not None and model.path is None:
        raise ValueError("model.path must be given with [lora], which adapts a trained model, got none")
    _check_names(config.data.corpora, "data.corpora")
    _check_names(config.data.held_out, "data.held_out")
    names = [corpus.name for corpus in config.data.corpora]
    for i, corpus in enumerate(config.data.held_out):
        if config.data.held_out_permille and corpus.name in names:
            raise ValueError(
                f"data.held_out[{i}].name must differ from data.corpora's while held_out_permille is not 0, "
                f"got {corpus.name!r}"
            )
    if config.sft is not None:
        _check_sft(config, config.sft)
        return
    if not config.phases:
        raise ValueError("run file must have phases or [sft], got neither")
    if not config.data.corpora:
        raise ValueError("data.corpora must be not empty with phases, got ()")
    _check_sources(config.anchor, names, "anchor")
    for i, phase in enumerate(config.phases):
        _check_sources(phase.sources, names, f"phases[{i}].sources")
        if phase.anchor_share > 0 and not config.anchor:
            raise ValueError(f"phases[{i}].anchor_share must be 0 without [anchor], got {phase.anchor_share}")
        batch = min(phase.ramp(config.training.tokens_per_batch))
        limit = min(config.training.tokens_per_microbatch, batch)
        if phase.seq_len > limit:
            raise ValueError(
                f"phases[{i}].seq_len must be at most training.tokens_per_microbatch and tokens_per_batch, "
                f"{limit}, got {phase.seq_len}"
            )
    _check_anchor_kl(config)
    curriculum(config)


def _check_anchor_kl(config: RunConfig) -> None:
    term = config.anchor_kl
    if term.coefficient == 0:
        return
    if term.base is None and config.model.path is None:
        raise ValueError(
            "anchor_kl.base must be given for a run from fresh weights (no model.path), got none"
        )
    if not any(phase.anchor_share > 0 for phase in config.phases):
        raise ValueError(
            f"anchor_kl.coefficient must be 0 where no phase has an anchor_share, got {term.coefficient}"
        )


def _check_sft(config: RunConfig, sft: SftConfig) -> None:
    """Chats have no phases; a row must fit where batches are made."""
    for name in ("phases", "curriculum", "anchor", "anchor_max_epochs", "anchor_kl", "order"):
        if getattr(config, name) != getattr(RunConfig(), name):
            raise ValueError(f"{name} must not be given with [sft], got {getattr(config, name)!r}")
    if config.data.corpora and not config.data.held_out_permille:
        raise ValueError("data.held_out_permille must be > 0 with [sft] and data.corpora, got 0")
    limit = min(config.training.tokens_per_microbatch, config.training.tokens_per_batch)
    if sft.seq_len > limit:
        raise ValueError(
            f"sft.seq_len must be at most training.tokens_per_microbatch and tokens_per_batch, {limit}, "
            f"got {sft.seq_len}"
        )


def curriculum(config: RunConfig) -> Curriculum:
    """The curriculum part of the tree, as the plan is built from it."""
    return Curriculum(
        config.phases, config.anchor, config.order, config.training.seed, config.anchor_max_epochs
    )


def resolve_phases(config: RunConfig) -> RunConfig:
    """The run with the phases of its curriculum.preset written out behind its own; one that has them is kept."""
    section = config.curriculum
    if section.preset is None:
        return config
    if section.preset not in CURRICULA:
        hint = did_you_mean(section.preset, CURRICULA)
        raise ValueError(
            f"curriculum.preset must be one of {', '.join(CURRICULA)}, got {section.preset!r}{hint}"
        )
    phases = CURRICULA[section.preset](
        section.scale,
        section.sources,
        tokens_per_batch=config.training.tokens_per_batch,
        max_seq_len=section.max_seq_len,
        anchor_share=section.anchor_share,
        batch_ramp=section.batch_ramp,
        max_epochs=section.max_epochs,
    )
    if config.phases[-len(phases) :] == phases:
        return config
    return dataclasses.replace(config, phases=(*config.phases, *phases))


def _check_ranges(section: Any, place: str) -> None:
    for spec in dataclasses.fields(section):
        value, where = getattr(section, spec.name), f"{place}{spec.name}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} must be finite, got {value}")
        condition = spec.metadata.get("condition")
        if condition and not CONDITIONS[condition](value):
            raise ValueError(f"{where} must be {condition}, got {value!r}")
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{where}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    _check_ranges(item, f"{where}[{i}].")


def _check_names(corpora: Sequence[CorpusConfig], place: str) -> None:
    for i, corpus in enumerate(corpora):
        if corpus.name in [other.name for other in corpora[:i]]:
            raise ValueError(f"{place}[{i}].name must be unique, got {corpus.name!r} again")
        if "/" in corpus.name:
            raise ValueError(f"{place}[{i}].name must be without '/' (corpus/source), got {corpus.name!r}")


def _check_sources(weights: Mapping[str, float], corpora: Sequence[str], place: str) -> None:
    for name in weights:
        corpus = name.partition("/")[0]
        if corpus not in corpora:
            hint = did_you_mean(corpus, corpora)
            raise ValueError(f"{place}.{name} must name one of data.corpora {', '.join(corpora)}{hint}")


# ---------------------------------------------------------------- identity


def describe(config: RunConfig) -> str:
    """The resolved tree, one `section.field = value` a line."""

    def lines(value: Any, place: str) -> list[str]:
        if isinstance(value, dict) and value:
            return [line for key, item in value.items() for line in lines(item, f"{place}.{key}".lstrip("."))]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [line for i, item in enumerate(value) for line in lines(item, f"{place}[{i}]")]
        return [f"{place} = {json.dumps(value, ensure_ascii=False)}"]

    return "\n".join(lines(to_table(config), ""))


def config_hash(config: RunConfig) -> str:
    """sha256 of everything that can change the weights (checkpoint cadence, paths and the like cannot)."""
    text = json.dumps(to_table(config, hashed_only=True), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()

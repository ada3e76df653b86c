"""A run as one frozen dataclass tree, read from TOML and overridden by `--section.field value`.

    config = load_run_config("examples/three_phases.toml", ["--training.seed", "7"])

Everything a run depends on is in the tree: it is printed, saved in the run folder and hashed. Unknown keys
are refused with "did you mean", and every error names the place: `phases[1].tokens must be > 0, got -5`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from .curriculum import Curriculum, Phase
from .presets import PRESETS

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

TYPE_NAMES = {str: "a string", Path: "a string", int: "an integer", float: "a number", bool: "true or false"}


def _checked(default: Any, condition: str, *, hashed: bool = True) -> Any:
    """A field whose value must meet CONDITIONS[condition]; `hashed=False` if it cannot change the weights."""
    return field(default=default, metadata={"condition": condition, "hashed": hashed})


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

    corpora: tuple[CorpusConfig, ...] = _checked((), "not empty")
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
class RunConfig:
    """A training run, whole."""

    run_dir: Path = field(default=Path("runs/default"), metadata={"hashed": False})
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    phases: tuple[Phase, ...] = _checked((), "not empty")
    anchor: dict[str, float] = field(default_factory=dict)  # source weights of the anchor stream
    order: str | tuple[str, ...] = "forward"  # "reversed", "shuffled" or phase names
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
                return tyro.cli(RunConfig, default=config, args=list(arguments))
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
            raise ValueError(f"{option} must name a field of the run file{_did_you_mean(key, known)}")
    raise ValueError(f"{' '.join(overrides)!r} must be options that go together, each given once")


def from_table(kind: type[Any], table: Mapping[str, Any], place: str = "") -> Any:
    """Build dataclass `kind` from a TOML table, refusing unknown keys, missing keys and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{place}." if place else ""
    for key in table:
        if key not in fields:
            raise ValueError(f"{prefix}{key} must be one of {', '.join(fields)}{_did_you_mean(key, fields)}")
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in table:
            raise ValueError(f"{prefix}{name} must be given, got nothing")
    hints = typing.get_type_hints(kind)
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:  # a dataclass that checks itself, such as Phase
        raise ValueError(f"{place}: {error}") from error


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return tuple(value) if isinstance(value, list) else value
    if origin in (
        typing.Union,
        types.UnionType,
    ):  # "X | None" (null in a saved run) and "str | tuple[str, ...]"
        if value is None and types.NoneType in args:
            return None
        others = [arg for arg in args if arg is not types.NoneType]
        return _convert(others[-1] if isinstance(value, list) else others[0], value, place)
    if origin is Literal:
        if value not in args:
            choices = ", ".join(map(str, args))
            raise ValueError(f"{place} must be one of {choices}, got {value!r}{_did_you_mean(value, args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{place} must be an array, got {value!r}")
        return tuple(_convert(args[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin is dict or dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{place} must be a table, got {value!r}")
        if origin is dict:
            return {key: _convert(args[1], item, f"{place}.{key}") for key, item in value.items()}
        return from_table(hint, value, place)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{place} must be {TYPE_NAMES[hint]}, got {value!r}")
    return value


def _did_you_mean(word: Any, choices: typing.Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---------------------------------------------------------------- checking


def check_run_config(config: RunConfig) -> None:
    """Check every range and every cross-reference; the error names the place, as in `phases[1].tokens`."""
    _check_ranges(config, "")
    model = config.model
    given = [name for name in ("preset", "path", "pattern") if getattr(model, name) is not None]
    if len(given) != 1:
        raise ValueError(f"model must have exactly one of preset, path, pattern, got {given or 'none'}")
    if model.preset is not None and model.preset not in PRESETS:
        hint = _did_you_mean(model.preset, PRESETS)
        raise ValueError(f"model.preset must be one of {', '.join(PRESETS)}, got {model.preset!r}{hint}")
    if model.path is not None and model.fields:
        raise ValueError(f"model.fields must be empty with model.path, got {sorted(model.fields)}")
    _check_names(config.data.corpora, "data.corpora")
    _check_names(config.data.held_out, "data.held_out")
    names = [corpus.name for corpus in config.data.corpora]
    for i, corpus in enumerate(config.data.held_out):
        if config.data.held_out_permille and corpus.name in names:
            raise ValueError(
                f"data.held_out[{i}].name must differ from data.corpora's while held_out_permille is not 0, "
                f"got {corpus.name!r}"
            )
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
    curriculum(config)


def curriculum(config: RunConfig) -> Curriculum:
    """The curriculum part of the tree, as the plan is built from it."""
    return Curriculum(config.phases, config.anchor, config.order, config.training.seed)


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
            hint = _did_you_mean(corpus, corpora)
            raise ValueError(f"{place}.{name} must name one of data.corpora {', '.join(corpora)}{hint}")


# ---------------------------------------------------------------- identity


def to_table(config: Any, *, hashed_only: bool = False) -> dict[str, Any]:
    """The tree as JSON values; `hashed_only` leaves out what cannot change the weights."""
    table: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        if hashed_only and not spec.metadata.get("hashed", True):
            continue
        table[spec.name] = _plain(getattr(config, spec.name), hashed_only)
    return table


def _plain(value: Any, hashed_only: bool) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value, hashed_only=hashed_only)
    if isinstance(value, (tuple, list)):
        return [_plain(item, hashed_only) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, hashed_only) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


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


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two trees of JSON values differ: `training.seed: 1 -> 2`, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [
            (f"{place}.{key}".lstrip("."), old.get(key), new.get(key))
            for key in sorted(old.keys() | new.keys())
        ]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{place}[{i}]", left, right) for i, (left, right) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{place}: {old!r} -> {new!r}"]
    return [line for where, left, right in pairs for line in differences(left, right, where)]

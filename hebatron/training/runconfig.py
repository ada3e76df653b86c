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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..curriculum.phases import Curriculum
from ..curriculum.presets import CURRICULA
from ..presets import PRESETS
from ..spelling import did_you_mean
from .sections import CONDITIONS, CorpusConfig, CurriculumConfig, RunConfig, SftConfig
from .trees import from_table, hint_at, to_table, type_name

# ---------------------------------------------------------------- reading


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML run file, apply `--section.field value` overrides and check the result.

    Raises ValueError that names the file and the place for a missing file, bad TOML, an unknown key, a wrong
    type or a value out of range.
    """
    path = Path(path)
    if not path.is_file():
        absent = "" if path.exists() else ", which does not exist"
        raise ValueError(f"run file: path must be a TOML file, got {path}{absent}")
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
                got = " ".join(group).removeprefix(option).lstrip("= ")
                raise ValueError(f"{option} must be {type_name(hint_at(RunConfig, key))}, got {got!r}")
            section = key.partition(".")[0]
            if section in known:  # lora or sft, which the run file has not
                raise ValueError(f"{option} must be of a section that the run file has, got no [{section}]")
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
    if config.schedule.phase_warmup_steps:
        raise ValueError(
            "schedule.phase_warmup_steps must be 0 with [sft], which has no phases, "
            f"got {config.schedule.phase_warmup_steps}"
        )
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
        if section != CurriculumConfig():
            raise ValueError("curriculum.preset must be given for the rest of [curriculum], got none")
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

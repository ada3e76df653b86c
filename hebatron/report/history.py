"""What a run folder tells afterwards, for pictures and reports: its records, configuration, plan and texts.

A run may be unfinished, or its corpora gone: what cannot be read is a line in `History.absent`, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..curriculum.plan import Plan
from ..data.corpus import Corpus
from ..training.checkpoint import checkpoints, load_state, read_json
from ..training.metrics import Record, iter_metrics, printable_name
from ..training.run import TOKENIZER, open_plan
from ..training.sections import RunConfig
from ..training.trees import from_table

LANGUAGE_NAMES = {"he": "Hebrew", "en": "English", "code": "code"}
NEEDED = {
    "step": ("phase", "loss", "lr", "tokens", "skipped"),
    "eval": ("phase", "bpb"),
    "sample": ("prompt", "text"),
    "alarm": ("phase", "what", "rows", "documents"),
}


@dataclass(frozen=True)
class History:
    """One run as its folder holds it now. `corpora`: those of data.corpora and data.held_out, by name, whose folder
    is still where it was."""

    run_dir: Path
    records: list[Record]
    config: RunConfig | None = None
    state: Mapping[str, Any] = field(default_factory=dict)  # of the newest checkpoint
    corpora: Sequence[tuple[str, Corpus]] = ()
    absent: list[str] = field(default_factory=list)
    model: ModelConfig | None = None  # that the newest checkpoint, or the exported model, states

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    @cached_property
    def all_steps(self) -> list[Record]:
        return self.of_kind("step")

    @cached_property
    def steps(self) -> list[Record]:
        """Step records with a loss: those whose gradient was not finite are left out."""
        return [record for record in self.all_steps if not record["skipped"]]

    @cached_property
    def evals(self) -> list[Record]:
        return self.of_kind("eval")

    @cached_property
    def tokens_after(self) -> dict[int, int]:
        """Step -> tokens trained on up to its end."""
        ends = np.cumsum([record["tokens"] for record in self.all_steps])
        return dict(zip((record["step"] for record in self.all_steps), ends.tolist(), strict=True))

    @cached_property
    def phases(self) -> list[tuple[str, int, int]]:
        """(name, step before its first, last step) of each phase, as they ran so far."""
        spans: list[tuple[str, int, int]] = []
        for record in self.all_steps:
            if spans and spans[-1][0] == record["phase"]:
                spans[-1] = (*spans[-1][:2], record["step"])
            else:
                spans.append((record["phase"], record["step"] - 1, record["step"]))
        return spans

    @cached_property
    def phase_evals(self) -> list[tuple[str, Record]]:
        """Each phase's last evaluation; of a run of one phase its first and last, named by their steps."""
        last = {record["phase"]: record for record in self.evals}
        if len(last) == 1 and len(self.evals) > 1:
            return [(f"step {record['step']}", record) for record in (self.evals[0], self.evals[-1])]
        return list(last.items())

    @cached_property
    def languages(self) -> dict[str, str]:
        """Source, and corpus/source, -> language of most of its tokens, of the corpora that can be read."""
        found: dict[str, str] = {}
        for name, corpus in self.corpora:
            tokens_SG = np.zeros((len(corpus.sources), len(corpus.langs)), np.int64)
            np.add.at(tokens_SG, (corpus.source_ids, corpus.lang_ids), corpus.lengths)
            for source, tokens_G in zip(corpus.sources, tokens_SG, strict=True):
                found[source] = found[f"{name}/{source}"] = corpus.langs[int(tokens_G.argmax())]
        return found

    def by_language(self, sources: Iterable[str]) -> dict[str, list[str]]:
        """Sources by the name of their language: Hebrew, English, code, others, not known."""
        groups: dict[str, list[str]] = {}
        for source in sources:
            groups.setdefault(self.languages.get(source, ""), []).append(source)
        order = [*LANGUAGE_NAMES, *sorted(groups.keys() - {*LANGUAGE_NAMES, ""}), ""]
        return {language_name(code): groups[code] for code in order if code in groups}

    @cached_property
    def sources(self) -> list[str]:
        """Every source ever evaluated, in the order of its first evaluation."""
        return list(dict.fromkeys(source for record in self.evals for source in record["bpb"]))

    def plan(self) -> Plan:
        """The plan as its corpora give it now. Raises ValueError where they, or the configuration, are gone."""
        if self.config is None:
            raise ValueError(f"plan: run_dir must hold its configuration, got {self.run_dir}")
        config, copy = self.config, self.run_dir / TOKENIZER
        if copy.is_dir():
            config = replace(config, data=replace(config.data, tokenizer=copy))
        return open_plan(config, verify=False)[0]


def language_name(code: str) -> str:
    return LANGUAGE_NAMES.get(code, code) or "language not known"


def load_history(run_dir: Path | str) -> History:
    """Read a run folder. Only metrics.jsonl must be there; records after a damaged line are left out and said so.

    Raises ValueError where there is no metrics.jsonl, or a record lacks what every version has written.
    """
    run_dir, absent = Path(run_dir), list[str]()
    records: list[Record] = []
    lines = iter_metrics(run_dir)
    try:
        for record in lines:
            records.append(record)
    except ValueError as error:
        absent.append(f"{error}; what follows it is not shown")
    for record in records:
        missing = [key for key in NEEDED.get(record.get("kind", ""), ()) if key not in record]
        if "kind" not in record or missing:
            raise ValueError(
                f"metrics: records of {run_dir} must have {', '.join(missing) or 'kind'}, "
                f"got none at step {record['step']}"
            )
    config = _config(run_dir, absent)
    entries = () if config is None else (*config.data.corpora, *config.data.held_out)
    corpora: list[tuple[str, Corpus]] = []
    for entry in entries:
        try:
            corpora.append((entry.name, Corpus.open(entry.path, verify=False)))
        except (ValueError, OSError) as error:
            absent.append(f"corpus {entry.name}: {error}")
    state = _state(run_dir, absent)
    return History(run_dir, records, config, state, corpora, absent, _model(run_dir, state, absent))


def _config(run_dir: Path, absent: list[str]) -> RunConfig | None:
    path = run_dir / "config.json"
    if not path.is_file():
        absent.append("configuration: no config.json in the run folder")
        return None
    try:
        config: RunConfig = from_table(RunConfig, read_json(path))
    except ValueError as error:
        absent.append(f"configuration: {path} cannot be read by this version: {error}")
        return None
    return config


def _state(run_dir: Path, absent: list[str]) -> dict[str, Any]:
    """state.json of the newest checkpoint that has a readable one; the weights are not looked at."""
    for folder in checkpoints(run_dir / "checkpoints"):
        try:
            return load_state(folder)
        except (ValueError, OSError) as error:
            absent.append(f"checkpoint {folder.name}: {error}")
    return {}


def _model(run_dir: Path, state: Mapping[str, Any], absent: list[str]) -> ModelConfig | None:
    final = run_dir / "final" / "config.json"
    try:
        table = state.get("model") or (read_json(final) if final.is_file() else None)
        return None if table is None else ModelConfig.from_hub(table)
    except ValueError as error:
        absent.append(f"model: {error}")
        return None


# ---------------------------------------------------------------- several runs


def load_histories(run_dirs: Sequence[Path]) -> tuple[list[History], list[str]]:
    """Several runs and names that tell them apart. A run without a training step is refused."""
    names = unique_names(run_dirs)
    histories = [load_history(run_dir) for run_dir in run_dirs]
    for history in histories:
        require_steps(history)
    return histories, names


def require_steps(history: History) -> None:
    if not history.steps:
        raise ValueError(f"plot: run_dir must hold at least one training step, got {history.run_dir}")


def unique_names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    depth = 1
    names = ["/".join(part[-depth:]) for part in parts]
    while len(set(names)) < len(set(parts)):
        depth += 1
        names = ["/".join(part[-depth:]) for part in parts]
    if len(set(parts)) < len(parts):
        raise ValueError(f"runs must be given once each, got {', '.join(map(printable_name, names))}")
    return names


def together(histories: Sequence[History]) -> History:
    """The corpora of all: a source's language is known where one run still has its corpus."""
    corpora = [entry for history in reversed(histories) for entry in history.corpora]
    return History(histories[0].run_dir, [], corpora=corpora)


def mean_groups(histories: Sequence[History]) -> dict[str, list[str]]:
    """The sources that every run has, as Hebrew and as the anchor's languages: what means can be compared over."""
    common = set.intersection(*(set(history.sources) for history in histories))
    groups = together(histories).by_language(s for s in histories[0].sources if s in common)
    unknown = groups.pop(language_name(""), [])
    hebrew = groups.pop("Hebrew", [])
    means = {"Hebrew": hebrew, "anchor": [source for members in groups.values() for source in members]}
    means["language not known"] = unknown
    return {name: sources for name, sources in means.items() if sources}


def seed_groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Indices of the runs whose names differ in a trailing -seedN alone, by what is before it."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(re.sub(r"-seed\d+$", "", name), []).append(i)
    return groups


def mean(values: Iterable[float]) -> float:
    """NaN where there are none."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; NaN of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

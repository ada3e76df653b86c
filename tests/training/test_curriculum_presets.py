"""The published curriculum, scaled: its proportions, its rule for rows and batches, and its place in a run file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hebatron.curriculum.phases import Phase
from hebatron.curriculum.presets import HEBATRON_TOKENS, hebatron_phases
from hebatron.training.runconfig import (
    check_run_config,
    config_hash,
    describe,
    load_run_config,
    resolve_phases,
)
from hebatron.training.sections import CurriculumConfig, RunConfig
from hebatron.training.trees import from_table, to_table

SOURCES = {"formal": {"he": 1.0}, "colloquial": {"he": 2.0}, "long": {"he": 1.0, "en": 1.0}}


def test_hebatron_phases_at_scale_one_are_the_published_ones() -> None:
    formal, colloquial, long = hebatron_phases(1.0, SOURCES, tokens_per_batch=16_777_216)
    assert [phase.tokens for phase in (formal, colloquial, long)] == [
        75_500_000_000,
        3_360_000_000,
        20_400_000_000,
    ]
    assert [phase.seq_len for phase in (formal, colloquial, long)] == [8192, 8192, 65_536]
    assert formal.ramp(16_777_216) == (2_097_152, 16_777_216) and colloquial.batch_tokens is None
    assert [phase.sources for phase in (formal, colloquial, long)] == list(SOURCES.values())
    assert {phase.anchor_share for phase in (formal, colloquial, long)} == {0.25}


@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-2, 1e-4])
@pytest.mark.parametrize("max_seq_len", [65_536, 4096, 1000, 64])
def test_hebatron_phases_keep_their_proportions_at_every_scale(scale: float, max_seq_len: int) -> None:
    options: dict[str, Any] = {"tokens_per_batch": 1 << 20, "max_seq_len": max_seq_len}
    if 3.36e9 * scale < 16 * (max_seq_len // 8) or 20.4e9 * scale < 16 * max_seq_len:
        with pytest.raises(ValueError, match=r"must give phase .* at least 16 rows"):
            hebatron_phases(scale, SOURCES, **options)
        return
    phases = hebatron_phases(scale, SOURCES, **options)
    for phase, full in zip(phases, (75.5e9, 3.36e9, 20.4e9), strict=True):
        assert abs(phase.tokens - full * scale) <= 1
        assert phase.seq_len == (max_seq_len if phase.name == "long" else max_seq_len // 8)
        assert phase.num_rows >= 16


def test_hebatron_phases_say_which_scale_would_do() -> None:
    options: dict[str, Any] = {"tokens_per_batch": 1 << 20}
    with pytest.raises(ValueError, match=r"phase 'long' at least 16 rows of 65536 .*raise it to 5\.14e-05,"):
        hebatron_phases(5e-5, SOURCES, **options)
    phases = hebatron_phases(5.15e-5, SOURCES, **options)
    assert [phase.num_rows for phase in phases] == [474, 21, 16]
    with pytest.raises(ValueError, match=r"phase 'colloquial' at least 16 rows of 8192 tokens, got 33600"):
        hebatron_phases(1e-5, SOURCES, **options)
    assert hebatron_phases(1e-5, SOURCES, max_seq_len=8192, **options)[2].seq_len == 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "scale must be above 0 and finite, got 0.0"),
        ({"scale": float("nan")}, "scale must be above 0 and finite, got nan"),
        ({"max_seq_len": 7}, "max_seq_len must be at least 8, got 7"),
        ({"batch_ramp": 0}, "batch_ramp must be at least 1, got 0"),
        (
            {"sources": {"formal": {"he": 1.0}}},
            r"sources must be of formal, colloquial, long, got \['formal'\]",
        ),
        ({"tokens_per_batch": 65_535}, "tokens_per_batch must hold a row of 65536 tokens and, divided"),
        ({"tokens_per_batch": 65_536, "batch_ramp": 9}, ".* batch_ramp = 9, one of 8192, got 65536"),
    ],
)
def test_hebatron_phases_refuse(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"scale": 1e-2, "sources": SOURCES, "tokens_per_batch": 1 << 20}
    with pytest.raises(ValueError, match=f"curriculum: {message}"):
        hebatron_phases(**{**good, **changes})


RUN = """
[model]
preset = "tiny"
[data]
corpora = [{ name = "he", path = "a" }, { name = "en", path = "b" }]
[curriculum]
preset = "hebatron"
scale = 1e-6
max_seq_len = 512
sources = { formal = { he = 1.0 }, colloquial = { he = 2.0 }, long = { he = 1.0, en = 1.0 } }
[anchor]
en = 1.0
"""
BASE = """
[[phases]]
name = "base"
pinned = true
tokens = 1000
seq_len = 64
sources = { en = 1.0 }
"""


def read(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load_run_config(path, overrides)


def test_a_run_file_names_the_curriculum_and_gets_its_phases(tmp_path: Path) -> None:
    config = read(tmp_path, RUN)
    written = hebatron_phases(1e-6, SOURCES, tokens_per_batch=4096, max_seq_len=512)
    assert config.phases == written
    assert "phases[2].seq_len = 512" in describe(config) and "curriculum.scale = 1e-06" in describe(config)
    assert [phase["tokens"] for phase in to_table(config, hashed_only=True)["phases"]] == [
        75_500,
        3_360,
        20_400,
    ]
    spelt_out = dataclasses.replace(config, curriculum=CurriculumConfig())
    assert config_hash(config) == config_hash(
        spelt_out
    )  # the phases are the run; where they came from is not
    doubled = read(tmp_path, RUN, "--curriculum.scale", "2e-6")
    assert doubled.phases[0].tokens == 151_000 and config_hash(doubled) != config_hash(config)
    assert read(tmp_path, RUN, "--curriculum.max-epochs", "3").phases[1].max_epochs == 3.0


def test_a_resolved_run_stays_as_it_is_and_phases_before_it_stay_first(tmp_path: Path) -> None:
    for text, names in ((RUN, [*HEBATRON_TOKENS]), (RUN + BASE, ["base", *HEBATRON_TOKENS])):
        config = read(tmp_path, text)
        assert [phase.name for phase in config.phases] == names
        again = from_table(RunConfig, json.loads(json.dumps(to_table(config))))
        assert again == resolve_phases(again) == config
        check_run_config(again)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"hebatron"', '"hebatrn"', r"curriculum.preset must be one of hebatron, got .*mean 'hebatron'\?"),
        ("scale = 1e-6", "scale = 1e-9", "scale must give phase 'formal' at least 16 rows of 64"),
        ("he = 2.0", "hb = 2.0", r"phases\[1\].sources.hb must name one of data.corpora"),
        ("formal = {", "formel = {", "curriculum: sources must be of formal, colloquial, long, got"),
        ("scale = 1e-6", "scal = 1e-6", r"curriculum.scal must be one of .*; did you mean 'scale'\?"),
        (
            'preset = "hebatron"\n',
            "",
            "curriculum.preset must be given for the rest of .curriculum., got none",
        ),
        ("[anchor]\nen = 1.0", "", r"phases\[0\].anchor_share must be 0 without \[anchor\], got 0.25"),
        ("[anchor]", BASE.replace('"base"', '"long"') + "[anchor]", "different names, got"),
    ],
)
def test_a_run_file_with_a_wrong_curriculum_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in RUN
    with pytest.raises(ValueError, match=message):
        read(tmp_path, RUN.replace(old, new, 1))


def test_phases_that_are_not_the_named_ones_are_refused(tmp_path: Path) -> None:
    config = read(tmp_path, RUN)
    other = dataclasses.replace(config, phases=(Phase("p", {"he": 1.0}, 1000, 16),))
    with pytest.raises(ValueError, match=r"phases must end with those of curriculum.preset, got others"):
        check_run_config(other)

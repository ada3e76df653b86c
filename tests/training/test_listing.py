"""`hebatron fields`: every field of a run file, as the loader reads it, with what the dataclasses say of it."""

import dataclasses
import re
import tomllib

import pytest

from hebatron.cli import main
from hebatron.curriculum.phases import Phase
from hebatron.training import sections
from hebatron.training.listing import listing
from hebatron.training.sections import LoraConfig, RunConfig, TrainingConfig
from hebatron.training.trees import from_table, plain


def test_the_listing_is_a_run_file_of_defaults() -> None:
    told = tomllib.loads(listing())
    assert from_table(TrainingConfig, told["training"]) == TrainingConfig()
    assert from_table(LoraConfig, told["lora"]) == LoraConfig()
    for spec in dataclasses.fields(RunConfig):
        section = getattr(RunConfig(), spec.name)
        if dataclasses.is_dataclass(section):
            for name, value in told[spec.name].items():
                if not isinstance(value, list) or name not in ("corpora", "held_out"):
                    assert value == plain(getattr(section, name)), (spec.name, name)


def test_the_listing_has_every_field_with_its_meaning() -> None:
    lines = listing().splitlines()
    for kind in (RunConfig, *vars(sections).values(), Phase):
        for spec in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            told = [line for line in lines if re.match(rf"(# )?{spec.name} =|\[+(\w+\.)?{spec.name}\]", line)]
            assert told, spec.name
            for line in (line for line in told if " =" in line):
                assert re.search(r"  # \S.* \([a-z].*\)$", line), line


@pytest.mark.parametrize(
    ("name", "has", "has_not"),
    [
        ("training", "tokens_per_batch = 4096", "beta1"),
        ("data", "[[data.corpora]]", "[model]"),
        ("phases", "# seq_len =", "run_dir"),
        ("training.seed", "seed = 0", "device"),
        ("run_dir", 'run_dir = "runs/default"', "order"),
    ],
)
def test_a_section_or_field_alone(
    name: str, has: str, has_not: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fields", name]) == 0
    told = capsys.readouterr().out
    assert has in told and has_not not in told


def test_a_field_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fields", "training.sed"]) == 2
    assert "did you mean 'training.seed'?" in capsys.readouterr().err

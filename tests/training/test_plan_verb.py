"""`hebatron plan`: what it prints is what the run will do."""

import dataclasses
from pathlib import Path

import pytest
from toy import toy_config, toy_train, write_corpora

from hebatron.cli import main
from hebatron.training.run import open_plan
from hebatron.verbs.plan import describe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


RUN = """
run_dir = "{run_dir}"
[model]
preset = "tiny"
[data]
tokenizer = "{root}/tok"
held_out_permille = 150
corpora = [{{ name = "he", path = "{root}/he" }}, {{ name = "en", path = "{root}/en" }}]
[anchor]
en = 1.0
[[phases]]
name = "formal"
tokens = 512
seq_len = 16
anchor_share = 0.25
batch_tokens = [32, 128]
sources = {{ he = 1.0 }}
[training]
tokens_per_batch = 64
"""


def test_plan_verb_prints_phases_steps_time_and_hashes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(root=root, run_dir=tmp_path / "run"), encoding="utf-8")
    printed = {}
    for order in ("forward", "reversed"):
        assert main(["plan", str(path), "--tokens-per-s", "8", "--order", order]) == 0
        printed[order] = capsys.readouterr().out.splitlines()
    lines = printed["forward"]
    assert lines[1].split() == ["formal", "512", "100.0%", "25.00%", lines[1].split()[4], "16", "10", "1:04"]
    assert any(line.split()[:4] == ["he", "384", "75.0%", line.split()[3]] for line in lines if line)
    stages = [line.split() for line in lines if line.startswith("formal")][1:]
    assert [stage[1:3] for stage in stages] == [["32", "8"], ["128", "2"]]
    hashes = {
        order: {name.split()[0]: name for name in some if name[:4] in ("plan", "rows", "anch")}
        for order, some in printed.items()
    }
    assert hashes["forward"]["plan"] != hashes["reversed"]["plan"]
    for name in ("rows", "anchor"):
        assert hashes["forward"][name] == hashes["reversed"][name]
    assert main(["plan", str(path)]) == 0
    assert "give --tokens-per-s" in capsys.readouterr().out
    assert main(["plan", str(path), "--tokens-per-s", "0"]) == 2
    assert "--tokens-per-s must be above 0 and finite, got 0.0" in capsys.readouterr().err


def test_plan_verb_takes_the_speed_from_the_run(root: Path, tmp_path: Path) -> None:
    from hebatron.verbs.plan import measured_speed

    assert measured_speed(tmp_path) is None
    toy_train(toy_config(root, tmp_path), stop_after=2)
    speed = measured_speed(tmp_path)
    assert speed is not None and speed > 0


def test_plan_verb_adds_up_for_named_orders(root: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(toy_config(root, tmp_path), order=("long", "base", "formal"))
    lines = describe(config, open_plan(config)[0], 100.0)
    assert "order long, base, formal" in lines
    total = next(line for line in lines if line.startswith("all")).split()
    assert total == ["all", "768", "12", "0:08"]


def test_plan_verb_shows_the_phases_of_a_named_curriculum(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = RUN.format(root=root, run_dir=tmp_path / "run")
    text = text[: text.index("[[phases]]")] + text[text.index("[training]") :].replace("= 64", "= 512")
    text += '[curriculum]\npreset = "hebatron"\nscale = 2e-7\nmax_seq_len = 128\n'
    text += "sources = { formal = { he = 1 }, colloquial = { he = 1 }, long = { he = 1 } }\n"
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    assert main(["plan", str(tmp_path / "run.toml")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    told = {line[0]: (line[1], line[5]) for line in lines[1:4]}  # tokens in whole rows, tokens of a row
    assert told == {"formal": ("15,088", "16"), "colloquial": ("672", "16"), "long": ("3,968", "128")}
    stages = [line[:2] for line in lines if line and line[0] in told][3:]
    assert stages == [["formal", "64"], ["formal", "512"], ["colloquial", "512"], ["long", "512"]]


EXAMPLES = Path(__file__).parents[2] / "examples"
PREPARE = "hebatron data prepare TEXT... --out"
NEEDED = [  # run file, what is there, what is missing of it and the command that makes it
    ("hebatron", [], "data.tokenizer", "hebatron train {examples}/three_phases.toml"),
    (
        "sft",
        ["runs/three_phases/final"],
        "data.corpora[0].path",
        f"{PREPARE} corpora/anchor --tokenizer runs/three_phases/final",
    ),
    ("sft", ["runs/three_phases/final", "corpora/anchor"], "sft.chats[0]", "hebatron quickstart"),
    ("three_phases", [], "data.tokenizer", f"{PREPARE} CORPUS --train-tokenizer corpora/tokenizer"),
    (
        "three_phases",
        ["corpora/tokenizer"],
        "data.corpora[0].path",
        f"{PREPARE} corpora/phase1 --tokenizer corpora/tokenizer",
    ),
]


@pytest.mark.parametrize(("name", "there", "place", "command"), NEEDED)
def test_a_missing_input_is_named_with_the_command_that_makes_it(
    name: str,
    there: list[str],
    place: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in there:
        Path(folder).mkdir(parents=True)
    for verb in ("plan", "train"):
        assert main([verb, str(EXAMPLES / f"{name}.toml")]) == 2
        told = capsys.readouterr().err
        assert f"{name}.toml: {place} must exist, got " in told and str(tmp_path) in told
        assert told.endswith(f"; make it with: {command.format(examples=EXAMPLES)}\n")
    assert not Path("runs/hebatron").exists()


def test_a_corpus_with_nothing_to_hold_out_is_named_with_what_to_change(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path)
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out_permille=1))
    with pytest.raises(ValueError) as caught:
        open_plan(few)
    told = str(caught.value)
    assert told.startswith("data.held_out_permille must leave documents on both sides of corpus 'he'")
    assert (
        "got 1 per thousand, 0 of its 60 documents" in told
        and "raise it" in told
        and str(root / "he") in told
    )

"""Run files: strict reading, errors that name the place, overrides, hash."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hebatron.training.runconfig import check_run_config, config_hash, load_run_config
from hebatron.training.sections import RunConfig
from hebatron.training.trees import differences, from_table, to_table

GOOD = """
run_dir = "runs/x"
order = "easy_to_hard"
[model]
preset = "tiny"
[model.fields]
chunk_size = 8
[data]
tokenizer = "tok"
corpora = [{ name = "he", path = "a" }, { name = "en", path = "b" }]
[anchor]
en = 1
[[phases]]
name = "base"
tokens = 1000
seq_len = 256
sources = { en = 1.0 }
[[phases]]
name = "formal"
tokens = 2000
seq_len = 128
anchor_share = 0.2
sources = { he = 3.0, en = 1.0 }
[optimizer]
learning_rate = 1
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_load_run_config_reads_every_section(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, GOOD))
    assert config.run_dir == Path("runs/x") and config.model.fields == {"chunk_size": 8}
    assert config.data.corpora[1].path == Path("b")
    assert config.phases[1].sources == {"he": 3.0, "en": 1.0} and config.phases[0].seq_len == 256
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)


def test_repetition_limits_are_a_number_or_a_table(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, GOOD))
    assert config.anchor_max_epochs is None and "anchor_max_epochs" not in to_table(config, hashed_only=True)
    text = GOOD.replace("seq_len = 256", "seq_len = 256\nmax_epochs = 2").replace(
        "[model]", "anchor_max_epochs = 4\n[model]"
    )
    config = load_run_config(write(tmp_path, text))
    assert (config.phases[0].max_epochs, config.anchor_max_epochs) == (2.0, 4.0)
    assert load_run_config(write(tmp_path, text), ["--phases.0.max-epochs", "3"]).phases[0].max_epochs == 3.0
    text = text.replace("max_epochs = 2", "max_epochs = { en = 2 }").replace(
        "epochs = 4", "epochs = { en = 4 }"
    )
    config = load_run_config(write(tmp_path, text))
    assert (config.phases[0].max_epochs, config.anchor_max_epochs) == ({"en": 2.0}, {"en": 4.0})
    assert from_table(RunConfig, json.loads(json.dumps(to_table(config)))) == config
    with pytest.raises(ValueError, match=r"phases\[0\].max_epochs.en must be a number, got 'often'"):
        load_run_config(write(tmp_path, text.replace("{ en = 2 }", '{ en = "often" }')))
    with pytest.raises(ValueError, match=r"phases\[0\].max_epochs must be a number, got 'often'"):
        load_run_config(write(tmp_path, text.replace("{ en = 2 }", '"often"')))


BAD = [
    ("order =", "ordr =", r"run.toml: ordr must be one of .*; did you mean 'order'\?"),
    ("learning_rate = 1", "learning_rat = 1", r"optimizer.learning_rat must be .*mean 'learning_rate'\?"),
    ("learning_rate = 1", "learning_rate = true", "optimizer.learning_rate must be a number, got True"),
    ("learning_rate = 1", "learning_rate = nan", "optimizer.learning_rate must be finite, got nan"),
    ("learning_rate = 1", "learning_rate = -1", "optimizer.learning_rate must be > 0, got -1.0"),
    ("seq_len = 128", "seq_len = 1.5", r"phases\[1\].seq_len must be an integer, got 1.5"),
    ("tokens = 1000", "", r"phases\[0\].tokens must be given, got nothing"),
    ("tokens = 1000", "tokens = 0", r"phases\[0\]: .*tokens must be at least seq_len = 256, got 0"),
    ("anchor_share = 0.2", "anchor_share = 2", r"phases\[1\]: .*anchor_share must be in \[0, 1\), got 2.0"),
    (
        "tokens = 2000\nseq_len = 128",
        "tokens = 9000\nseq_len = 8192",
        r"phases\[1\].seq_len must be .*4096, got 8192",
    ),
    ("he = 3.0", "heb = 3.0", r"phases\[1\].sources.heb must name .*he, en; did you mean 'he'\?"),
    ("he = 3.0", "he = -3.0", r"phases\[1\]: .*sources must have finite weights >= 0"),
    ("sources = { en = 1.0 }", "sources = {}", r"phases\[0\]: .*sources must have finite weights"),
    ("[anchor]\nen = 1", "", r"phases\[1\].anchor_share must be 0 without \[anchor\], got 0.2"),
    ('name = "formal"', 'name = "base"', r"phases must be at least one, with different names"),
    ('name = "en"', 'name = "he"', r"data.corpora\[1\].name must be unique, got 'he' again"),
    ('name = "en"', 'name = "e/n"', r"data.corpora\[1\].name must be without '/'"),
    ('order = "easy_to_hard"', 'order = "hard"', 'order must be "forward", "reversed"'),
    ('order = "easy_to_hard"', 'order = ["base"]', r"order must name each of .* once, got \['base'\]"),
    ('preset = "tiny"', 'preset = "tiny"\npath = "x"', r"exactly one of preset, path, pattern, got"),
    ('preset = "tiny"', 'path = "x"', r"model.fields must be empty with model.path, got \['chunk_size'\]"),
    ('preset = "tiny"', "preset = 3", "model.preset must be a string, got 3"),
    ('preset = "tiny"', 'preset = "tiny"\ncompute_dtype = "bf16"', "must be one of float32, bfloat16"),
    ("[model.fields]\nchunk_size = 8", "fields = 3", "model.fields must be a table, got 3"),
    ("[model]", "[model", "must be valid TOML"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=[new or f"no {old}" for old, new, _ in BAD])
def test_load_run_config_refuses_bad_input_naming_the_place(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new)
    with pytest.raises(ValueError, match=message):
        load_run_config(write(tmp_path, text))


def test_load_run_config_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must be a TOML file, got .*none\.toml"):
        load_run_config(tmp_path / "none.toml")


def test_overrides_reach_nested_fields_and_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    config = load_run_config(
        path, ["--training.seed", "7", "--phases.1.tokens", "500", "--phases.1.sources.he", "2"]
    )
    assert (
        config.training.seed == 7 and config.phases[1].tokens == 500 and config.phases[1].sources["he"] == 2.0
    )
    assert config.phases[0] == load_run_config(path).phases[0]
    with pytest.raises(ValueError, match=r"optimizer\.eps must be > 0, got -5"):
        load_run_config(path, ["--optimizer.eps", "-5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.sed 7", r"--training\.sed must name a field .*; did you mean 'training\.seed'\?"),
        ("--run-dir a --phases.1.tokns 5", r"--phases\.1\.tokns must .*did you mean 'phases\.1\.tokens'\?"),
        ("--training.seed seven", r"--training\.seed must be an integer, got 'seven'"),
        ("--training.log-every", r"--training\.log-every must be an integer, got ''"),
        ("--optimizer.eps=abc", r"--optimizer\.eps must be a number, got 'abc'"),
        ("--model.compute-dtype fp8", r"--model\.compute-dtype must be one of float32, bfloat16, got 'fp8'"),
        ("--phases.1.tokens many", r"--phases\.1\.tokens must be an integer, got 'many'"),
        ("--phases.1.sources.he much", r"--phases\.1\.sources\.he must be a number, got 'much'"),
        (
            "--phases.0.batch-tokens x y",
            r"batch-tokens must be an integer or an array, each an integer, got 'x y'",
        ),
        ("--lora.rank 8", r"--lora\.rank must be of a section that the run file has, got no \[lora\]"),
        ("junk", "junk must name a field of the run file"),
        (f"--training.seed {2**63}", r"training\.seed must be in \[0, 2\*\*63\), got 9223372036854775808"),
    ],
)
def test_overrides_that_are_wrong_are_one_line_naming_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_run_config(write(tmp_path, GOOD), override.split())
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "") and "\n" not in str(caught.value)


def test_config_table_round_trips(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, GOOD))
    assert from_table(RunConfig, json.loads(json.dumps(to_table(config)))) == config
    reordered = replace(config, order=("formal", "base"))
    assert from_table(RunConfig, json.loads(json.dumps(to_table(reordered)))) == reordered


def test_config_hash_ignores_what_cannot_change_the_weights(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, GOOD))
    cadence = replace(config.training, checkpoint_every=7, eval_every=3, sample_prompts=("a",))
    assert config_hash(replace(config, run_dir=Path("y"), training=cadence)) == config_hash(config)
    assert config_hash(replace(config, training=replace(config.training, seed=1))) != config_hash(config)
    assert config_hash(replace(config, phases=config.phases[::-1])) != config_hash(config)


def test_differences_name_the_place_and_both_values(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, GOOD))
    other = replace(config, training=replace(config.training, seed=1), phases=config.phases[:1])
    lines = differences(to_table(config), to_table(other))
    assert "training.seed: 0 -> 1" in lines and any(line.startswith("phases: ") for line in lines)
    check_run_config(config)

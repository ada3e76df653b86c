"""The command line: exit codes, one-line errors, light start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hebatron_kernels
from hebatron import cli
from hebatron.verbs import info

HEBREW = "בראשית ברא אלהים את השמים ואת הארץ"


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The single line a failing command prints, after checking that it is single and exits with 2."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hebatron: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "verses.jsonl"
    records = [{"text": f"{HEBREW} {i}", "source": "verses", "lang": "he"} for i in range(40)]
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


def test_info_prints_exact_sizes_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "nano_30b_a3b"]) == 0
    assert "31,577,937,344" in capsys.readouterr().out


def test_info_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hebatron.presets import tiny

    (tmp_path / "config.json").write_text(json.dumps(tiny().to_hub()))
    assert cli.main(["info", str(tmp_path), "--context", "128"]) == 0
    assert "128 tokens" in capsys.readouterr().out


def test_info_names_the_presets_for_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nano_30b_a3b" in failure(capsys, "info", "nano_99b")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="must be an existing path"):
        cli.main(["info", "nano_99b", "--debug"])


def test_unexpected_runtime_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: cli.Arguments) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(info, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["info", "tiny"])


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hebatron.cli", "info", "tiny"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_backend_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(arguments: cli.Arguments) -> int:
        raise hebatron_kernels.BackendError("rms_norm[triton]: not written\nfor this operator")

    monkeypatch.setattr(info, "run", refused)
    assert failure(capsys, "info", "tiny") == "hebatron: rms_norm[triton]: not written for this operator\n"


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["info"], ["info", "tiny", "--unknown", "1"], ["data"], ["data", "prepare", "x.txt"]],
)
def test_wrong_usage_exits_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: hebatron" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "verb"), [([], "train"), (["data"], "prepare")])
def test_without_a_verb_all_are_told(argv: list[str], verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and f"\n    {verb} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("trian run.toml", "train"),
        ("data scor corpora/he", "score"),
        ("export hf run out --dtype bfloat", "bfloat16"),
        ("quickstart --sed 3", "--seed"),
        ("info nano_30b_a3", "nano_30b_a3b"),
        ("bench nrm", "norm"),
    ],
)
def test_a_word_that_is_not_known_is_answered_with_the_one_meant(
    line: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert cli.main(line.split()) == 2
    except SystemExit as caught:  # wrong usage
        assert caught.code == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {meant!r}?\n")


def test_help_tells_what_every_verb_takes_and_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, default in (
        ("generate", "128"),
        ("chat", "0.7"),
        ("export hf", "float32"),
        ("data split", "3"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*verb.split(), "--help"])
        told = capsys.readouterr().out
        assert f"(default: {default})" in told and "None" not in told and "False" not in told, verb


def test_prepare_trains_a_tokenizer_and_counts_by_source(
    corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "prepare", str(corpus_file), "--out", str(tmp_path / "corpus")]
    assert cli.main([*argv, "--train-tokenizer", str(tmp_path / "tokenizer"), "--vocab-size", "300"]) == 0
    out = capsys.readouterr().out
    assert "40 documents" in out and "verses" in out and "dropped: none" in out
    assert cli.main([*argv, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "already there" in capsys.readouterr().out


def test_prepare_does_not_write_over_a_folder(
    corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "prepare", str(corpus_file), "--out", str(tmp_path / "corpus"), "--vocab-size", "300"]
    line = failure(capsys, *argv, "--train-tokenizer", str(tmp_path))
    assert "--train-tokenizer must be a new or empty folder" in line
    assert not (tmp_path / "corpus").exists()


def test_prepare_with_a_new_tokenizer_leaves_all_or_nothing_and_can_be_repeated(
    corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, tokenizer = tmp_path / "corpus", tmp_path / "tokenizer"
    argv = ["data", "prepare", str(corpus_file), "--out", str(corpus), "--vocab-size", "300"]
    argv += ["--train-tokenizer", str(tokenizer)]
    corpus.mkdir()
    (corpus / "thesis.txt").write_text("x")
    with monkeypatch.context() as patch:  # an occupied --out is seen before the work
        patch.setattr("hebatron.tokenizer.train_bpe", lambda *_: pytest.fail("trained"))
        assert "out must be a new folder or an earlier corpus" in failure(capsys, *argv)
    (corpus / "thesis.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("hebatron.data.prepare.prepare", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", corpus_file.name]
    assert cli.main(argv) == 0
    made = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    assert cli.main(argv) == 0  # the same again
    assert "already there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tokenizer.iterdir()} == made
    argv[argv.index("300")] = "290"
    assert "or hold the tokenizer these inputs give, got another" in failure(capsys, *argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "tokenizer", corpus_file.name]


def test_prepare_prints_a_source_without_obeying_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"text": HEBREW, "source": "a/b [x]\n\u202e"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record), encoding="utf-8")
    argv = ["data", "prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "corpus")]
    assert cli.main([*argv, "--vocab-size", "270", "--train-tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "  a/b [x]\ufffd\ufffd\n" in capsys.readouterr().out


RUN_FILE = """
run_dir = "run"
[model]
preset = "tiny"
[data]
tokenizer = "tokenizer"
corpora = [{ name = "text", path = "corpus" }]
held_out_permille = 200
[[phases]]
name = "only"
sources = { text = 1.0 }
tokens = 512
seq_len = 32
[training]
tokens_per_batch = 64
tokens_per_microbatch = 64
"""


def test_a_run_can_be_moved_and_used_without_its_inputs(
    corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hebatron.training.runconfig import load_run_config
    from hebatron.training.train import train

    monkeypatch.chdir(tmp_path)
    argv = ["data", "prepare", corpus_file.name, "--out", "corpus", "--vocab-size", "300"]
    assert cli.main([*argv, "--train-tokenizer", "tokenizer"]) == 0
    Path("run.toml").write_text(RUN_FILE)
    train(load_run_config("run.toml"), stop_after=2)
    train(load_run_config("run.toml"), stop_after=3)
    for left in ("tokenizer", "run/config.json"):
        Path(left).rename(tmp_path / f"gone-{Path(left).name}")
    Path("elsewhere").mkdir()
    Path("run").rename("elsewhere/moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    generate = ["generate", "moved", HEBREW, "--max-new-tokens", "2"]
    monkeypatch.setattr(
        "hebatron.training.optim.build_optimizer", lambda *_: pytest.fail("an optimizer to generate")
    )
    assert cli.main(generate) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(HEBREW) and captured.err == ""
    assert cli.main(["eval", "moved", "../corpus", "--max-tokens", "50"]) == 0
    assert cli.main(["export", "hf", "moved", "out"]) == 0
    assert cli.main(["generate", "out", HEBREW, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.endswith(captured.out)  # the export is the checkpoint
    driving = "\x1b[2J a\tb\n"  # a terminal is not driven by what a model writes; a file gets it as it is
    monkeypatch.setattr("hebatron.tokenizer.Tokenizer.decode", lambda *_: driving.rstrip("\n"))
    assert cli.main(generate) == 0
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(generate) == 0
    assert capsys.readouterr().out == driving + driving.replace("\x1b", "\ufffd")
    (tmp_path / "elsewhere/moved/checkpoints/step-000003/state.json").write_text("{}")
    assert cli.main(generate) == 0
    assert "skipped damaged step-000003" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plot", "r", "--over", "tokens"], "plot: two RUN or more must be given with --over, got r alone"),
        (
            ["data", "prepare", "x.txt", "--out", "c", "--tokenizer", "t", "--vocab-size", "512"],
            "data prepare: --train-tokenizer must be given with --vocab-size, got --tokenizer t",
        ),
        (
            ["data", "inspect", "c", "--samples", "3"],
            "data inspect: --tokenizer must be given with --samples, got none",
        ),
    ],
)
def test_options_that_nothing_reads_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(capsys, *argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "m", "corpus", "--out"],
        ["plot", "r", "--out"],
        ["report", "r", "--out"],
        ["data", "score", "c", "--tokenizer", "t", "--plot"],
    ],
)
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, part in [
        (tmp_path, f"must be a file, got the folder {tmp_path}"),
        (tmp_path / "none" / "x", "must be in a folder that exists, got"),
        (Path("/proc/x"), "must be in a folder that can be written to, got /proc/x: "),
    ]:
        told = failure(capsys, *argv, str(place))
        assert part in told and argv[-1] in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", ["-1", str(2**63), "x"])
def test_a_seed_out_of_range_is_wrong_usage(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["quickstart", "--seed", seed], ["generate", "m", "p", "--seed", seed]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2 and "--seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["data", "prepare", "nowhere.txt", "--out", "c", "--tokenizer", "nowhere"], "tokenizer.json"),
        (["train", "nowhere.toml"], "nowhere.toml"),
        (["eval", "nowhere", "corpus"], "nowhere"),
        (["generate", "nowhere", HEBREW], "nowhere"),
        (["export", "hf", "nowhere", "out"], "nowhere"),
        (["plot", "nowhere"], "nowhere"),
    ],
)
def test_missing_paths_are_named(
    argv: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in failure(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_train_hands_the_overrides_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hebatron.training.train

    seen: list[Any] = []
    monkeypatch.setattr(hebatron.training.train, "train", lambda config, force: seen.append((config, force)))
    (tmp_path / "run.toml").write_text(
        """
        [model]
        preset = "tiny"
        [data]
        corpora = [{ name = "text", path = "corpus" }]
        [[phases]]
        name = "only"
        sources = { text = 1.0 }
        tokens = 4096
        seq_len = 128
        """
    )
    for name in ("tokenizer", "corpus"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(tmp_path / "run.toml"), "--training.seed", "7"]) == 0
    assert cli.main(["train", str(tmp_path / "run.toml"), "--force"]) == 0
    config, force = seen[0]
    assert config.training.seed == 7 and config.phases[0].tokens == 4096
    assert (force, seen[1][1]) == (False, True)


def test_train_names_a_wrong_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("[model]\npresets = 'tiny'\n")
    assert "did you mean 'preset'" in failure(capsys, "train", str(tmp_path / "run.toml"))


def test_parsing_imports_nothing_heavy() -> None:
    code = "import sys; from hebatron.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"

"""The command line: exit codes, one-line errors, light start; and doctor's table and self-check."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hebatron_kernels
from hebatron import cli, doctor

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

    monkeypatch.setattr(cli, "run_info", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["info", "tiny"])


def test_backend_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(arguments: cli.Arguments) -> int:
        raise hebatron_kernels.BackendError("rms_norm[triton]: not written\nfor this operator")

    monkeypatch.setattr(cli, "run_info", refused)
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


def test_prepare_trains_a_tokenizer_and_counts_by_source(
    corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "prepare", str(corpus_file), "--out", str(tmp_path / "corpus"), "--vocab-size", "300"]
    assert cli.main([*argv, "--train-tokenizer", str(tmp_path / "tokenizer")]) == 0
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
    import hebatron.train

    seen: list[Any] = []
    monkeypatch.setattr(hebatron.train, "train", seen.append)
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
    assert cli.main(["train", str(tmp_path / "run.toml"), "--training.seed", "7"]) == 0
    assert seen[0].training.seed == 7 and seen[0].phases[0].tokens == 4096


def test_train_names_a_wrong_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("[model]\npresets = 'tiny'\n")
    assert "did you mean 'preset'" in failure(capsys, "train", str(tmp_path / "run.toml"))


def test_parsing_imports_nothing_heavy() -> None:
    code = "import sys; from hebatron.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_doctor_checks_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    diagnosis = doctor.examine()
    assert [row.name for row in diagnosis.operators] == list(hebatron_kernels.OPERATORS)
    assert not diagnosis.problems
    assert all(
        row.backend in hebatron_kernels.explain(row.name, **doctor.small_cases()[row.name]())
        for row in diagnosis.operators
    )
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "_cpu" in out and "rms_norm" in out and "agree with their fp64 reference" in out


def test_doctor_fails_on_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = hebatron_kernels.rms_norm

    def wrong(backend: str | None = None, **kwargs: Any) -> Any:
        y_TD: Any = right(**kwargs, backend=backend)
        return y_TD * (1.0 if backend == "reference" else 1.001)

    monkeypatch.setattr(hebatron_kernels, "rms_norm", wrong)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "problem: rms_norm[" in out


def test_doctor_sees_nan_and_wrong_shapes() -> None:
    one = torch.ones(2)
    assert not doctor.OperatorRow("x", "torch", (), doctor._largest_difference([one * torch.nan], [one])).ok
    assert not doctor.OperatorRow("x", "torch", (), doctor._largest_difference([torch.ones(3)], [one])).ok
    assert doctor.OperatorRow("x", "torch", (), doctor._largest_difference([one], [one])).ok


def test_doctor_counts_openmp_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "7f00-7f01 r-xp 00000000 00:00 1    {}\n"
    paths = [
        "/usr/lib/libgomp.so.1",
        "/usr/lib/libgomp.so.1",
        "/torch/lib/libgomp-a1.so.1",
        "/usr/lib/libc.so.6",
    ]
    (tmp_path / "maps").write_text(
        "".join(line.format(path) for path in paths) + "7f02-7f03 rw-p 0 00:00 0\n"
    )
    monkeypatch.setattr(doctor, "MAPS", tmp_path / "maps")
    assert doctor.openmp_copies() == ["/torch/lib/libgomp-a1.so.1", "/usr/lib/libgomp.so.1"]
    assert any("OpenMP runtimes are mapped" in problem for problem in doctor.examine().problems)
    monkeypatch.setattr(doctor, "MAPS", tmp_path / "absent")
    assert doctor.openmp_copies() is None

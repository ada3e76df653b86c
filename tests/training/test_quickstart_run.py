"""A miniature of the whole quickstart, stopped and resumed on the way, and its report."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_records import evaluation, step, write

from hebatron import cli
from hebatron.curriculum.build import Phase
from hebatron.doctor import Diagnosis, OperatorRow
from hebatron.quickstart import chats, exercises, findings, report, run
from hebatron.quickstart.corpus import Document
from hebatron.quickstart.settings import BASE, Settings, published, resume_config, run_config
from hebatron.training.metrics import read_metrics

MINIATURE = Settings(
    phases=(
        Phase(BASE, {"text/english": 1.0, "text/python": 1.0}, tokens=512, seq_len=64),
        Phase("easy", {"text/exercises": 1.0}, tokens=512, seq_len=64, anchor_share=0.25),
        Phase("hard", {"text/narrative": 1.0}, tokens=512, seq_len=128, anchor_share=0.25),
    ),
    vocab_size=300,
    tokens_per_batch=128,
    warmup_steps=2,
    held_out_tokens=100,
    prompts=("ויאמר אליו", "כמה ספרים"),
    sample_tokens=4,
    resume_rows=2,
    resume_stop=3,
    chat_prompts=("Open 3",),
    chat_seq_len=128,
    prefill=(1, 32),
    speed_repeats=1,
)
CHATS = findings.ChatCheck(
    steps=9,
    used=120,
    held_out=20,
    masked_shares={"all": 0.66, "task/<b>": 0.66},
    losses_before={"all": 7.0, "task/<b>": 7.0},
    losses_after={"all": 4.25, "task/<b>": 4.25},
    bpb_before={"narrative": 1.5},
    bpb_after={"narrative": 1.625},
    samples=[findings.Sample("<i>7 + 5</i>", "ויאמר", "12")],
)
TOTAL_STEPS = 3 * 512 // 128


def fixture_text() -> list[Document]:
    """Forty short documents of four sources."""
    hebrew = [Document(text, "exercises", "he") for text in exercises.documents(10)]
    verses = [
        Document(f"ויאמר אליו {i} דבר אל בני ישראל ואמרת אליהם\n" * 3, "narrative", "he") for i in range(10)
    ]
    english = [
        Document(f"And he said {i} unto him: speak unto them.\n" * 4, "english", "en") for i in range(10)
    ]
    code = [Document(f"def f{i}(x):\n    return x + {i}\n" * 4, "python", "code") for i in range(10)]
    return hebrew + verses + english + code


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A quickstart whose training stopped after five steps and was resumed: its folder and output."""
    pytest.importorskip("transformers", reason="the quickstart reopens its export with transformers")
    pytest.importorskip("matplotlib", reason="the quickstart draws its metrics")
    out = tmp_path_factory.mktemp("quickstart") / "run"
    chat_records = chats.gather(
        [(f"Open {i}", f"פתח {i}") for i in range(20)], ["And he said unto them: " * 3] * 9
    )
    options: dict[str, Any] = {
        "settings": MINIATURE,
        "documents": fixture_text(),
        "chat_records": chat_records[:60],
    }
    real_train = run.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train", lambda config, reporter: real_train(config, 5, reporter=reporter))
        assert run.quickstart(out, **options) == 130
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **_: lines.append(" ".join(map(str, args))))
        code = run.quickstart(out, resume=True, **options)
    assert code == 0, "\n".join(lines)
    return out, "\n".join(lines)


def test_quickstart_shows_every_stage_in_order(finished: tuple[Path, str]) -> None:
    _, text = finished
    marks = [
        "agree with their fp64 reference",
        "bytes per token",
        "active per token",
        f"training: {TOTAL_STEPS} steps",
        "bit-exact: yes",
        "after the base:",
        "bits per byte of held-out text",
        "of the tokens bear no loss",
        "largest logit difference",
        "fewer active parameters",
        "Report: ",
    ]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert "FAILED" not in text


def test_quickstart_resumes_where_training_stopped(finished: tuple[Path, str]) -> None:
    out, text = finished
    assert "resuming from step-000005" in text
    steps = [record["step"] for record in read_metrics(out / "run") if record["kind"] == "step"]
    assert steps == list(range(1, TOTAL_STEPS + 1))


def test_quickstart_writes_its_folder_and_cleans_its_check(finished: tuple[Path, str]) -> None:
    out, _ = finished
    made = {path.name for path in out.iterdir()}
    assert made == {
        *("quickstart.json", "text", "tokenizer", "corpus", "held_out", "run", "sft", "hf", "report.html"),
    }


def test_export_speaks_through_the_command_line(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    texts = []  # of one line or more: what so small a model writes changes with the last bit of a kernel
    for model in (out / "hf", out / "sft"):
        assert cli.main(["generate", str(model), "ויאמר", "--max-new-tokens", "3"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("ויאמר")
    assert cli.main(["eval", str(out / "hf"), str(out / "held_out"), "--max-tokens", "50"]) == 0
    assert "narrative" in capsys.readouterr().out


def test_export_hf_takes_a_run_at_any_step(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    halfway = tmp_path / "run"  # a run that has no final/ yet
    shutil.copytree(out / "run", halfway, ignore=shutil.ignore_patterns("final"))
    for name, folder in (("halfway", halfway), ("whole", out / "run")):
        assert cli.main(["export", "hf", str(folder), str(tmp_path / name)]) == 0
    halves, whole = (tmp_path / name / "model.safetensors" for name in ("halfway", "whole"))
    assert halves.read_bytes() == whole.read_bytes()


def test_report_on_disk_has_the_samples(finished: tuple[Path, str]) -> None:
    out, _ = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Absent" not in page and "plan; the corpora still give this one" in page
    for prompt in MINIATURE.prompts:
        assert page.count(f'<p dir="auto"><b>{prompt}</b>') >= 2


# ---------------------------------------------------------------- the folder


def test_folder_is_never_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.open_folder(None, 0, False, MINIATURE) == Path("runs/quickstart")
    assert run.open_folder(None, 0, False, MINIATURE) == Path("runs/quickstart-2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="--out must be a new or empty folder, got mine"):
        run.open_folder(Path("mine"), 0, False, MINIATURE)
    with pytest.raises(ValueError, match="--out must hold an earlier quickstart to resume, got mine"):
        run.open_folder(Path("mine"), 0, True, MINIATURE)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_resume_needs_the_same_settings(tmp_path: Path) -> None:
    out = run.open_folder(tmp_path / "run", 0, False, MINIATURE)
    assert run.open_folder(out, 0, True, MINIATURE) == out
    for seed, settings in ((1, MINIATURE), (0, replace(MINIATURE, vocab_size=301))):
        with pytest.raises(ValueError, match=r"must be those of .*quickstart\.json to resume"):
            run.open_folder(out, seed, True, settings)


def test_missing_library_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LIBRARIES", ("no-such-library",))
    with pytest.raises(
        ValueError, match="package no-such-library must be installed, got none; run: pip install"
    ):
        run.quickstart(tmp_path / "run", settings=MINIATURE)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the report


@pytest.fixture
def make_findings(tmp_path: Path) -> Callable[..., findings.Findings]:
    run_dir = write(tmp_path / "run", [step(1, BASE), evaluation(1, BASE, narrative=2.5)])

    def make(**changes: Any) -> findings.Findings:
        values: dict[str, Any] = {
            "run_dir": run_dir,
            "diagnosis": Diagnosis((("machine", "m"), ("python", "3"), ("torch", "t")), (), ()),
            "command": "hebatron quickstart --out <out>",
            "seed": 0,
            "stages": [("training", 60.0), ("export", 30.0)],
            "vocab_size": 300,
            "tokenizer": [findings.TokenizerRow("Hebrew", 400, 100)],
            "model_card": "layers 7 <MEM*EME>",
            "resume": findings.ResumeCheck(8, 3, "aa", "aa"),
            "chats": CHATS,
            "export": findings.ExportCheck(Path("hf"), "5.0", 1e-5, True),
            "speed": findings.SpeedCheck(8, 512, 5, 600, 600, 200, 600, 3000.0, 2000.0),
        }
        return findings.Findings(**values | changes)

    return make


def test_report_is_the_runs_page_and_what_the_stages_found(
    make_findings: Callable[..., findings.Findings],
) -> None:
    page = report.render(make_findings())
    sections = re.findall(r"<h2>(.*?)</h2>", page)
    assert sections[0] == "Alarms" and tuple(sections[-len(report.SECTIONS) :]) == report.SECTIONS
    assert "2.500" in page and "1.50&times;" in page and "3.00&times; fewer active" in page
    assert "1.5 min" in page and "4.00&times; fewer" in page
    assert "4.250" in page and "+0.125" in page and "&lt;i&gt;7 + 5" in page and "on 100 chats" in page
    assert "://" not in page and "&lt;MEM*EME&gt;" in page and "--out &lt;out&gt;" in page


def test_report_says_no_where_resume_differs(make_findings: Callable[..., findings.Findings]) -> None:
    found = make_findings(resume=findings.ResumeCheck(8, 3, "aa", "bb"))
    assert '<span class="bad">no</span>' in report.render(found)
    assert run.problems(found) == [
        "stop and resume must be bit-exact, got other weights, optimizer state or losses"
    ]


@pytest.mark.parametrize("difference", [0.1, float("nan")])
def test_failed_checks_are_problems(
    make_findings: Callable[..., findings.Findings], difference: float
) -> None:
    broken = Diagnosis((), (OperatorRow("rms_norm", "torch", (), 0.1),), ("rms_norm differs",))
    export = findings.ExportCheck(Path("hf"), "5.0", difference, True)
    found = run.problems(make_findings(diagnosis=broken, export=export))
    assert found[0] == "rms_norm differs" and "logits must be within" in found[1]
    other = make_findings(export=findings.ExportCheck(Path("hf"), "5.0", 1e-6, False))
    assert run.problems(other) == ["export: transformers must write the same greedy text, got another"]
    assert run.problems(make_findings()) == []


def test_published_settings_can_be_planned(tmp_path: Path) -> None:
    sources = ("exercises", "interface", "narrative", "poetry", "books", "mishnah", "english", "python")
    texts = [
        Document(f"{source} {i} ויאמר אליו לאמר " * 30, source, "he") for source in sources for i in range(6)
    ]
    run.prepare_text(replace(Settings(), vocab_size=300), tmp_path, texts)
    for isa, steps in (("avx512_bf16", 907), ("avx512", 907), ("avx2", 362), ("portable", 91), ("not", 91)):
        rows, total_steps = run.plan_rows(run_config(published(isa), tmp_path, 0))
        assert rows[0].name == BASE and len(rows) == 4
        assert total_steps == sum(row.steps for row in rows) and abs(total_steps - steps) <= 4
        assert all(abs(row.anchor_share - 0.15) < 0.02 for row in rows[1:])
    check_rows, check_steps = run.plan_rows(resume_config(Settings(), tmp_path, 0, "through"))
    assert len(check_rows) == 4 and check_rows[0].steps < Settings().resume_stop < check_steps


def test_settings_survive_their_stamp(tmp_path: Path) -> None:
    out = run.open_folder(tmp_path / "run", 3, False, Settings())
    stamp = json.loads((out / "quickstart.json").read_text(encoding="utf-8"))
    assert stamp["seed"] == 3 and len(stamp["settings"]["phases"]) == 4

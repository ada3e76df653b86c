"""The pages of one run and of several: complete, self-contained, escaped, and honest about what is absent."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_records import evaluation, step, write
from toy import toy_config, toy_train, write_corpora

from hebatron import files
from hebatron.cli import main
from hebatron.report.charts import load_image
from hebatron.report.page import write_report
from hebatron.training.metrics import METRICS

SECTIONS = [
    "Alarms",
    "Training",
    "Held-out text by source",
    "Learnt and forgotten",
    "Experts",
    "Samples",
    "Plan",
    "Data",
    "Configuration",
]
HOSTILE = "</style><script>alert(1)</script><img src=x onerror='alert(2)'>&\u202eא\ud800"


class Page(HTMLParser):
    """What a browser would load, and the tags it would make."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.sections = re.findall(r"<h2>(.*?)</h2>", self.source)
        self.svgs = [base64.b64decode(load.partition(",")[2]).decode() for load in self.loads]
        self.svgs = [svg for svg in self.svgs if svg.startswith("<svg")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [
            v or "" for k, v in attrs if k in ("src", "href", "srcset") and not (v or "").startswith("#")
        ]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def check_self_contained(page: Page) -> None:
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    assert not {"script", "link", "iframe", "object", "base"} & page.tags and not page.handlers
    assert "url(" not in page.source and "@import" not in page.source
    for svg in page.svgs:
        assert "<script" not in svg
        links = re.findall(r'(?:href|src)="(.*?)"', svg)
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run of 12 steps with its corpora beside it."""
    root = tmp_path_factory.mktemp("report")
    write_corpora(root)
    toy_train(toy_config(root, root / "run", sample_prompts=("שלום",), sample_tokens=4))
    return root


def test_report_of_a_finished_run_is_complete(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained / "run")]) == 0
    path = trained / "run" / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    page = Page(path)
    check_self_contained(page)
    assert page.sections == SECTIONS and "Absent" not in page.source and "finished" in page.source
    assert "768</b>" in page.source and "tokens trained on in 12 steps" in page.source
    assert "plan; the corpora still give this one" in page.source
    assert '<p dir="auto"><b>שלום</b>' in page.source
    assert "60</td>" in page.source and "40</td>" in page.source  # documents read, of the ledger
    assert "training.seed = 0" in page.source
    charts = " ".join(page.svgs)
    for title in ("training loss", "held-out text: Hebrew", "idle experts", "expert layer 0"):
        assert title in charts


def test_report_of_an_unfinished_run_counts_what_is_left(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "half"
    toy_train(toy_config(trained, run_dir), stop_after=6)
    with (run_dir / METRICS).open("ab") as file:
        file.write(b'{"kind": "step", "st')
    page = Page(write_report(run_dir, tmp_path / "x.html"))
    assert "in 6 of 12 steps" in page.source and "unfinished" in page.source
    assert "as far as the run has come" in page.source and "wrote no sample" in page.source


def test_report_of_a_moved_run_says_what_is_absent(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained / "run", run_dir)
    text = (run_dir / "config.json").read_text().replace(str(trained), str(tmp_path / "gone"))
    (run_dir / "config.json").write_text(text)
    page = Page(write_report(run_dir))
    assert page.sections == SECTIONS
    assert "corpus he: Corpus.open: folder must contain index.json" in page.source
    assert "no corpus of the configuration is where it was" in page.source
    assert "Absent: see above." in page.source and "language not known" in page.source
    assert "plan, as the newest checkpoint states it" in page.source


def test_report_says_where_the_plan_is_another(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained / "run", run_dir)
    config = json.loads((run_dir / "config.json").read_text())
    config["training"]["seed"] = 5
    (run_dir / "config.json").write_text(json.dumps(config))
    assert "NOT what the corpora give now" in Page(write_report(run_dir)).source


@pytest.mark.parametrize("records", [[], [step(1)], [step(1, skipped=True)], [step(1), evaluation(1)]])
def test_report_of_little_names_what_is_absent(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    page = Page(write_report(write(tmp_path, records)))
    assert page.sections == SECTIONS
    kinds = {record["kind"] for record in records if not record.get("skipped")}
    assert ("no training step with a loss" in page.source) == ("step" not in kinds)
    assert ("no evaluation of held-out text" in page.source) == ("eval" not in kinds)
    assert "no config.json in the run folder" in page.source and "wrote no sample" in page.source


def test_report_without_experts_says_so(tmp_path: Path) -> None:
    records = [{**step(1), "router": []}, {**evaluation(1), "router_load": []}]
    page = Page(write_report(write(tmp_path, records)))
    assert "no expert layer in the run" in page.source


def test_report_needs_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "run_dir must hold metrics.jsonl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report_escapes_whatever_comes_from_data(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "<b>run"
    shutil.copytree(trained / "run", run_dir)
    config = json.loads((run_dir / "config.json").read_text())
    config["phases"][0]["name"] = HOSTILE[:-1]  # no run file, which is UTF-8, has a lone surrogate
    (run_dir / "config.json").write_text(json.dumps(config))
    records = [
        step(1, HOSTILE),
        {**evaluation(1, HOSTILE, **{HOSTILE: 1.0, "en": 2.0}), "alarms": [HOSTILE]},
        {"kind": "sample", "step": 1, "prompt": HOSTILE, "text": HOSTILE},
        {"kind": "chats", "step": 1, "read": 1, "dropped": {HOSTILE: 1}, "rows": {"groups": {}}},
    ]
    (run_dir / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_report(run_dir))
    check_self_contained(page)
    assert "<b>run" not in page.source and "b" in page.tags
    assert page.source.count("&lt;script&gt;") >= 6
    assert any("&lt;script&gt;" in svg for svg in page.svgs)
    assert "\u202e" not in page.source  # a direction override ends with its line


def test_report_of_chats_shows_masks_and_loss(tmp_path: Path) -> None:
    group = {"samples": 5, "tokens": 1000, "learnt": 250, "masked_share": 0.75}
    chats = {
        "kind": "chats",
        "step": 0,
        "read": 9,
        "used": 5,
        "dropped": {"no tokens": 4},
        "rows": {"groups": {"task/qa": group}},
    }
    loss = [{**evaluation(i), "bpb": {}, "chat_loss": {"all": 3.0 - i, "task/qa": 2.0}} for i in (1, 2)]
    page = Page(write_report(write(tmp_path, [chats, step(1), loss[0], step(2), loss[1]])))
    assert "Chats" in page.sections and "9 read, 5 used; dropped: 4 no tokens." in page.source
    assert "75.0%" in page.source and "-1.000" in page.source and "a run over chats" in page.source
    assert any("held-out chats" in svg for svg in page.svgs)


def test_report_shows_the_alarms_of_steps_with_their_documents(tmp_path: Path) -> None:
    alarm = {
        "kind": "alarm",
        "step": 1,
        "phase": "base",
        "what": "loss 9.0 is 7.1 sigma over the 5.0",
        "rows": [4, 7],
        "documents": {"he": ["law/17", HOSTILE[:-1]]},
    }
    page = Page(write_report(write(tmp_path, [step(1), alarm, step(2), evaluation(2)])))
    check_self_contained(page)
    assert "7.1 sigma" in page.source and "4 to 7" in page.source and "law/17" in page.source
    assert "1 of a step" in page.source and "None in" not in page.source


def test_report_shows_the_anchor_kl_where_there_is_one(tmp_path: Path) -> None:
    records = [{**step(i), "anchor_kl": None if i == 2 else 0.1 * i} for i in (1, 2, 3)]
    assert any("frozen base" in svg for svg in Page(write_report(write(tmp_path / "a", records))).svgs)
    assert not any("frozen base" in svg for svg in Page(write_report(write(tmp_path / "b", [step(1)]))).svgs)


def test_forgetting_table_has_the_best_in_bold_and_the_change(tmp_path: Path) -> None:
    records = [
        step(1),
        evaluation(1, he=3.0, en=1.0),
        step(2, "b"),
        evaluation(2, "b", he=2.0, en=1.5, late=4.0),
    ]
    table = Page(write_report(write(tmp_path, records))).source
    assert "<td class=n>3.000</td><td class=n><b>2.000</b></td>" in table
    assert '<span class="good">-1.000</span>' in table and '<span class="bad">+0.500</span>' in table
    assert "<td class=n>&ndash;</td><td class=n><b>4.000</b></td><td class=n>&ndash;</td>" in table


def test_report_of_a_large_run_stays_small(tmp_path: Path) -> None:
    """1,000 steps, 50 evaluations, 8 layers of 128 experts, 30 sources: under 3 MB."""
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for i in range(1, 1001):
        load = {"mean": 1.0, "max_over_ideal": 2.0, "dead": 0.1, "load_entropy": float(rng.random())}
        records.append({**step(i, f"phase {i // 300}"), "loss": float(rng.random()), "router": [load] * 8})
        if i % 20 == 0:
            bpb = {f"source {k}": float(rng.random()) for k in range(30)}
            loads = rng.integers(0, 50, (8, 128)).tolist()
            records.append({**evaluation(i, f"phase {i // 300}", **bpb), "router_load": loads})
    assert write_report(write(tmp_path, records)).stat().st_size < 3e6


def test_expert_map_is_the_load_over_an_even_share() -> None:
    image = load_image([[0, 1, 1, 2], [4, 4, 4, 4], [0, 0, 0, 9]])
    assert image.mask.tolist() == [[True, False, False, False], [False] * 4, [True, True, True, False]]
    assert image.compressed().tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    assert load_image([[1] + [64] * 127]).min() == -3.0  # cut where the colours end


def test_comparison_page_has_runs_table_curves_and_differences(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "run-seed1"
    shutil.copytree(trained / "run", other)
    config = json.loads((other / "config.json").read_text())
    config["training"]["seed"] = 1
    (other / "config.json").write_text(json.dumps(config))
    bare = write(tmp_path / HOSTILE[:8].replace("/", "<"), [step(1)])
    folders, out = [trained / "run", other, bare], tmp_path / "c.html"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    page = Page(out)
    check_self_contained(page)
    assert page.sections == ["Runs", "Final bits per byte", "Curves", "Configuration"]
    assert "<bdi>run</bdi> (2 seeds)" in page.source and "±" in page.source
    assert "<pre>training.seed: 0 -&gt; 1</pre>" in page.source
    assert (
        "no config.json in the run folder" in page.source and "one of the two configurations" in page.source
    )


def test_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        files.replace_text(path, "new")
    assert path.read_text() == "old"

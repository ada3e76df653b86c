"""`data inspect` says what the corpus holds, and shows its samples on lines of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hebatron.cli import main
from hebatron.data.corpus import Corpus
from hebatron.data.prepare import prepare
from hebatron.tokenizer import train_bpe


def test_data_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["הלך ילד לגן", "הלך ילד לגן", "a b c d"]
    rows = [{"text": text, "id": n, "lang": "he"} for n, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_bpe(texts, 270)
    tokenizer.save(tmp_path / "tok")
    report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)
    assert main(["data", "inspect", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tok")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"2 documents, {report.tokens} tokens, {report.bytes} bytes"
    assert "ledger: 3 read = 2 used + 1 dropped" in out and "  dropped: {'repeat': 1}" in out
    assert f"he: 7 words, {report.tokens / 7:.3f} tokens per word" in out
    assert "הלך ילד לגן" in out and "document 0, 0, a:" in out
    assert main(["data", "inspect", str(tmp_path / "out"), "--samples", "-1"]) == 2
    assert "--samples must be at least 0, got -1" in capsys.readouterr().err


def test_data_inspect_says_what_it_could_not_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a b c"}) + "\n")
    tokenizer = train_bpe(["a b c"], 270)
    tokenizer.save(tmp_path / "tok")
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["data", "inspect", str(tmp_path / "out")]
    assert main([*command, "--tokenizer", str(tmp_path / "tok")]) == 0
    assert 'near-duplicates: not compared; pip install "hebatron[data]"' in capsys.readouterr().out
    assert main(command) == 0
    assert "near-duplicates: not compared; give --tokenizer" in capsys.readouterr().out


def test_data_inspect_json_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasketch")
    base = " ".join(f"מילה{n}" for n in range(60))
    rows = [
        {"text": base, "lang": "he", "source": "a"},
        {"text": base + " סוף", "lang": "he", "source": "b"},
        {"text": "שָׁלוֹם abc 12\ufffd", "lang": "he", "source": "b"},
        {"text": "plain words only", "lang": "en", "source": "c"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_bpe([base, "plain words only"], 300)
    tokenizer.save(tmp_path / "tok")
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)
    command = ["data", "inspect", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tok")]
    assert main([*command, "--json", "--samples", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    corpus = Corpus.open(tmp_path / "out")
    he, en = found["languages"]["he"], found["languages"]["en"]
    assert (found["documents"], found["exact_duplicates"], len(found["samples"])) == (4, 0, 1)
    assert found["near_duplicates"]["by_source"] == {"b": 1}
    assert found["near_duplicates"]["examples"][0]["document"] == 1
    assert (he["words"], en["words"], en["latin"]) == (123, 3, 14 / 16)
    assert en["tokens_per_word"] == corpus.lengths[3] / 3
    assert he["pointed_documents"] == 1 and he["replacement_characters"] == 1
    letters = len(base.replace(" ", "")) * 2 + 3 + 4
    digits = sum(map(len, map(str, range(60)))) * 2
    assert he["points_per_hebrew_letter"] == pytest.approx(3 / (letters - digits))
    assert sum(octave["documents"] for octave in found["lengths"]) == 4
    assert sum(octave["tokens"] for octave in found["lengths"]) == corpus.num_tokens
    for octave in found["lengths"]:
        inside = (corpus.lengths >= octave["from"]) & (corpus.lengths < octave["below"])
        assert octave["documents"] == inside.sum()
    assert {name: source["documents"] for name, source in found["sources"].items()} == {
        "a": 1,
        "b": 2,
        "c": 1,
    }
    assert main(["data", "inspect", str(tmp_path / "out"), "--json"]) == 0
    quick = json.loads(capsys.readouterr().out)
    assert quick["near_duplicates"] is None and "words" not in quick["languages"]["he"]

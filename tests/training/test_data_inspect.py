"""`data inspect` says what the corpus holds, and shows its samples on lines of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hebatron.cli import main
from hebatron.data import prepare
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

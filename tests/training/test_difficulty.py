"""The measures of difficulty on texts whose answer is known, the score, the split, and the columns on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hebatron.cli import main
from hebatron.corpus import Corpus
from hebatron.data import prepare
from hebatron.difficulty import combine, mattr, measure, sentence_words, split_phases, words, zstd_bits
from hebatron.tokenizer import train_bpe


def test_measures_of_known_texts() -> None:
    assert words('צה"ל בָּא, ab 12') == ['צה"ל', "בא", "ab"]
    assert sentence_words("א ב ג. ד!\n\nה ו") == 2.0 and sentence_words("...") == 0.0
    tokens = [str(n % 60) for n in range(200)]
    assert mattr(tokens) == 1.0 and mattr(["a"] * 100) == 1 / 50 and mattr([]) == 0.0
    mixed = [str(n * n % 37) for n in range(120)]
    windows = [len(set(mixed[n : n + 50])) / 50 for n in range(71)]
    assert mattr(mixed) == pytest.approx(np.mean(windows))
    assert zstd_bits("א" * 2000) < 0.2 < zstd_bits("בראשית ברא אלהים את השמים")


def test_combine_ranks_within_groups() -> None:
    columns = {"a": np.array([1.0, 2, 3, 10, 20]), "b": np.array([5.0, 5, 9, 0, 1])}
    assert combine(columns, np.array([0, 0, 0, 1, 1])).tolist() == [0.125, 0.375, 1.0, 0.0, 1.0]
    stretched = {name: np.exp(values) for name, values in columns.items()}
    assert (
        combine(stretched, np.zeros(5, np.int64)).tolist() == combine(columns, np.zeros(5, np.int64)).tolist()
    )


def test_split_phases_shares_tokens() -> None:
    score = np.random.default_rng(0).random(1000)
    tokens = np.random.default_rng(1).integers(1, 50, 1000)
    phases = split_phases(score, tokens, [3, 1, 2])
    shares = np.bincount(phases, tokens) / tokens.sum()
    assert np.abs(shares - np.array([3, 1, 2]) / 6).max() < 50 / tokens.sum()
    assert score[phases == 0].max() < score[phases == 1].min() < score[phases == 2].min()
    for bad in ([], [1, 0], [float("nan")]):
        with pytest.raises(
            ValueError, match="split_phases: weights must be one or more positive numbers, got"
        ):
            split_phases(score, tokens, bad)


def test_data_score_writes_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["הלך ילד לגן. הלך אב לגן.", "הלך ילד לגן וראה מחזה משונה ומופלא מאין כמוהו", "ילד הלך. אב הלך."]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe(texts, 300)
    tokenizer.save(tmp_path / "tok")
    out = tmp_path / "out"
    prepare([tmp_path / "a.jsonl"], out, tokenizer)
    fingerprint = Corpus.open(out).fingerprint
    assert Corpus.open(out).columns == {}
    assert main(["data", "score", str(out), "--tokenizer", str(tmp_path / "tok"), "--phases", "2"]) == 0
    assert capsys.readouterr().out.startswith("phase 1: ")
    corpus = Corpus.open(out)
    assert corpus.fingerprint == fingerprint
    expected = measure(corpus, tokenizer)
    assert {name: list(values) for name, values in corpus.columns.items()} == {
        name: list(values) for name, values in expected.items()
    }
    assert corpus.columns["difficulty"].argmax() == 1
    assert corpus.select([1]).columns["difficulty"].tolist() == [corpus.columns["difficulty"][1]]
    scores = out / "scores.safetensors"
    raw = bytearray(scores.read_bytes())
    raw[-3] ^= 1
    scores.write_bytes(raw)
    with pytest.raises(ValueError, match="must match its sha256, got a damaged file"):
        Corpus.open(out)

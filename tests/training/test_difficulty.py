"""The measures of difficulty on texts whose answer is known, the score, the split, and the columns on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hebatron.cli import main
from hebatron.data.corpus import Corpus
from hebatron.data.difficulty import (
    combine,
    mattr,
    measure,
    ranks,
    sentence_words,
    split_phases,
    words,
    zstd_bits,
)
from hebatron.data.length_effect import LengthEffect
from hebatron.data.prepare import prepare
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


def test_combine_weights_the_measures() -> None:
    columns = {"a": np.array([1.0, 2, 3]), "b": np.array([3.0, 2, 1])}
    one = np.zeros(3, np.int64)
    assert combine(columns, one).tolist() == [0.5, 0.5, 0.5]
    assert combine(columns, one, {"b": 0.0}).tolist() == [0.0, 0.5, 1.0]
    assert combine(columns, one, {"a": 3.0}).tolist() == [0.25, 0.5, 0.75]
    for weights, message in [
        ({"c": 1.0}, "weights must name one of a, b, got 'c'"),
        ({"a": -1.0}, "weight of a must be finite and >= 0, got -1.0"),
        ({"a": 0.0, "b": 0.0}, "weights must leave a measure above 0, got none"),
    ]:
        with pytest.raises(ValueError, match=f"difficulty: {message}"):
            combine(columns, one, weights)


def test_length_effect_puts_a_short_text_among_the_long_ones() -> None:
    rng = np.random.default_rng(0)
    lengths = [10, 100, 1000]
    level = rng.normal(size=(400, 1))
    noise = rng.normal(size=(400, 3)) * np.array([0.8, 0.3, 0.0])
    values = 3 - np.log10(lengths) + level + noise
    values[100:, 2] = np.nan
    effect = LengthEffect.of(lengths, values)
    assert effect is not None and effect.lengths.tolist() == lengths
    assert effect.means[-1] == pytest.approx(values[:100, 2].mean())
    short = effect.corrected(values[100:, 0], np.full(300, 10.0))
    assert short.mean() == pytest.approx(effect.means[-1], abs=0.2)
    assert short.std() == pytest.approx(effect.deviations[-1], rel=0.2)
    assert np.allclose(effect.corrected(values[:100, 2], np.full(100, 5000.0)), values[:100, 2])
    between = effect.corrected(effect.means[:1], np.array([np.sqrt(10 * 100)]))  # half way, by log length
    assert between[0] < effect.means[-1] + (effect.means[0] - effect.means[1]) * 0.9
    values[19:, 1:] = np.nan  # 19 are too few: the effect is known up to 10
    known = LengthEffect.of(lengths, values)
    assert known is not None and known.lengths.tolist() == [10]
    assert LengthEffect.of(lengths, values[:19]) is None


def test_measures_do_not_depend_on_length(tmp_path: Path) -> None:
    """The same kind of text, 6 to 700 words: ranks by the raw measures follow the length, corrected ones do not."""
    rng = np.random.default_rng(0)
    vocabulary = ["".join(rng.choice(list("אבגדהוזחטי"), rng.integers(2, 7))) for _ in range(3000)]
    share = 1 / np.arange(1, 3001)
    sizes = np.concatenate([np.full(60, 700), rng.integers(6, 45, 140)])
    texts = [" ".join(rng.choice(vocabulary, size, p=share / share.sum())) for size in sizes]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe(texts[:20], 300)
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)
    corpus = Corpus.open(tmp_path / "out")
    raw = measure(corpus, tokenizer, correct_length=False)
    corrected = measure(corpus, tokenizer)
    for name, before in (("mattr", -0.6), ("zstd_bits", -0.9)):
        assert correlation(raw[name], sizes) < before
        assert abs(correlation(corrected[name], sizes)) < 0.2, name
    assert raw["rarity"].tolist() == corrected["rarity"].tolist()


def correlation(a: Any, b: Any) -> float:
    return float(np.corrcoef(ranks(np.asarray(a, float)), ranks(np.asarray(b, float)))[0, 1])


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


def test_scores_are_drawn_whatever_a_source_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"text": f"הלך ילד {n}", "source": "$\\frac{$"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = train_bpe(["הלך ילד"], 300)
    tokenizer.save(tmp_path / "tok")
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer)
    command = ["data", "score", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tok")]
    command += ["--plot", str(tmp_path / "scores.png")]
    assert main(command) == 0
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(command) == 2
    assert "matplotlib must be installed, got none" in capsys.readouterr().err

"""Opening a corpus, damaged ones included, and its views."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_cases import CODE, ENGLISH, HEBREW, write_inputs, write_jsonl

import hebatron.data.corpus
import hebatron.data.documents
import hebatron.data.prepare
from hebatron.data.prepare import Corpus, prepare
from hebatron.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(HEBREW + ENGLISH + CODE, 400)


def test_corpus_open_notices_every_flipped_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(write_inputs(tmp_path / "in"), out, tokenizer)
    Corpus.open(out)
    for name in ("documents.npy", "tokens-00000.bin", "index.json"):
        whole = (out / name).read_bytes()
        for place in np.linspace(0, len(whole) - 1, 40).astype(int):
            raw = bytearray(whole)
            raw[place] ^= 1
            (out / name).write_bytes(raw)
            try:
                Corpus.open(out)
            except ValueError as error:
                assert "Corpus.open: " in str(error)
            else:  # white space, and how the corpus was asked for, are outside the fingerprint
                assert name == "index.json"
                assert json.loads(raw)["fingerprint"] == json.loads(whole)["fingerprint"]
        (out / name).write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=r"Corpus\.open: "):
            Corpus.open(out)
        (out / name).unlink()
        with pytest.raises(ValueError, match=r"Corpus\.open: .*must (exist|contain)"):
            Corpus.open(out)
        (out / name).write_bytes(whole)


def test_corpus_open_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(write_inputs(tmp_path / "in"), out, tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer must be the one .* 400 entries\), got .* \(300 entries"):
        Corpus.open(out, train_bpe(HEBREW, 300))
    with pytest.raises(ValueError, match=r"folder must contain index\.json, got"):
        Corpus.open(tmp_path)
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))

    def with_index(**changes: Any) -> None:
        edited = {**index, **changes}
        edited["fingerprint"] = hebatron.data.corpus.index_fingerprint(edited)
        (out / "index.json").write_text(json.dumps(edited), encoding="utf-8")

    with_index(version=2)
    with pytest.raises(ValueError, match=r"must be hebatron-corpus version 1, got \('hebatron-corpus', 2\)"):
        Corpus.open(out)
    (out / "index.json").write_text("[]")
    with pytest.raises(ValueError, match="must be hebatron-corpus version 1, got None"):
        Corpus.open(out)
    (out / "index.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="must be JSON"):
        Corpus.open(out)
    with_index(dtype="O")  # objects: what the file holds would be followed as addresses
    with pytest.raises(ValueError, match=r"Corpus\.open: dtype must be one of <u2, <u4, got 'O' in"):
        Corpus.open(out)
    with_index(tokenizer={**index["tokenizer"], "vocab_size": 100})
    with pytest.raises(ValueError, match="token ids must be under 100, got"):
        Corpus.open(out)
    Corpus.open(out, verify=False)
    with_index(sources=["one"])
    with pytest.raises(ValueError, match="source must be under 1, got 3"):
        Corpus.open(out)
    with_index(documents={**index["documents"], "count": 6})
    with pytest.raises(ValueError, match=r"documents\.npy must hold 6 document records, got shape \(7,\)"):
        Corpus.open(out)
    with_index(shards=[{**index["shards"][0], "tokens": 5}])
    with pytest.raises(ValueError, match=r"tokens-00000\.bin must have 10 bytes, got"):
        Corpus.open(out)
    table = np.load(out / "documents.npy")
    table["offset"][3] += 1
    np.save(out / "documents.npy", table)
    with_index()
    with pytest.raises(ValueError, match=r"documents must follow each other over .* got a gap or overlap"):
        Corpus.open(out, verify=False)


def test_corpus_views_share_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(write_inputs(tmp_path / "in"), tmp_path / "out", tokenizer)
    corpus = Corpus.open(tmp_path / "out")
    view = corpus.select([5, 0])
    assert (len(view), view.source(0), view.lang(1)) == (2, "english", "he")
    assert view.tokens(1).tolist() == corpus.tokens(0).tolist()
    assert corpus.select(np.arange(7) == 3).tokens(0).tolist() == corpus.tokens(3).tolist()
    assert view.fingerprint == corpus.select([5, 0]).fingerprint != corpus.select([0, 5]).fingerprint
    for bad, message in [
        ([], r"documents must be one or more of 0\.\.6, got \[\]"),
        ([7], r"documents must be one or more of 0\.\.6, got \[7\]"),
        ([-1], r"documents must be one or more of 0\.\.6, got \[-1\]"),
        ([True, False], r"a mask must have shape \(7,\), got \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=rf"Corpus\.select: {message}"):
            corpus.select(bad)


def test_corpus_split_depends_on_each_text_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"{HEBREW[i % 4]} {i}" for i in range(400)]
    rows = [{"text": text} for text in texts]
    prepare([write_jsonl(tmp_path / "a.jsonl", rows)], tmp_path / "a", tokenizer)
    prepare([write_jsonl(tmp_path / "b.jsonl", rows[::-1][:300])], tmp_path / "b", tokenizer)
    train, heldout = Corpus.open(tmp_path / "a").split(100)
    assert len(train) + len(heldout) == 400 and 15 <= len(heldout) <= 70

    def hashes(corpus: Corpus) -> set[bytes]:
        return {corpus.hash(i) for i in range(len(corpus))}

    assert not hashes(train) & hashes(heldout)
    assert hashes(Corpus.open(tmp_path / "b").split(100)[1]) <= hashes(heldout)
    for bad in (0, 1000):
        with pytest.raises(ValueError, match="held_out_permille must be between 1 and 999"):
            train.split(bad)
    with pytest.raises(ValueError, match="must leave documents on both sides, got 1 with 0 of 2 held out"):
        train.select([0, 1]).split(1)

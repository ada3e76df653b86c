"""What becomes of every document under every policy: read = used + dropped, line by line; and of long ones."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from corpus_cases import CODE, ENGLISH, HEBREW, write_jsonl

from hebatron.data.documents import text_hash
from hebatron.data.prepare import Corpus, prepare, read_texts, split_tokens
from hebatron.tokenizer import Tokenizer, train_bpe

ALPHABET = "אבגםש אב  \n\n.abZ09\u05b8\u05bc\u05be\u05f3\u200d\u2019\u202e\u200f\ufeff\ufb2aé👧"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(HEBREW + ENGLISH + CODE, 400)


def random_line(rng: random.Random, number: int) -> bytes:
    """One line of a .jsonl file: mostly a document, in some way broken, empty, long or a repeat."""
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(120))), rng.choice(HEBREW), "", " \n", "\u202e"]
    texts += [rng.choice(HEBREW) * 9 + str(rng.randrange(3)), "a\0b", "a\ud800", "\n".join(HEBREW * 3)]
    record: dict[str, Any] = {"id": number, "text": rng.choices(texts, [9, 2, 1, 1, 1, 3, 1, 1, 2])[0]}
    broken = {"text": 3, "lang": [], "source": "\udfff", "txt": 1, "id": "", "": None}
    if rng.random() < 0.25:
        key = rng.choice(sorted(broken))
        if key == "txt":
            del record["text"]
        record[key] = broken[key]
    line = json.dumps(record).encode()
    damaged = [line[: rng.randrange(len(line))], b"", b"[]", b"\xff" + line, b"\xef\xbb\xbf" + line]
    return rng.choice(damaged) if rng.random() < 0.25 else line


@pytest.mark.parametrize("seed", range(2))
def test_every_line_is_used_or_dropped_under_every_policy(
    tokenizer: Tokenizer, tmp_path: Path, seed: int
) -> None:
    pytest.importorskip("datasketch")
    rng = random.Random(seed)
    lines = [random_line(rng, number) for number in range(1, 161)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    seen_reasons: set[str] = set()
    for bidi, rules, near, (limit, long) in itertools.product(
        ("drop", "keep"), ("none", "hebrew-v1"), (None, 0.6), ((None, "error"), (64, "drop"), (64, "split"))
    ):
        if bidi == "keep" and rules != "none":
            continue
        options: dict[str, Any] = {"bidi": bidi, "normalize": rules, "near_duplicates": near}
        options |= {"max_tokens": limit, "long": long, "bad": "drop", "overwrite": True}
        report = prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer, **options)
        corpus = Corpus.open(tmp_path / "out", tokenizer)
        dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
        used = {int(corpus.id(i) or 0) for i in range(len(corpus))}
        assert report.read == len(lines) == report.used + sum(report.dropped.values()), options
        assert sorted([line["line"] for line in dropped] + list(used)) == list(range(1, len(lines) + 1))
        split = report.split or {"documents": 0, "pieces": 0}
        assert report.documents == report.used - split["documents"] + split["pieces"] == len(corpus)
        assert limit is None or corpus.lengths.max() <= limit
        seen_reasons |= report.dropped.keys()
    assert {"repeat", "near repeat", "too long", "NUL", "lone surrogate", "broken JSON"} <= seen_reasons
    assert {"empty", "blank line", "no text", "bad id", "field not a string", "invalid UTF-8"} <= seen_reasons


def test_document_above_the_paper_context_is_an_error_dropped_or_split(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = "\n".join(f"{HEBREW[i % 3]} {i}" for i in range(3000))
    assert len(tokenizer.encode(long)) > 65_536
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "קצר", "id": 1}, {"text": long, "id": 2}])
    with pytest.raises(ValueError, match=r"prepare: a\.jsonl:2 must have at most max_tokens = 65536 tokens"):
        prepare([path], tmp_path / "out", tokenizer, max_tokens=65_536)
    assert not (tmp_path / "out").exists()
    report = prepare([path], tmp_path / "drop", tokenizer, max_tokens=65_536, long="drop")
    assert (report.read, report.used, report.dropped) == (2, 1, {"too long": 1})
    report = prepare([path], tmp_path / "split", tokenizer, max_tokens=65_536, long="split")
    corpus = Corpus.open(tmp_path / "split", tokenizer)
    assert report.split == {"documents": 1, "pieces": len(corpus) - 1} and report.used == 2
    assert corpus.lengths.max() <= 65_536 and (corpus.lengths[1:-1] > 65_536 - 200).all()
    texts = [tokenizer.decode(corpus.tokens(i)[:-1].tolist()) for i in range(len(corpus))]
    assert "".join(texts[1:]) == long and all(text.endswith("\n") for text in texts[1:-1])
    for i in range(1, len(corpus)):  # on one side of Corpus.split, and traceable
        assert (corpus.hash(i), corpus.id(i)) == (text_hash(long), "2")
        assert corpus.tokens(i)[-1] == tokenizer.eos_id
        assert corpus.byte_count(i) == len(texts[i].encode("utf-8"))
    exact = len(tokenizer.encode(long)) + 1
    assert prepare([path], tmp_path / "whole", tokenizer, max_tokens=exact).split == {}
    for options, message in [
        ({"long": "split"}, r"max_tokens must be given with long='split', got None"),
        ({"long": "cut", "max_tokens": 100}, r"long must be one of \('error', 'drop', 'split'\), got 'cut'"),
        ({"max_tokens": 15}, "max_tokens must be at least 16, got 15"),
    ]:
        with pytest.raises(ValueError, match=f"prepare: {message}"):
            prepare([path], tmp_path / "x", tokenizer, **options)


def test_split_tokens_keeps_characters_words_and_lines(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(1, 300)))
        limit = rng.randrange(8, 40)
        pieces = split_tokens(text, tokenizer, limit)
        assert "".join(piece for piece, _ in pieces) == text
        for piece, ids in pieces:
            assert 0 < len(ids) <= limit and tokenizer.decode(ids) == piece
    words = "אבג " * 50
    assert all(piece.strip().split(" ")[-1] == "אבג" for piece, _ in split_tokens(words, tokenizer, 11))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".txt"])
def test_a_line_of_ten_megabytes_is_read_whole(tmp_path: Path, suffix: str) -> None:
    text = HEBREW[0] * 90_000
    assert len(text.encode("utf-8")) > 10_000_000
    path = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        path.write_text(text, encoding="utf-8")
    else:
        write_jsonl(path, [{"text": text}, {"text": "after"}])
    assert list(read_texts([path])) == ([text] if suffix == ".txt" else [text, "after"])

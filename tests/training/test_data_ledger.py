"""Tables, normalisation, near-duplicates and the ledger's lines: every document accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hebatron.data.corpus import Corpus
from hebatron.data.documents import text_hash
from hebatron.data.prepare import prepare
from hebatron.tokenizer import Tokenizer, train_bpe

TEXT = "הרוח נשבה כל הלילה מן הים ובבוקר מצאו הדייגים סירה ריקה על החוף ליד המזח הישן של הכפר"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 300)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def test_ledger_has_a_line_for_every_dropped_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "א", "id": "x"}, {"text": " "}, {"text": "א"}, {"txt": 1}])
    path.write_bytes(path.read_bytes() + b'\n{"text": "\xff"}\n')
    report = prepare([path], tmp_path / "out", tokenizer, bad="drop")
    ledger = lines(tmp_path / "out")
    assert [(line["file"], line["line"], line["reason"]) for line in ledger] == [
        ("a.jsonl", 2, "empty"),
        ("a.jsonl", 3, "repeat"),
        ("a.jsonl", 4, "no text"),
        ("a.jsonl", 5, "blank line"),
        ("a.jsonl", 6, "invalid UTF-8"),
    ]
    digest = text_hash("א").hex()
    assert ledger[1]["hash"] == digest
    assert ledger[1]["repeats"] == {"file": "a.jsonl", "line": 1, "id": "x", "hash": digest}
    assert report.read == report.documents + len(ledger) and len(ledger) == sum(report.dropped.values())
    before = (tmp_path / "out" / "dropped.jsonl").read_bytes()
    assert prepare([path], tmp_path / "out", tokenizer, bad="drop").reused
    prepare([path], tmp_path / "out", tokenizer, bad="drop", overwrite=True)
    assert (tmp_path / "out" / "dropped.jsonl").read_bytes() == before
    (tmp_path / "out" / "dropped.jsonl").write_bytes(before[:-2])
    with pytest.raises(ValueError, match=r"dropped\.jsonl must have sha256"):
        Corpus.open(tmp_path / "out")


def test_corpus_keeps_record_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"text": "a", "id": "ש/1"}, {"text": "b", "id": 7}, {"text": "c"}, {"text": "d", "id": 7}]
    prepare([write(tmp_path / "a.jsonl", records)], tmp_path / "out", tokenizer)
    corpus = Corpus.open(tmp_path / "out")
    assert [corpus.id(i) for i in range(4)] == ["ש/1", "7", None, "7"]
    assert corpus.select([1]).id(0) == "7"
    assert corpus.index["ledger"]["repeated_ids"] == 1
    prepare([write(tmp_path / "b.jsonl", [{"text": "a"}])], tmp_path / "b", tokenizer)
    assert Corpus.open(tmp_path / "b").id(0) is None
    for bad in ([1], "", "a\u202e", "x" * 257, True):
        path = write(tmp_path / "c.jsonl", [{"text": "a", "id": bad}])
        with pytest.raises(ValueError, match=r"c\.jsonl:1 must have .* in \"id\", got"):
            prepare([path], tmp_path / "c", tokenizer)


def test_corpus_from_before_the_ledger_file_opens_and_is_reused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from hebatron.data.corpus import index_fingerprint

    path, out = write(tmp_path / "a.jsonl", [{"text": "a"}]), tmp_path / "out"
    prepare([path], out, tokenizer)
    index = json.loads((out / "index.json").read_text())
    del index["extra"]
    del index["request"]["policy"]["normalize"], index["request"]["policy"]["near_duplicates"]
    assert index["fingerprint"] == index_fingerprint(index)
    (out / "index.json").write_text(json.dumps(index))
    (out / "dropped.jsonl").unlink()
    assert prepare([path], out, tokenizer).reused


def test_prepare_normalizes_and_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "שָׁלוֹם בית\u05beספר"}, {"text": "שלום בית-ספר"}])
    plain = prepare([path], tmp_path / "plain", tokenizer)
    report = prepare([path], tmp_path / "out", tokenizer, normalize="hebrew-v1")
    assert (plain.documents, plain.normalized) == (2, {})
    assert report.normalized == {"maqaf": 1, "niqqud": 3} and report.dropped == {"repeat": 1}
    assert tokenizer.decode(Corpus.open(tmp_path / "out").tokens(0).tolist()) == "שלום בית-ספר"
    with pytest.raises(ValueError, match="bidi must be 'drop' with normalize='hebrew-v1', got 'keep'"):
        prepare([path], tmp_path / "x", tokenizer, normalize="hebrew-v1", bidi="keep")
    with pytest.raises(ValueError, match="prepare: normalize must be one of"):
        prepare([path], tmp_path / "x", tokenizer, normalize="v2")  # type: ignore[arg-type]


def test_prepare_drops_near_duplicates(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    other = " ".join(reversed(TEXT.split()))
    long = " ".join(f"{word}{n}" for n in range(12) for word in TEXT.split())
    texts = [long, long + " סוף", long.replace(" ", ", "), TEXT, other, "!", "?"]
    path = write(tmp_path / "a.jsonl", [{"text": text, "id": n} for n, text in enumerate(texts)])
    report = prepare([path], tmp_path / "out", tokenizer, near_duplicates=0.8)
    assert report.dropped == {"near repeat": 2}
    ledger = lines(tmp_path / "out")
    assert [(line["id"], line["repeats"]["id"]) for line in ledger] == [("1", "0"), ("2", "0")]
    assert ledger[0]["similarity"] >= 0.9 and ledger[1]["similarity"] == 1.0
    again = prepare([path], tmp_path / "again", tokenizer, near_duplicates=0.8)
    assert again.fingerprint == report.fingerprint
    for bad in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="near_duplicates must be above 0 and at most 1, got"):
            prepare([path], tmp_path / "x", tokenizer, near_duplicates=bad)


def test_prepare_reads_parquet(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    raw = pyarrow.array(["ok", "a\0", None, "ok", "א"])
    table = pyarrow.table({"text": raw, "id": [1, 2, 3, 4, 5], "lang": ["he"] * 5, "size": [0] * 5})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:2 must not contain NUL"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", tokenizer)
    report = prepare([tmp_path / "a.parquet"], tmp_path / "out", tokenizer, bad="drop")
    assert (report.read, report.documents) == (5, 2)
    assert report.dropped == {"NUL": 1, "field not a string": 1, "repeat": 1}
    corpus = Corpus.open(tmp_path / "out")
    assert (corpus.sources, corpus.langs, corpus.id(1)) == (["a"], ["he"], "5")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet must be a whole parquet file, got"):
        prepare([tmp_path / "a.parquet"], tmp_path / "x", tokenizer, bad="drop")


def test_prepare_reads_a_folder_that_datasets_saved(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "id": ["x", "y"]})
    data.save_to_disk(str(tmp_path / "saved"))
    prepare([tmp_path / "saved"], tmp_path / "out", tokenizer)
    corpus = Corpus.open(tmp_path / "out")
    assert (corpus.sources, corpus.id(1)) == (["saved"], "y")
    arrow = next((tmp_path / "saved").glob("*.arrow"))

    class Downloaded:
        cache_files = [{"filename": str(arrow)}]

    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: {"train": Downloaded()})
    report = prepare(["hf:some/name"], tmp_path / "hub", tokenizer)
    assert report.documents == 2
    with pytest.raises(ValueError, match=r"hf: must name whole splits, got train\[:1\]"):
        prepare(["hf:some/name@train[:1]"], tmp_path / "slice", tokenizer)


@pytest.mark.parametrize("batch_chars", [1, 1 << 20])  # every document a batch of its own, or all in one
def test_no_dropped_document_makes_another_one_a_repeat(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_chars: int
) -> None:
    """The near repeat of a text that is dropped for its length is used, and the ledger names documents that stay."""
    pytest.importorskip("datasketch")
    monkeypatch.setattr("hebatron.data.prepare.BATCH_CHARS", batch_chars)
    long = " ".join(f"{word}{n}" for n in range(12) for word in TEXT.split())
    short = long.rpartition(" ")[0]
    limit = len(tokenizer.encode(long))
    assert len(tokenizer.encode(short)) < limit
    texts = [long, long, short, short + ".", long + "!", TEXT, TEXT]
    path = write(tmp_path / "a.jsonl", [{"text": text, "id": n} for n, text in enumerate(texts)])
    options: dict[str, Any] = {"near_duplicates": 0.8, "max_tokens": limit, "long": "drop"}
    report = prepare([path], tmp_path / "out", tokenizer, **options)
    corpus, ledger = Corpus.open(tmp_path / "out"), lines(tmp_path / "out")
    assert [corpus.id(i) for i in range(len(corpus))] == ["2", "5"]
    assert [(line["id"], line["reason"], line.get("repeats", {}).get("id")) for line in ledger] == [
        ("0", "too long", None),
        ("1", "too long", None),
        ("3", "near repeat", "2"),
        ("4", "too long", None),
        ("6", "repeat", "5"),
    ]
    assert report.read == 7 == report.used + len(ledger) and report.used == 2
    whole = prepare([path], tmp_path / "split", tokenizer, **options | {"long": "split"})
    assert whole.dropped == {"repeat": 2, "near repeat": 3} and whole.split["documents"] == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:1 must have at most max_tokens"):
        prepare([path], tmp_path / "error", tokenizer, **options | {"long": "error"})

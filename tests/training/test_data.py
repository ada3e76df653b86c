"""Files to corpus and back: every document accounted for, and only what may be replaced is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpus_cases import CODE, ENGLISH, HEBREW, files_below, write_inputs, write_jsonl

import hebatron.data.documents
import hebatron.data.prepare
from hebatron.data.prepare import Corpus, prepare, read_texts
from hebatron.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(HEBREW + ENGLISH + CODE, 400)


def test_prepare_keeps_every_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    report = prepare(write_inputs(tmp_path / "in"), tmp_path / "out", tokenizer)
    corpus = Corpus.open(tmp_path / "out", tokenizer)
    texts = HEBREW + ENGLISH + CODE
    assert len(corpus) == report.documents == len(texts)
    for i, text in enumerate(texts):
        tokens = corpus.tokens(i)
        assert tokens.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
        assert tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert tokenizer.decode(tokens[:-1].tolist()) == text
        assert corpus.byte_count(i) == len(text.encode("utf-8"))
        assert corpus.hash(i) == hebatron.data.documents.text_hash(text)
    assert [corpus.source(i) for i in range(7)] == [
        "he-0",
        "he-1",
        "he-0",
        "he-1",
        "english",
        "english",
        "area",
    ]
    assert [corpus.lang(i) for i in range(7)] == ["he"] * 4 + ["und"] * 3
    assert corpus.num_tokens == report.tokens == sum(corpus.lengths)
    assert corpus.num_bytes == report.bytes
    assert report.by_source["he-1"] == {
        "documents": 2,
        "tokens": int(corpus.lengths[[1, 3]].sum()),
        "bytes": corpus.byte_count(1) + corpus.byte_count(3),
    }
    assert sum(counts["tokens"] for counts in report.by_lang.values()) == report.tokens
    assert (report.read, report.dropped, report.reused) == (7, {}, False)
    assert report.fingerprint == corpus.fingerprint


def test_prepare_source_and_lang_override_the_records(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(write_inputs(tmp_path / "in"), tmp_path / "out", tokenizer, source="mine", lang="he")
    corpus = Corpus.open(tmp_path / "out")
    assert (corpus.sources, corpus.langs) == (["mine"], ["he"])


def test_prepare_reads_folders_in_sorted_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = write_inputs(tmp_path / "in")
    (tmp_path / "in" / "README.md").write_text("no data")
    in_folder = prepare([tmp_path / "in"], tmp_path / "a", tokenizer, source="mine")
    by_name = prepare(sorted(files), tmp_path / "b", tokenizer, source="mine")
    assert in_folder.fingerprint == by_name.fingerprint
    assert list(read_texts([tmp_path / "in"])) == CODE + ENGLISH + HEBREW


def test_a_text_file_is_a_source_by_its_name_and_a_folder_of_them_by_its_own(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Files given by name are told apart; a folder of thousands of documents is one source. Repeating either is seen
    to be the same, the one for the other is not."""
    (tmp_path / "in").mkdir()
    files = [tmp_path / "in" / f"{name}.txt" for name in ("knesset", "ruth.v2")]
    for file, text in zip(files, HEBREW, strict=False):
        file.write_text(text, encoding="utf-8")
    for inputs, expected in ((files, ["knesset", "ruth.v2"]), ([tmp_path / "in"], ["in"])):
        out = tmp_path / f"out-{len(inputs)}"
        prepare(inputs, out, tokenizer)
        assert Corpus.open(out).sources == expected
        assert prepare(inputs, out, tokenizer).reused
    with pytest.raises(ValueError, match="out must not hold another corpus"):
        prepare(files, tmp_path / "out-1", tokenizer)
    prepare(files, tmp_path / "named", tokenizer, source="mine")
    assert prepare([tmp_path / "in"], tmp_path / "named", tokenizer, source="mine").reused


def test_prepare_is_independent_of_batches_and_shards(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_inputs(tmp_path / "in")
    prepare(files, tmp_path / "whole", tokenizer)
    monkeypatch.setattr(hebatron.data.prepare, "BATCH_CHARS", 60)
    prepare(files, tmp_path / "batches", tokenizer)
    prepare(files, tmp_path / "shards", tokenizer, shard_tokens=50)
    whole = Corpus.open(tmp_path / "whole")
    assert whole.fingerprint == Corpus.open(tmp_path / "batches").fingerprint
    assert len(list((tmp_path / "shards").glob("tokens-*.bin"))) > 2
    shards = Corpus.open(tmp_path / "shards")
    assert [shards.tokens(i).tolist() for i in range(7)] == [whole.tokens(i).tolist() for i in range(7)]


def test_prepare_writes_uint32_for_a_large_vocabulary(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", 65_537)
    prepare(write_inputs(tmp_path / "in"), tmp_path / "out", tokenizer)
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.tokens(0).dtype == np.uint32
    assert corpus.tokens(6).tolist() == [*tokenizer.encode(CODE[0]), tokenizer.eos_id]


def test_prepare_drops_and_counts_empty_documents_and_repeats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [HEBREW[0], "", " \n\t", HEBREW[1], HEBREW[0], "\u202e", HEBREW[1] + " "]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    path.write_bytes(path.read_bytes() + b"\n  \n")
    report = prepare([path, path], tmp_path / "out", tokenizer)
    assert report.documents == 3
    assert report.dropped == {"blank line": 4, "empty": 6, "repeat": 5}
    assert report.read == report.documents + sum(report.dropped.values()) == 18


def test_prepare_drops_and_counts_what_the_tokenizer_loses(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub tokenizer's normaliser may delete characters, and with them a whole document."""
    expected = [*tokenizer.encode(HEBREW[0]), tokenizer.eos_id]
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [[], expected[:-1]])
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("x", HEBREW[0])])
    report = prepare([path], tmp_path / "out", tokenizer)
    assert (report.read, report.documents, report.dropped) == (2, 1, {"no tokens": 1})
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.index["ledger"]["used"] == 1
    assert corpus.tokens(0).tolist() == expected


def test_prepare_removes_byte_order_mark_and_bidi_controls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    marked = "\u200fשלום \u202eabc\u202c \u2066x\u2069"
    records = [{"text": marked}, {"text": "\ufeffשלום"}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # and one that belongs to the file
    dropped = prepare([path], tmp_path / "drop", tokenizer)
    kept = prepare([path], tmp_path / "keep", tokenizer, bidi="keep")
    assert dropped.removed_characters == {"bidi control": 5, "byte order mark": 1}
    assert kept.removed_characters == {"byte order mark": 1}
    texts = []
    for name in ("drop", "keep"):
        corpus = Corpus.open(tmp_path / name)
        texts.append([tokenizer.decode(corpus.tokens(i)[:-1].tolist()) for i in range(2)])
    assert texts == [["שלום abc x", "שלום"], [marked, "שלום"]]


def test_prepare_keeps_the_text_as_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "  שורה\r\nשנייה\u2028\u00a0</s><|im_end|> e\u0301 \u05d0\u05b0 👩‍👧 \x85 "
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8"))
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer)
    assert tokenizer.decode(Corpus.open(tmp_path / "out").tokens(0)[:-1].tolist()) == text


def test_prepare_document_of_one_endless_word(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "q" * 2_000_000  # one piece for the tokenizer, whose time must stay linear
    path = write_jsonl(tmp_path / "a.jsonl.zst", [{"text": text}, {"text": "אחרי"}])
    report = prepare([path], tmp_path / "out", tokenizer)
    assert report.bytes == 2_000_000 + 8
    assert Corpus.open(tmp_path / "out").byte_count(0) == 2_000_000


def test_prepare_takes_null_source_and_lang_as_absent(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": HEBREW[0], "source": None, "lang": None}])
    prepare([path], tmp_path / "out", tokenizer)
    corpus = Corpus.open(tmp_path / "out")
    assert (corpus.sources, corpus.langs) == (["a"], ["und"])


def test_prepare_replaces_only_what_it_may(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = write_inputs(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is no obstacle
    first = prepare(files, out, tokenizer)
    before = files_below(out)
    again = prepare(files, out, tokenizer)
    assert (again.reused, again.fingerprint, files_below(out)) == (True, first.fingerprint, before)
    with pytest.raises(ValueError, match="prepare: out must not hold another corpus"):
        prepare(files[:1], out, tokenizer)
    with pytest.raises(ValueError, match="prepare: out must not hold another corpus"):
        prepare(files, out, tokenizer, bidi="keep")
    assert files_below(out) == before
    replaced = prepare(files[:1], out, tokenizer, overwrite=True)
    assert (replaced.documents, len(Corpus.open(out))) == (4, 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="prepare: out must be a new folder or an earlier corpus"):
        prepare(files, tmp_path / "mine", tokenizer, overwrite=True)
    assert files_below(tmp_path / "mine") == {"thesis.txt": b"x"}
    (tmp_path / "mine" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="must be hebatron-corpus version 1, got"):
        prepare(files, tmp_path / "mine", tokenizer, overwrite=True)
    assert files_below(tmp_path / "mine") == {"thesis.txt": b"x", "index.json": b"{}"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "mine", "out"]  # no scratch folder stays


def test_prepare_failure_keeps_the_old_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare(write_inputs(tmp_path / "in"), tmp_path / "out", tokenizer)
    before = files_below(tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2 must have a string"):
        prepare([tmp_path / "bad.jsonl"], tmp_path / "out", tokenizer, overwrite=True)
    assert files_below(tmp_path / "out") == before


@pytest.mark.parametrize("failing", ["corpus", "old"])
def test_prepare_interrupted_while_replacing_keeps_the_old_corpus(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    files = write_inputs(tmp_path / "in")
    prepare(files, tmp_path / "out", tokenizer)
    before = files_below(tmp_path / "out")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if (
            path.name == failing
        ):  # the new corpus to its place; or, with the old one out of the way, back again
            raise KeyboardInterrupt
        if failing == "old" and path.name == "corpus":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(files[:1], tmp_path / "out", tokenizer, overwrite=True)
    if failing == "corpus":
        assert files_below(tmp_path / "out") == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    else:  # not even put back: it is still there
        (scratch,) = tmp_path.glob(".out.*")
        assert files_below(scratch / "old") == before

"""Files to corpus and back: every document accounted for, every kind of bad input named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

import hebatron.data
import hebatron.documents
from hebatron.data import Corpus, prepare, read_texts
from hebatron.tokenizer import Tokenizer, train_bpe

HEBREW = [
    "הרוח נשבה כל הלילה מן הים, ובבוקר מצאו הדייגים סירה ריקה על החוף.",
    "סבתא אפתה לחם שעורה. הנכדים חיכו ליד התנור, ואיש לא דיבר עד שהלחם יצא.",
    'מנכ"לית המפעל אמרה: "בשנת 1987 עבדו כאן 340 פועלים, והיום רק 12".',
    "הַשֶּׁמֶשׁ זָרְחָה וְהַצִּפּוֹר שָׁרָה עַל הָעֵץ",
]
ENGLISH = [
    "The wind blew all night from the sea; in the morning an empty boat lay on the beach.",
    "Grandmother baked barley bread, and nobody said a word until it was done.",
]
CODE = ["def area(width: float, height: float) -> float:\n    return width * height\n"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(HEBREW + ENGLISH + CODE, 400)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    raw = text.encode("utf-8")
    path.write_bytes(zstandard.compress(raw) if path.suffix == ".zst" else raw)
    return path


def write_inputs(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    hebrew = [{"text": text, "source": f"he-{i % 2}", "lang": "he", "id": i} for i, text in enumerate(HEBREW)]
    (folder / "area.txt").write_text(CODE[0], encoding="utf-8", newline="")
    return [
        write_jsonl(folder / "hebrew.jsonl.zst", hebrew),
        write_jsonl(folder / "english.jsonl", [{"text": text} for text in ENGLISH]),
        folder / "area.txt",
    ]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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
        assert corpus.hash(i) == hebatron.documents.text_hash(text)
    assert [corpus.source(i) for i in range(7)] == [
        "he-0",
        "he-1",
        "he-0",
        "he-1",
        "english",
        "english",
        "in",
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
    in_folder = prepare([tmp_path / "in"], tmp_path / "a", tokenizer)
    assert in_folder.fingerprint == prepare(sorted(files), tmp_path / "b", tokenizer).fingerprint
    assert list(read_texts([tmp_path / "in"])) == CODE + ENGLISH + HEBREW


def test_prepare_is_independent_of_batches_and_shards(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_inputs(tmp_path / "in")
    prepare(files, tmp_path / "whole", tokenizer)
    monkeypatch.setattr(hebatron.data, "BATCH_CHARS", 60)
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


def test_zstd_stream_reads_frames_and_long_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * n + str(n)}) for n in (1, 5_000, 300_000, 70_000)]
    raw = "\n".join(lines).encode()
    frames = [raw[:10], raw[10:200_000], b"", raw[200_000:]]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    assert list(read_texts([path])) == [json.loads(line)["text"] for line in lines]


BAD_LINES = [
    (b'{"text": "\xd7"}', "invalid UTF-8", "must be UTF-8, got byte 0xd7 at column 11"),
    (b'{"text": "abc', "broken JSON", "must be one JSON object a line, got Invalid control"),
    (b"[" * 100_000, "broken JSON", "must be one JSON object a line, got maximum recursion"),
    (b'["text"]', "not an object", "must be a JSON object, got list"),
    (b'{"txt": "a", "id": 3}', "no text", "must have a field \"text\", got ['id', 'txt']"),
    (b'{"text": null}', "field not a string", 'must have a string in "text", got NoneType'),
    (b'{"text": "a", "lang": 3}', "field not a string", 'must have a string in "lang", got int'),
    (b'{"text": "a\\u0000b"}', "NUL", "must not contain NUL, got one at character 2"),
    (
        b'{"text": "a\\ud800"}',
        "lone surrogate",
        "must be valid Unicode, got U+D800 at character 2 of its text",
    ),
    (
        b'{"text": "a", "source": "\\udfff"}',
        "lone surrogate",
        "got U+DFFF at character 1 of its source",
    ),
    (b'{"text": "' + b"a" * 2000 + b'"}', "too large", "must be at most 1,000 bytes, got more"),
]


@pytest.mark.parametrize(
    ("line", "reason", "message"), BAD_LINES, ids=[f"{i}-{r}" for i, (_, r, _) in enumerate(BAD_LINES)]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_prepare_bad_line_is_named_or_counted(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: bytes,
    reason: str,
    message: str,
    suffix: str,
) -> None:
    if reason == "too large":
        monkeypatch.setattr(hebatron.documents, "MAX_DOCUMENT_BYTES", 1000)
    raw = b'{"text": "good"}\n' + line + b'\n{"text": "after"}\n'
    path = tmp_path / f"a{suffix}"
    path.write_bytes(zstandard.compress(raw) if suffix.endswith("zst") else raw)
    with pytest.raises(ValueError, match=f"^{re.escape(f'prepare: {path}:2 ')}.*{re.escape(message)}"):
        prepare([path], tmp_path / "out", tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]  # nothing half-written
    report = prepare([path], tmp_path / "out", tokenizer, bad="drop")
    assert (report.read, report.documents, report.dropped) == (3, 2, {reason: 1})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "must not be empty, got 0 bytes"),
        (b"a\xff", "must be UTF-8, got byte 0xff at column 2"),
        (b"a\x00", "must not contain NUL, got one at character 2"),
    ],
)
def test_prepare_bad_txt_file_is_named(
    tokenizer: Tokenizer, tmp_path: Path, raw: bytes, message: str
) -> None:
    for name in ("a.txt", "a.jsonl") if not raw else ("a.txt",):
        path = tmp_path / name
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=re.escape(f"prepare: {path} {message}")):
            prepare([path], tmp_path / "out", tokenizer)


def test_prepare_damaged_zstd_is_an_error_under_every_policy(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = zstandard.compress(b'{"text": "' + bytes(range(65, 91)) * 3000 + b'"}\n{"text": "b"}\n')
    path = tmp_path / "a.jsonl.zst"
    for raw, message in [
        (whole[:-1], "must be whole, got a zstd frame cut short"),
        (whole[: len(whole) // 2], "must be whole, got a zstd frame cut short"),
        (b"plain text", "must be zstd, got"),
        (whole + b"tail", "must be zstd, got"),
    ]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=re.escape(f"prepare: {path} {message}")):
            prepare([path], tmp_path / "out", tokenizer, bad="drop")
        assert not (tmp_path / "out").exists()


def test_prepare_argument_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "empty").mkdir()
    empty = write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}])
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([], {}, "inputs must name at least one file, got none"),
        ([tmp_path / "none.txt"], {}, "input must exist, got .*none.txt"),
        ([tmp_path / "a.csv"], {}, r"input must end in \.txt, \.jsonl, \.jsonl\.zst, .* got .*a\.csv"),
        ([tmp_path / "empty"], {}, "folder must contain .* files, got none in"),
        ([good], {"bidi": "x"}, r"bidi must be one of \('drop', 'keep'\), got 'x'"),
        ([good], {"bad": "x"}, r"bad must be one of \('error', 'drop'\), got 'x'"),
        ([good], {"source": ""}, "source must not be empty, got ''"),
        ([good], {"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
        ([empty], {}, r"inputs must hold at least one usable document, got 1 read, dropped {'empty': 1}"),
    ]
    for inputs, options, message in cases:
        with pytest.raises(ValueError, match=f"prepare: {message}"):
            prepare(inputs, tmp_path / "out", tokenizer, **options)
        assert not (tmp_path / "out").exists()


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


def test_prepare_takes_null_source_and_lang_as_absent(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": HEBREW[0], "source": None, "lang": None}])
    prepare([path], tmp_path / "out", tokenizer)
    corpus = Corpus.open(tmp_path / "out")
    assert (corpus.sources, corpus.langs) == (["a"], ["und"])


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
        edited["fingerprint"] = hebatron.data.index_fingerprint(edited)
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

"""Every kind of bad input is named, and nothing is left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard
from corpus_cases import CODE, ENGLISH, HEBREW, write_jsonl

import hebatron.data.documents
import hebatron.data.prepare
from hebatron.data.prepare import prepare, read_texts
from hebatron.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(HEBREW + ENGLISH + CODE, 400)


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
    (
        b'{"text": "a", "id": ' + b"1" * 5000 + b"}",
        "broken JSON",
        "must be one JSON object a line, got Exceeds the limit",
    ),
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
        monkeypatch.setattr(hebatron.data.documents, "MAX_DOCUMENT_BYTES", 1000)
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

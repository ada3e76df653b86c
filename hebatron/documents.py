"""Documents out of .txt (one a file), .jsonl and .jsonl.zst (one a line) files, cleaned and counted.

A broken document (invalid UTF-8, bad JSON, no text, NUL, ...) is an error naming file and line, or with
bad="drop" a counted drop; a damaged zstd stream or an unknown kind of file is always an error. Empty
documents and exact repeats are always counted drops. A byte order mark is removed; bidi controls are removed
(bidi="drop") or kept. No other character is touched. The ledger adds up: read = used + dropped.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import zstandard

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
MAX_DOCUMENT_BYTES = 1 << 28  # 256 MiB: a line without end must not fill the memory
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class _BadDocument(ValueError):
    """One document cannot be used: `reason` is its name in the ledger."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Ledger:
    """Every document read is used or dropped for one reason."""

    read: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    removed_characters: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Policy:
    """What `prepare` does with text; part of a corpus's identity."""

    source: str | None = None
    lang: str | None = None
    text_field: str = "text"
    bidi: Literal["drop", "keep"] = "drop"
    bad: Literal["error", "drop"] = "error"

    def __post_init__(self) -> None:
        for name, allowed in (("bidi", ("drop", "keep")), ("bad", ("error", "drop"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"prepare: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("source", "lang", "text_field"):
            if getattr(self, name) == "":
                raise ValueError(f"prepare: {name} must not be empty, got ''")


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    lang: str


def find_files(inputs: Sequence[Path | str]) -> list[Path]:
    """The files to read: each input, or, for a folder, every .txt, .jsonl and .jsonl.zst below it, sorted."""
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
            if not found:
                raise ValueError(
                    f"prepare: folder must contain {', '.join(SUFFIXES)} files, got none in {path}"
                )
            files += found
        elif not path.is_file():
            raise ValueError(f"prepare: input must exist, got {path}")
        elif not path.name.endswith(SUFFIXES):
            raise ValueError(f"prepare: input must end in {', '.join(SUFFIXES)}, got {path}")
        else:
            files.append(path)
    if not files:
        raise ValueError("prepare: inputs must name at least one file, got none")
    return files


class _ZstdStream(io.RawIOBase):
    """Decompresses frame after frame; raises on a file cut short, where zstandard's own reader just stops."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # 4 KiB in is at most 128 MiB out (zstd's limit is 128 KiB for 4 bytes).
            chunk = self._file.read(4096)
            if not chunk:
                if self._decoder is not None:
                    raise ValueError(f"prepare: {self._path} must be whole, got a zstd frame cut short")
                return 0
            self._ready = memoryview(self._decompress(chunk))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _decompress(self, chunk: bytes) -> bytes:
        out = []
        while chunk:
            if self._decoder is None:
                self._decoder = zstandard.ZstdDecompressor().decompressobj()
            try:
                out.append(self._decoder.decompress(chunk))
            except zstandard.ZstdError as error:
                raise ValueError(f"prepare: {self._path} must be zstd, got {error}") from error
            if not self._decoder.eof:
                break
            chunk, self._decoder = self._decoder.unused_data, None
        return b"".join(out)


def _raw_documents(path: Path) -> Iterator[tuple[str, bytes]]:
    """(where, undecoded document): the whole of a .txt file, or each line of a .jsonl file."""
    with path.open("rb") as file:
        if path.name.endswith(".txt"):
            yield str(path), file.read(MAX_DOCUMENT_BYTES + 1)
            return
        zst = path.name.endswith(".zst")
        lines = io.BufferedReader(_ZstdStream(file, path)) if zst else file
        number = 0
        while line := lines.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            yield f"{path}:{number}", line
            while line and not line.endswith(b"\n"):  # what is left of a line that is too large
                line = lines.readline(MAX_DOCUMENT_BYTES)
        if number == 0:
            yield str(path), b""


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise _BadDocument("too large", f"must be at most {MAX_DOCUMENT_BYTES:,} bytes, got more")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise _BadDocument("invalid UTF-8", f"must be UTF-8, got {got}") from None


def _parse(raw: bytes, path: Path, policy: Policy) -> Document:
    """One document out of its bytes, before cleaning; raises _BadDocument."""
    text = _decode(raw)
    if path.name.endswith(".txt"):
        return Document(text, policy.source or path.absolute().parent.name or "text", policy.lang or "und")
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _BadDocument("broken JSON", f"must be one JSON object a line, got {error}") from None
    if not isinstance(record, dict):
        raise _BadDocument("not an object", f"must be a JSON object, got {type(record).__name__}")
    if policy.text_field not in record:
        raise _BadDocument("no text", f'must have a field "{policy.text_field}", got {sorted(record)[:8]}')
    for name in (policy.text_field, "source", "lang"):
        missing = record.get(name) is None and name != policy.text_field  # null: as if it were not there
        if not missing and not isinstance(record[name], str):
            got = type(record[name]).__name__
            raise _BadDocument("field not a string", f'must have a string in "{name}", got {got}')
    stem = path.name.removesuffix(".zst").removesuffix(".jsonl")
    source = policy.source or record.get("source") or stem
    return Document(record[policy.text_field], source, policy.lang or record.get("lang") or "und")


def _clean(document: Document, policy: Policy, ledger: Ledger) -> Document:
    text = document.text
    if text.startswith("\ufeff"):
        ledger.removed_characters["byte order mark"] += 1
        text = text[1:]
    if policy.bidi == "drop":
        text, count = _BIDI.subn("", text)
        ledger.removed_characters["bidi control"] += count
    if "\x00" in text:
        raise _BadDocument("NUL", f"must not contain NUL, got one at character {text.index(chr(0)) + 1}")
    for name, value in (("text", text), ("source", document.source), ("lang", document.lang)):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            got = f"U+{ord(value[error.start]):04X} at character {error.start + 1} of its {name}"
            raise _BadDocument("lone surrogate", f"must be valid Unicode, got {got}") from None
    return Document(text, document.source, document.lang)


def read_documents(files: Sequence[Path], policy: Policy, ledger: Ledger) -> Iterator[Document]:
    """Clean, non-empty documents in file order, exact repeats left out; the ledger is complete at the end."""
    seen: set[bytes] = set()
    for path in files:
        for where, raw in _raw_documents(path):
            ledger.read += 1
            try:
                if not raw:
                    raise _BadDocument("empty file", "must not be empty, got 0 bytes")
                if not path.name.endswith(".txt") and not raw.strip():
                    ledger.dropped["blank line"] += 1
                    continue
                document = _clean(_parse(raw, path, policy), policy, ledger)
            except _BadDocument as bad:
                if policy.bad == "error":
                    raise ValueError(f"prepare: {where} {bad}") from None
                ledger.dropped[bad.reason] += 1
                continue
            digest = text_hash(document.text)
            if not document.text.strip():
                ledger.dropped["empty"] += 1
            elif digest in seen:
                ledger.dropped["repeat"] += 1
            else:
                seen.add(digest)
                ledger.used += 1
                yield document


def read_texts(inputs: Sequence[Path | str], **policy: Any) -> Iterator[str]:
    """The texts `prepare` would use, streamed: what to train a tokenizer on."""
    for document in read_documents(find_files(inputs), Policy(**policy), Ledger()):
        yield document.text


def text_hash(text: str) -> bytes:
    """A document's identity: 16 bytes of sha256 over its UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]

"""Documents out of .txt (one a file), .jsonl and .jsonl.zst (one a line), .parquet and .arrow (one a row) files.

A broken document (invalid UTF-8, bad JSON, no text, NUL, ...) is an error naming file and line, or with
bad="drop" a counted drop; a damaged file or an unknown kind of file is always an error. Empty documents and
exact repeats are always counted drops, near repeats with near_duplicates: repeats of a document that is used, never
of one that is itself dropped. A byte order mark is removed; bidi controls are removed (bidi="drop") or kept;
`normalize` names the rules for Hebrew (hebrew.py). No other character is touched. The ledger adds up:
read = used + dropped, with a line for every document dropped.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import zstandard

from ..files import file_sha256
from .duplicates import NearDuplicates
from .hebrew import BIDI_CONTROLS, check_normalization, normalize
from .ledger import NOWHERE, Ledger, Place
from .tables import TABLE_SUFFIXES, downloaded, rows

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", *TABLE_SUFFIXES)
MAX_ID_BYTES = 256
MIN_MAX_TOKENS = 16  # a character may take several
MAX_DOCUMENT_BYTES = 1 << 28  # 256 MiB: a line without end must not fill the memory


class _BadDocument(ValueError):
    """One document cannot be used: `reason` is its name in the ledger."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Policy:
    """What `prepare` does with text; part of a corpus's identity."""

    source: str | None = None
    lang: str | None = None
    text_field: str = "text"
    bidi: Literal["drop", "keep"] = "drop"
    bad: Literal["error", "drop"] = "error"
    normalize: str = "none"
    near_duplicates: float | None = None
    max_tokens: int | None = None
    long: Literal["error", "drop", "split"] = "error"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("bidi", ("drop", "keep")),
            ("bad", ("error", "drop")),
            ("long", ("error", "drop", "split")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"prepare: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_normalization("prepare", self.normalize)
        if self.normalize != "none" and self.bidi == "keep":
            raise ValueError(f"prepare: bidi must be 'drop' with normalize={self.normalize!r}, got 'keep'")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ValueError(
                f"prepare: near_duplicates must be above 0 and at most 1, got {self.near_duplicates}"
            )
        if self.max_tokens is None and self.long != "error":
            raise ValueError(f"prepare: max_tokens must be given with long={self.long!r}, got None")
        if self.max_tokens is not None and self.max_tokens < MIN_MAX_TOKENS:
            raise ValueError(f"prepare: max_tokens must be at least {MIN_MAX_TOKENS}, got {self.max_tokens}")
        for name in ("source", "lang", "text_field"):
            if getattr(self, name) == "":
                raise ValueError(f"prepare: {name} must not be empty, got ''")


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    lang: str
    place: Place = NOWHERE

    @cached_property
    def hash(self) -> bytes:
        return text_hash(self.text)


class Input(NamedTuple):
    """A file to read, and the source of those of its documents that name none."""

    path: Path
    source: str

    @property
    def label(self) -> str:
        """What of its path a corpus holds: the name, for .txt behind the folder's."""
        name = self.path.name
        return f"{self.path.absolute().parent.name}/{name}" if name.endswith(".txt") else name

    def identity(self, policy: Policy) -> list[str]:
        """What tells it from another input: label, content, and the source where the label does not say it."""
        folder, text, _ = self.label.partition("/")
        unsaid = text and policy.source is None and self.source != folder
        return [self.label, file_sha256(self.path), *([self.source] if unsaid else [])]


def find_files(inputs: Sequence[Path | str]) -> list[Input]:
    """The files to read: each input; for a folder (one that `datasets` saved too) every file below it that ends in
    one of SUFFIXES, sorted; for hf:NAME or hf:NAME@SPLIT what `datasets` downloads.

    The source is the file's name without ending. A folder's .txt files, often thousands of one document each, and the
    data-00000.arrow of `datasets` have the name of the folder they are in."""
    files: list[Input] = []
    for path in map(Path, inputs):
        if str(path).startswith("hf:"):
            files += map(_input, downloaded(str(path).removeprefix("hf:")))
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _is_input(p.name))
            if not found:
                raise ValueError(
                    f"prepare: folder must contain {', '.join(SUFFIXES)} files, got none in {path}"
                )
            files += [_input(file, of_folder=file.suffix == ".txt") for file in found]
        elif not path.is_file():
            raise ValueError(f"prepare: input must exist, got {path}")
        elif not path.name.endswith(SUFFIXES):
            raise ValueError(f"prepare: input must end in {', '.join(SUFFIXES)}, got {path}")
        else:
            files.append(_input(path))
    if not files:
        raise ValueError("prepare: inputs must name at least one file, got none")
    return files


def _input(path: Path, of_folder: bool = False) -> Input:
    stem = path.name.removesuffix(".zst").rpartition(".")[0]
    of_folder = of_folder or (path.suffix == ".arrow" and stem.startswith("data-"))
    return Input(path, (path.absolute().parent.name if of_folder else stem) or "text")


def _is_input(name: str) -> bool:
    return name.endswith(SUFFIXES) and not (name.startswith("cache-") and name.endswith(".arrow"))


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


Raw = bytes | dict[str, Any]


def raw_documents(path: Path, fields: Sequence[str]) -> Iterator[tuple[int | None, Raw]]:
    """(line, undecoded document): the whole of a .txt file, each line of a .jsonl file, each row of a table."""
    if path.name.endswith(TABLE_SUFFIXES):
        yield from enumerate(rows(path, fields), 1)
        return
    with path.open("rb") as file:
        if path.name.endswith(".txt"):
            yield None, file.read(MAX_DOCUMENT_BYTES + 1)
            return
        zst = path.name.endswith(".zst")
        lines = io.BufferedReader(_ZstdStream(file, path)) if zst else file
        number = 0
        while line := lines.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            yield number, line
            while line and not line.endswith(b"\n"):  # what is left of a line that is too large
                line = lines.readline(MAX_DOCUMENT_BYTES)
        if number == 0:
            yield None, b""


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise _BadDocument("too large", f"must be at most {MAX_DOCUMENT_BYTES:,} bytes, got more")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise _BadDocument("invalid UTF-8", f"must be UTF-8, got {got}") from None


def _parse(raw: Raw, file: Input, place: Place, policy: Policy) -> Document:
    """One document out of its bytes, before cleaning; raises _BadDocument."""
    if isinstance(raw, dict):
        record: Any = {k: _decode(value) if isinstance(value, bytes) else value for k, value in raw.items()}
    else:
        text = _decode(raw)
        if file.path.name.endswith(".txt"):
            return Document(text, policy.source or file.source, policy.lang or "und", place)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # Python's limit of digits is no JSONDecodeError
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
    source = policy.source or record.get("source") or file.source
    place = replace(place, id=_record_id(record.get("id")))
    return Document(record[policy.text_field], source, policy.lang or record.get("lang") or "und", place)


def _record_id(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise _BadDocument("bad id", f'must have a string or an integer in "id", got {type(value).__name__}')
    text = str(value)
    size = len(text.encode("utf-8", "surrogatepass"))
    if not 0 < size <= MAX_ID_BYTES or not text.isprintable():
        raise _BadDocument("bad id", f'must have 1..{MAX_ID_BYTES} printable bytes in "id", got {size} bytes')
    return text


def _clean(document: Document, policy: Policy, ledger: Ledger) -> Document:
    text = document.text
    if text.startswith("\ufeff"):
        ledger.removed_characters["byte order mark"] += 1
        text = text[1:]
    if policy.bidi == "drop":
        text, count = BIDI_CONTROLS.subn("", text)
        ledger.removed_characters["bidi control"] += count
    text, changes = normalize(text, policy.normalize)
    ledger.normalized += changes
    if "\x00" in text:
        raise _BadDocument("NUL", f"must not contain NUL, got one at character {text.index(chr(0)) + 1}")
    for name, value in (("text", text), ("source", document.source), ("lang", document.lang)):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            got = f"U+{ord(value[error.start]):04X} at character {error.start + 1} of its {name}"
            raise _BadDocument("lone surrogate", f"must be valid Unicode, got {got}") from None
    return replace(document, text=text)


def read_documents(files: Sequence[Input], policy: Policy, ledger: Ledger) -> Iterator[Document]:
    """Clean, non-empty documents in file order, repeats among them: Repeats leaves those out, once it is known what
    else is left out."""
    fields = (policy.text_field, "source", "lang", "id")
    for file in files:
        for line, raw in raw_documents(file.path, fields):
            ledger.read += 1
            place = Place(file.label, line, number=ledger.read)
            try:
                if not raw:
                    raise _BadDocument("empty file", "must not be empty, got 0 bytes")
                if isinstance(raw, bytes) and line is not None and not raw.strip():
                    ledger.drop("blank line", place, _raw_hash(raw))
                    continue
                document = _clean(_parse(raw, file, place, policy), policy, ledger)
            except _BadDocument as bad:
                if policy.bad == "error":
                    where = f"{file.path}" if line is None else f"{file.path}:{line}"
                    raise ValueError(f"prepare: {where} {bad}") from None
                ledger.drop(bad.reason, place, _raw_hash(raw))
                continue
            if document.text.strip():
                yield document
            else:
                ledger.drop("empty", document.place, document.hash)


class Repeats:
    """The documents that are used. What nothing else leaves out is asked for here, in file order."""

    def __init__(self, policy: Policy, ledger: Ledger) -> None:
        self._ledger = ledger
        self._near = None if policy.near_duplicates is None else NearDuplicates(policy.near_duplicates)
        self._used: dict[bytes, Place] = {}
        self._numbered: list[bytes] = []  # in the numbering of `_near`
        self._ids: set[str] = set()

    def drop(self, document: Document) -> bool:
        """Whether a used document has this very text, and it goes into the ledger as its repeat."""
        if document.hash in self._used:
            self._drop("repeat", document, document.hash)
        return document.hash in self._used

    def use(self, document: Document) -> bool:
        """Whether the document is used; if not, it goes into the ledger as an exact or near repeat of one that is."""
        if self.drop(document):
            return False
        found = None if self._near is None else self._near.add(document.text)
        if found is not None:
            self._drop("near repeat", document, self._numbered[found[0]], similarity=round(found[1], 3))
            return False
        self._numbered.append(document.hash)
        self._used[document.hash] = document.place
        if document.place.id is not None:
            self._ledger.repeated_ids += document.place.id in self._ids
            self._ids.add(document.place.id)
        self._ledger.used += 1
        return True

    def _drop(self, reason: str, document: Document, of: bytes, **more: Any) -> None:
        repeats = {**self._used[of].named(), "hash": of.hex()}
        self._ledger.drop(reason, document.place, document.hash, repeats=repeats, **more)


def _raw_hash(raw: Raw) -> bytes:
    return hashlib.sha256(raw if isinstance(raw, bytes) else repr(sorted(raw.items())).encode()).digest()[:16]


def read_texts(inputs: Sequence[Path | str], **policy: Any) -> Iterator[str]:
    """The texts `prepare` would use were none too long, streamed: what to train a tokenizer on."""
    ledger, chosen = Ledger(), Policy(**policy)
    repeats = Repeats(chosen, ledger)
    for document in read_documents(find_files(inputs), chosen, ledger):
        if repeats.use(document):
            yield document.text


def text_hash(text: str) -> bytes:
    """A document's identity: 16 bytes of sha256 over its UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:16]

"""A corpus: documents tokenised once into memory-mapped shards.

    prepare([Path("knesset.jsonl.zst"), Path("notes.txt")], Path("corpus"), tokenizer, lang="he")
    corpus = Corpus.open(Path("corpus"), tokenizer)

A document is its tokens and one end-of-text token, however long: the plan cuts it into rows, nothing is
truncated. documents.py says what happens to bad input, corpus.py what the folder holds. Memory while
preparing: one batch of text and some 200 bytes a document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from .corpus import DOCUMENT, EXTRA_FILES, FORMAT, VERSION, Corpus, index_fingerprint, read_index
from .documents import Document, Ledger, Policy, find_files, label, read_documents, read_texts, text_hash
from .files import file_sha256, fsync
from .hebrew import Normalization
from .tokenizer import Tokenizer

BATCH_CHARS = 1 << 20  # text handed to the tokenizer at once
__all__ = ["Corpus", "PrepareReport", "prepare", "read_texts"]

Counts = dict[str, dict[str, int]]


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did; reused means that the folder already held this very corpus."""

    folder: Path
    documents: int
    tokens: int
    bytes: int
    by_source: Counts
    by_lang: Counts
    read: int
    dropped: dict[str, int]
    removed_characters: dict[str, int]
    normalized: dict[str, int]
    fingerprint: str
    seconds: float
    reused: bool


def prepare(
    inputs: Sequence[Path | str],
    out: Path | str,
    tokenizer: Tokenizer,
    *,
    source: str | None = None,
    lang: str | None = None,
    text_field: str = "text",
    bidi: Literal["drop", "keep"] = "drop",
    bad: Literal["error", "drop"] = "error",
    normalize: Normalization = "none",
    near_duplicates: float | None = None,
    overwrite: bool = False,
    shard_tokens: int = 1 << 27,
) -> PrepareReport:
    """Tokenise `inputs` into the corpus folder `out`, which appears whole or not at all.

    Args:
        inputs: .txt, .jsonl, .jsonl.zst, .parquet, .arrow files, folders of them (one saved by `datasets` too), or
            hf:NAME[@SPLIT] for what `datasets` downloads.
        out: must not exist, or hold the corpus of exactly these inputs and options (then nothing is done), or
            hold any corpus with overwrite=True.
        source, lang: for every document; None: the record's own field, else the file's name without ending
            (the folder's name for .txt) and "und".
        text_field: the field of a .jsonl record that holds the text.
        bidi: direction marks and overrides (U+200E, U+202E, ...) are removed or kept.
        bad: a broken document stops everything, or is dropped and counted.
        normalize: "hebrew-v1" gives Hebrew one spelling (hebrew.py); "none" keeps the text.
        near_duplicates: drop a document whose 5-word runs overlap those of an earlier one by this Jaccard index or
            more (duplicates.py, 0.8 is usual). None: exact repeats alone, because the comparison takes a library.
        shard_tokens: a token file ends with the batch that reaches this many.
    Raises: ValueError naming the file and line, or the option; nothing is left behind.
    """
    began = time.perf_counter()
    out = Path(out)
    policy = Policy(source, lang, text_field, bidi, bad, normalize, near_duplicates)
    if shard_tokens < 1:
        raise ValueError(f"prepare: shard_tokens must be at least 1, got {shard_tokens}")
    files = find_files(inputs)
    request = {
        "tokenizer": tokenizer.fingerprint,
        "policy": asdict(policy),
        "shard_tokens": shard_tokens,
        "files": [[label(path), file_sha256(path)] for path in files],
    }
    if check_out(out) and _same_request(out, request, overwrite):
        return _report(Corpus.open(out, tokenizer), out, began, reused=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    old = scratch / "old"
    try:
        folder = scratch / "corpus"
        folder.mkdir()
        ledger = Ledger()
        _write(folder, read_documents(files, policy, ledger), tokenizer, ledger, request, shard_tokens)
        try:
            if out.exists():
                out.rename(old)  # killed between these two lines, the old corpus stays in `scratch`
            folder.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        fsync(out.parent)
    finally:
        if out.exists() or not old.exists():  # never the only copy of a corpus
            shutil.rmtree(scratch, ignore_errors=True)
    return _report(Corpus.open(out, tokenizer, verify=False), out, began, reused=False)


def check_out(out: Path) -> bool:
    """Whether `out` holds a corpus; raises if it holds anything else, which `prepare` would not replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "index.json").is_file():
        raise ValueError(f"prepare: out must be a new folder or an earlier corpus, got {out}")
    return True


def _same_request(out: Path, request: dict[str, Any], overwrite: bool) -> bool:
    """Whether the corpus `out` is the answer to `request` already; raises if it must not be replaced."""
    if overwrite:
        read_index(out)  # only a corpus is ever deleted
        return False
    earlier = read_index(out).get("request")
    if isinstance(earlier, dict) and isinstance(earlier.get("policy"), dict):
        earlier = {**earlier, "policy": {**asdict(Policy()), **earlier["policy"]}}  # options younger than it
    if earlier != request:
        raise ValueError(
            f"prepare: out must not hold another corpus (other inputs, options or tokenizer), got {out}; "
            "pass overwrite=True to replace it"
        )
    return True


def _report(corpus: Corpus, folder: Path, began: float, reused: bool) -> PrepareReport:
    index = corpus.index
    return PrepareReport(
        folder,
        len(corpus),
        corpus.num_tokens,
        int(corpus.num_bytes),
        index["by_source"],
        index["by_lang"],
        index["ledger"]["read"],
        index["ledger"]["dropped"],
        index["ledger"]["removed_characters"],
        index["ledger"].get("normalized", {}),
        corpus.fingerprint,
        time.perf_counter() - began,
        reused,
    )


# ------------------------------------------------------------------------------------------------ writing


class _Shards:
    """Appends batches of tokens to tokens-00000.bin, tokens-00001.bin, ..."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.entries: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def append(self, tokens: npt.NDArray[Any]) -> None:
        if self._file is None:
            self.entries.append({"file": f"tokens-{len(self.entries):05d}.bin", "tokens": 0})
            self._file = (self.folder / self.entries[-1]["file"]).open("xb")
            self._digest = hashlib.sha256()
        data = tokens.astype(self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.entries[-1]["tokens"] += len(tokens)
        if self.entries[-1]["tokens"] >= self.shard_tokens:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self.entries[-1]["sha256"] = self._digest.hexdigest()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _batches(documents: Iterable[Document]) -> Iterable[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _write(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    ledger: Ledger,
    request: dict[str, Any],
    shard_tokens: int,
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    shards = _Shards(folder, dtype, shard_tokens)
    sources: dict[str, int] = {}
    langs: dict[str, int] = {}
    records: list[npt.NDArray[Any]] = []
    record_ids: list[bytes] = []
    try:
        for batch in _batches(documents):
            ids = tokenizer.encode_batch([document.text for document in batch])
            kept = [(d, [*i, tokenizer.eos_id]) for d, i in zip(batch, ids, strict=True) if i]
            ledger.used -= len(batch) - len(kept)
            if len(kept) < len(batch):  # the tokenizer's own normaliser left nothing of them
                for document, tokens in zip(batch, ids, strict=True):
                    if not tokens:
                        ledger.drop("no tokens", document.place, text_hash(document.text))
            if not kept:
                continue
            record = np.zeros(len(kept), DOCUMENT)
            for row, (document, tokens) in zip(record, kept, strict=True):
                row["length"] = len(tokens)
                row["bytes"] = len(document.text.encode("utf-8"))
                row["source"] = sources.setdefault(document.source, len(sources))
                row["lang"] = langs.setdefault(document.lang, len(langs))
                record_ids.append((document.place.id or "").encode("utf-8"))
                row["hash"] = np.frombuffer(text_hash(document.text), np.uint8)
            records.append(record)
            flat = itertools.chain.from_iterable(tokens for _, tokens in kept)
            shards.append(np.fromiter(flat, np.int64, int(record["length"].sum())))
    finally:
        shards.close()
    if not records:
        raise ValueError(
            f"prepare: inputs must hold at least one usable document, got {ledger.read} read, "
            f"dropped {dict(ledger.dropped)}"
        )
    table = np.concatenate(records)
    table["offset"] = np.cumsum(table["length"]) - table["length"]
    _save_array(folder / "documents.npy", table)
    if any(record_ids):
        _save_array(folder / "ids.npy", np.array(record_ids))
    with (folder / "dropped.jsonl").open("xb") as file:
        file.writelines(f"{line}\n".encode() for line in ledger.lines)
        file.flush()
        os.fsync(file.fileno())
    index = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "dtype": dtype.str,
        "documents": {"count": len(table), "sha256": file_sha256(folder / "documents.npy")},
        "shards": shards.entries,
        "sources": list(sources),
        "langs": list(langs),
        "by_source": _count(table, "source", list(sources)),
        "by_lang": _count(table, "lang", list(langs)),
        "ledger": {
            "read": ledger.read,
            "used": ledger.used,
            "dropped": dict(sorted(ledger.dropped.items())),
            "removed_characters": {k: n for k, n in sorted(ledger.removed_characters.items()) if n},
            # only where there is any: other corpora keep the fingerprint they always had
            **({"normalized": dict(sorted(ledger.normalized.items()))} if ledger.normalized else {}),
            **({"repeated_ids": ledger.repeated_ids} if ledger.repeated_ids else {}),
        },
        "extra": {name: file_sha256(folder / name) for name in EXTRA_FILES if (folder / name).is_file()},
    }
    index = {**index, "fingerprint": index_fingerprint(index), "request": request}
    with (folder / "index.json").open("x", encoding="utf-8") as text:
        json.dump(index, text, ensure_ascii=False, indent=1)
        text.flush()
        os.fsync(text.fileno())
    fsync(folder)


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    with path.open("xb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _count(table: npt.NDArray[Any], column: str, names: list[str]) -> Counts:
    def total(weights: npt.NDArray[Any] | None) -> list[int]:
        return np.bincount(table[column], weights, len(names)).astype(np.int64).tolist()

    columns = zip(names, total(None), total(table["length"]), total(table["bytes"]), strict=True)
    return {name: {"documents": d, "tokens": t, "bytes": b} for name, d, t, b in columns}

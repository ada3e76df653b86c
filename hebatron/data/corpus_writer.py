"""Writing a corpus folder (corpus.py says what it holds): documents one by one, then the tables and the index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..files import file_sha256, fsync
from .corpus import DOCUMENT, EXTRA_FILES, FORMAT, VERSION, index_fingerprint

SHARD_TOKENS = 1 << 27
Counts = dict[str, dict[str, int]]


class CorpusWriter:
    """Files of one new corpus in an empty folder; nobody may read them before `finish`."""

    def __init__(self, folder: Path, tokenizer: dict[str, Any], shard_tokens: int = SHARD_TOKENS) -> None:
        """tokenizer: the index's entry (fingerprint, vocab_size, eos_id). shard_tokens: a token file ends with
        the document that reaches this many."""
        self._folder, self._tokenizer, self._shard_tokens = folder, tokenizer, shard_tokens
        self._dtype = np.dtype("<u2" if tokenizer["vocab_size"] <= 1 << 16 else "<u4")
        self._table = np.zeros(1024, DOCUMENT)
        self._ids: list[bytes] = []
        self._sources: dict[str, int] = {}
        self._langs: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self.count = 0

    def add(
        self, tokens: npt.ArrayLike, size: int, source: str, lang: str, digest: bytes, id: str | None
    ) -> None:
        """One document: its tokens with the end-of-text token, the UTF-8 bytes of its text, the text's hash."""
        data = np.asarray(tokens).astype(self._dtype)
        if self.count == len(self._table):
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        row = self._table[self.count]
        row["length"], row["bytes"] = len(data), size
        row["source"] = self._sources.setdefault(source, len(self._sources))
        row["lang"] = self._langs.setdefault(lang, len(self._langs))
        row["hash"] = np.frombuffer(digest, np.uint8)
        self._ids.append((id or "").encode("utf-8"))
        self.count += 1
        self._append(data)

    def _append(self, data: npt.NDArray[Any]) -> None:
        if self._file is None:
            self._shards.append({"file": f"tokens-{len(self._shards):05d}.bin", "tokens": 0})
            self._file = (self._folder / self._shards[-1]["file"]).open("xb")
            self._digest = hashlib.sha256()
        raw = data.tobytes()
        self._file.write(raw)
        self._digest.update(raw)
        self._shards[-1]["tokens"] += len(data)
        if self._shards[-1]["tokens"] >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """End the token file; what must be done even if `finish` is never reached."""
        if self._file is not None:
            self._shards[-1]["sha256"] = self._digest.hexdigest()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(
        self, ledger: dict[str, Any], dropped: Iterable[str], request: dict[str, Any], **more: Any
    ) -> str:
        """Write the tables and the index, all on the disk when it returns; the fingerprint.

        Args:
            ledger, request, more: entries of the index; request alone is not part of the fingerprint.
            dropped: the ledger's lines.
        """
        self.close()
        table, folder = self._table[: self.count], self._folder
        table["offset"] = np.cumsum(table["length"]) - table["length"]
        _save_array(folder / "documents.npy", table)
        if any(self._ids):
            _save_array(folder / "ids.npy", np.array(self._ids))
        with (folder / "dropped.jsonl").open("xb") as file:
            file.writelines(f"{line}\n".encode() for line in dropped)
            file.flush()
            os.fsync(file.fileno())
        index = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": self._tokenizer,
            "dtype": self._dtype.str,
            "documents": {"count": len(table), "sha256": file_sha256(folder / "documents.npy")},
            "shards": self._shards,
            "sources": list(self._sources),
            "langs": list(self._langs),
            "by_source": _count(table, "source", list(self._sources)),
            "by_lang": _count(table, "lang", list(self._langs)),
            "ledger": ledger,
            **more,
            "extra": {name: file_sha256(folder / name) for name in EXTRA_FILES if (folder / name).is_file()},
        }
        index = {**index, "fingerprint": index_fingerprint(index), "request": request}
        with (folder / "index.json").open("x", encoding="utf-8") as text:
            json.dump(index, text, ensure_ascii=False, indent=1)
            text.flush()
            os.fsync(text.fileno())
        fsync(folder)
        return str(index["fingerprint"])


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

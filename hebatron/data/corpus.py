"""Reading a corpus folder: documents over memory-mapped tokens, checked against the index's sha256.

The folder holds
    index.json          tokenizer, counts by source and language, the ledger, sha256 of the files below
    documents.npy       one DOCUMENT record each: where its tokens are, bytes, source, language, hash
    dropped.jsonl       the ledger's lines: one for every document left out, and why
    ids.npy             each record's "id", if any has one
    scores.safetensors  columns of numbers, one a document, that `data score` added later; not part of the identity
    tokens-00000.bin    little-endian uint16 (vocabulary up to 65,536) or uint32; no document crosses a shard
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..files import file_sha256, fsync
from ..tokenizer import Tokenizer

FORMAT, VERSION = "hebatron-corpus", 1
SCORES = "scores.safetensors"
DTYPES = ("<u2", "<u4")  # of token files
EXTRA_FILES = ("dropped.jsonl", "ids.npy")  # a corpus from before them has neither
DOCUMENT = np.dtype(
    [
        ("offset", "<i8"),  # first token, counted over all shards
        ("length", "<i8"),  # tokens, the end-of-text token included
        ("bytes", "<i8"),  # UTF-8 bytes of the text
        ("source", "<u4"),  # index into `sources`
        ("lang", "<u4"),  # index into `langs`
        ("hash", "u1", (16,)),  # first 16 bytes of the text's sha256
    ]
)


class Corpus:
    """Read-only documents over memory-mapped tokens; `select` and `split` give views of the same files."""

    def __init__(
        self,
        index: dict[str, Any],
        documents: npt.NDArray[Any],
        shards: list[npt.NDArray[Any]],
        fingerprint: str,
        ids: npt.NDArray[Any] | None = None,
        columns: dict[str, npt.NDArray[np.float64]] | None = None,
    ) -> None:
        self.index = index
        self.fingerprint = fingerprint
        self.sources: list[str] = index["sources"]
        self.langs: list[str] = index["langs"]
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.eos_id: int = index["tokenizer"]["eos_id"]
        self.tokenizer_fingerprint: str = index["tokenizer"]["fingerprint"]
        self._documents = documents
        self._ids = ids
        self.columns = columns or {}  # by `data score`: rarity, ..., difficulty; a number for every document
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])

    @classmethod
    def open(cls, folder: Path | str, tokenizer: Tokenizer | None = None, *, verify: bool = True) -> Corpus:
        """Open a folder that `prepare` wrote.

        Args:
            tokenizer: if given, must be the one the corpus was made with.
            verify: read every byte and compare with the sha256 of the index; False looks at sizes only.
        Raises: ValueError naming the file, what was expected and what is there.
        """
        folder = Path(folder)
        index = read_index(folder)
        made_with = index["tokenizer"]["fingerprint"]
        if tokenizer is not None and tokenizer.fingerprint != made_with:
            raise ValueError(
                f"Corpus.open: tokenizer must be the one {folder} was made with ({made_with[:12]}, "
                f"{index['tokenizer']['vocab_size']} entries), got {tokenizer.fingerprint[:12]} "
                f"({tokenizer.vocab_size} entries)"
            )
        if index.get("dtype") not in DTYPES:  # "O" would make addresses of what the files hold
            raise ValueError(
                f"Corpus.open: dtype must be one of {', '.join(DTYPES)}, got {index.get('dtype')!r} in {folder}"
            )
        dtype = np.dtype(index["dtype"])
        table_path = folder / "documents.npy"
        expected = [(table_path, None, index["documents"]["sha256"])]
        for number, shard in enumerate(index["shards"]):
            path = folder / f"tokens-{number:05d}.bin"  # never a name out of the index
            expected.append((path, shard["tokens"] * dtype.itemsize, shard["sha256"]))
        shard_paths = [path for path, _, _ in expected[1:]]
        extra = index.get("extra", {})
        expected += [(folder / name, None, extra[name]) for name in EXTRA_FILES if name in extra]
        for path, size, digest in expected:
            _check_file(path, size, digest if verify else None)
        documents = np.load(table_path, mmap_mode="r", allow_pickle=False)
        shards = [np.memmap(path, dtype, "r") for path in shard_paths]
        ids = np.load(folder / "ids.npy", mmap_mode="r", allow_pickle=False) if "ids.npy" in extra else None
        columns = read_scores(folder, index["fingerprint"], len(documents))
        corpus = cls(index, documents, list(shards), index["fingerprint"], ids, columns)
        corpus._check(folder, verify)
        return corpus

    def _check(self, folder: Path, verify: bool) -> None:
        table, tokens = self._documents, int(self._starts[-1])
        if table.dtype != DOCUMENT or table.shape != (self.index["documents"]["count"],) or not len(table):
            raise ValueError(
                f"Corpus.open: documents.npy must hold {self.index['documents']['count']} document records, "
                f"got shape {table.shape}, dtype {table.dtype} in {folder}"
            )
        ends = np.cumsum(table["length"])
        if (
            table["length"].min() < 1
            or ends[-1] != tokens
            or (ends - table["length"] != table["offset"]).any()
        ):
            raise ValueError(
                f"Corpus.open: documents must follow each other over {tokens} tokens, got a gap or overlap "
                f"in {folder}"
            )
        for name, bound in (("source", len(self.sources)), ("lang", len(self.langs))):
            if table[name].max() >= bound:
                raise ValueError(
                    f"Corpus.open: {name} must be under {bound}, got {table[name].max()} in {folder}"
                )
        if self._ids is not None and (self._ids.shape != table.shape or self._ids.dtype.kind != "S"):
            raise ValueError(
                f"Corpus.open: ids.npy must hold {len(table)} ids, got {self._ids.shape} in {folder}"
            )
        if verify:
            largest = max(int(shard.max()) for shard in self._shards)
            if largest >= self.vocab_size:
                raise ValueError(
                    f"Corpus.open: token ids must be under {self.vocab_size}, got {largest} in {folder}"
                )

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def num_tokens(self) -> int:
        return int(self._documents["length"].sum())

    @property
    def num_bytes(self) -> int:
        return int(self._documents["bytes"].sum())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every document, the end-of-text token included."""
        return np.ascontiguousarray(self._documents["length"], np.int64)

    @property
    def source_ids(self) -> npt.NDArray[np.int64]:
        """Every document's index into `sources`."""
        return np.ascontiguousarray(self._documents["source"], np.int64)

    def tokens(self, i: int) -> npt.NDArray[Any]:
        """Tokens of document i, the end-of-text token last: a read-only view, uint16 or uint32."""
        offset, length = int(self._documents["offset"][i]), int(self._documents["length"][i])
        shard = int(np.searchsorted(self._starts, offset, side="right")) - 1
        start = offset - int(self._starts[shard])
        return self._shards[shard][start : start + length]

    def byte_count(self, i: int) -> int:
        """UTF-8 bytes of document i's text."""
        return int(self._documents["bytes"][i])

    def hash(self, i: int) -> bytes:
        """First 16 bytes of the sha256 of document i's text."""
        return self._documents["hash"][i].tobytes()

    def id(self, i: int) -> str | None:
        """The "id" of document i's record; None where it had none."""
        return None if self._ids is None else bytes(self._ids[i]).decode("utf-8") or None

    def source(self, i: int) -> str:
        return self.sources[self._documents["source"][i]]

    @property
    def lang_ids(self) -> npt.NDArray[np.int64]:
        """Every document's index into `langs`."""
        return np.ascontiguousarray(self._documents["lang"], np.int64)

    def lang(self, i: int) -> str:
        return self.langs[self._documents["lang"][i]]

    def select(self, documents: npt.ArrayLike) -> Corpus:
        """A view of the documents with these indices (or True in this mask), in this order."""
        picked = np.asarray(documents)
        if picked.shape != (len(self),) and picked.dtype == bool:
            raise ValueError(f"Corpus.select: a mask must have shape ({len(self)},), got {picked.shape}")
        rows = np.flatnonzero(picked) if picked.dtype == bool else picked.astype(np.int64)
        if not len(rows) or rows.min() < 0 or rows.max() >= len(self):
            raise ValueError(
                f"Corpus.select: documents must be one or more of 0..{len(self) - 1}, got {rows.tolist()[:8]}"
            )
        digest = hashlib.sha256(self.fingerprint.encode() + rows.astype("<i8").tobytes()).hexdigest()
        ids = None if self._ids is None else self._ids[rows]
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Corpus(self.index, self._documents[rows], self._shards, digest, ids, columns)

    def held_out(self, held_out_permille: int) -> npt.NDArray[np.bool_]:
        """Which documents `split` holds out: a document's side depends on its own text alone."""
        if not 0 < held_out_permille < 1000:
            raise ValueError(
                f"Corpus.split: held_out_permille must be between 1 and 999, got {held_out_permille}"
            )
        leading = np.ascontiguousarray(self._documents["hash"][:, :8]).view("<u8")[:, 0]
        chosen: npt.NDArray[np.bool_] = leading % np.uint64(1000) < np.uint64(held_out_permille)
        return chosen

    def split(self, held_out_permille: int) -> tuple[Corpus, Corpus]:
        """(training view, held-out view)."""
        held_out = self.held_out(held_out_permille)
        if held_out.all() or not held_out.any():
            raise ValueError(
                f"Corpus.split: held_out_permille must leave documents on both sides, got {held_out_permille} "
                f"with {int(held_out.sum())} of {len(self)} held out"
            )
        return self.select(~held_out), self.select(held_out)


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"Corpus.open: folder must contain index.json, got {folder}")
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"Corpus.open: {path} must be JSON, got {error}") from error
    kind = (index.get("format"), index.get("version")) if isinstance(index, dict) else None
    if kind != (FORMAT, VERSION):
        raise ValueError(f"Corpus.open: {path} must be {FORMAT} version {VERSION}, got {kind}")
    if index_fingerprint(index) != index.get("fingerprint"):
        raise ValueError(f"Corpus.open: {path} must match its fingerprint, got an edited or damaged index")
    return index


def _check_file(path: Path, size: int | None, digest: str | None) -> None:
    if not path.is_file():
        raise ValueError(f"Corpus.open: {path} must exist, got nothing")
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"Corpus.open: {path} must have {size} bytes, got {path.stat().st_size}")
    if digest is not None and (actual := file_sha256(path)) != digest:
        raise ValueError(f"Corpus.open: {path} must have sha256 {digest[:12]}..., got {actual[:12]}...")


def index_fingerprint(index: dict[str, Any]) -> str:
    """sha256 of what a corpus is; how it was asked for, its ids and the ledger's lines are left out."""
    content = {key: value for key, value in index.items() if key not in ("fingerprint", "request", "extra")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_scores(folder: Path, fingerprint: str, count: int) -> dict[str, npt.NDArray[np.float64]]:
    """The columns `write_scores` left, or none; raises if they belong to another corpus or are damaged."""
    path = folder / SCORES
    if not path.exists():
        return {}
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            columns = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"Corpus.open: {path} must be safetensors, got {error}") from error
    if metadata.get("corpus") != fingerprint or any(c.shape != (count,) for c in columns.values()):
        raise ValueError(
            f"Corpus.open: {path} must belong to this corpus, got another's; run data score again"
        )
    if metadata.get("sha256") != _columns_sha256(columns):
        raise ValueError(
            f"Corpus.open: {path} must match its sha256, got a damaged file; run data score again"
        )
    return columns


def write_scores(folder: Path, columns: dict[str, npt.NDArray[np.float64]], method: dict[str, Any]) -> None:
    """Put columns (one float64 a document) beside the corpus in `folder`, in place of earlier ones, atomically."""
    index = read_index(folder)
    count = index["documents"]["count"]
    for name, values in columns.items():
        if values.shape != (count,) or values.dtype != np.float64 or not np.isfinite(values).all():
            raise ValueError(
                f"write_scores: {name} must be {count} finite float64, got {values.shape} {values.dtype}"
            )
    metadata = {
        "corpus": index["fingerprint"],
        "method": json.dumps(method, sort_keys=True),
        "sha256": _columns_sha256(columns),
    }
    scratch = folder / f".{SCORES}.{os.getpid()}"
    try:
        save_file(columns, scratch, metadata)
        fsync(scratch)
        scratch.replace(folder / SCORES)
        fsync(folder)
    finally:
        scratch.unlink(missing_ok=True)


def _columns_sha256(columns: dict[str, npt.NDArray[np.float64]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(name.encode() + b"\0" + columns[name].tobytes())
    return digest.hexdigest()

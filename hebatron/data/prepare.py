"""A corpus: documents tokenised once into memory-mapped shards.

    prepare([Path("knesset.jsonl.zst"), Path("notes.txt")], Path("corpus"), tokenizer, lang="he")
    corpus = Corpus.open(Path("corpus"), tokenizer)

A document is its tokens and one end-of-text token, however long: the plan cuts it into rows, nothing is
truncated. With `max_tokens` a longer one is an error, a counted drop, or split into documents that share its id
and its hash, so that all of them are on one side of `Corpus.split`. documents.py says what happens to bad input,
corpus.py what the folder holds. Memory while preparing: one batch of text and some 200 bytes a document.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..files import new_folder
from ..tokenizer import Tokenizer
from .corpus import Corpus, read_index
from .corpus_writer import SHARD_TOKENS, CorpusWriter, Counts
from .documents import Document, Policy, Repeats, find_files, read_documents, read_texts
from .hebrew import Normalization
from .ledger import Ledger

BATCH_CHARS = 1 << 20  # text handed to the tokenizer at once
__all__ = ["Corpus", "PrepareReport", "prepare", "read_texts"]


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
    used: int
    dropped: dict[str, int]
    split: dict[str, int]  # documents split, and the pieces they became
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
    max_tokens: int | None = None,
    long: Literal["error", "drop", "split"] = "error",
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> PrepareReport:
    """Tokenise `inputs` into the corpus folder `out`, which appears whole or not at all.

    Args:
        inputs: .txt, .jsonl, .jsonl.zst, .parquet, .arrow files, folders of them (one saved by `datasets` too), or
            hf:NAME[@SPLIT] for what `datasets` downloads.
        out: must not exist, or hold the corpus of exactly these inputs and options (then nothing is done), or
            hold any corpus with overwrite=True.
        source, lang: for every document; None: the record's own field, else the file's name without ending
            (for the .txt files of a folder given its name) and "und".
        text_field: the field of a .jsonl record that holds the text.
        bidi: direction marks and overrides (U+200E, U+202E, ...) are removed or kept.
        bad: a broken document stops everything, or is dropped and counted.
        normalize: "hebrew-v1" gives Hebrew one spelling (hebrew.py); "none" keeps the text.
        near_duplicates: drop a document whose 5-word runs overlap those of an earlier one by this Jaccard index or
            more (duplicates.py, 0.8 is usual). None: exact repeats alone, because the comparison takes a library.
        max_tokens: of a document, the end-of-text token included. None: no limit.
        long: what a longer one does: stop everything, be dropped and counted, or be split at line ends.
        shard_tokens: a token file ends with the document that reaches this many.
    Raises: ValueError naming the file and line, or the option; nothing is left behind.
    """
    began = time.perf_counter()
    out = Path(out)
    policy = Policy(source, lang, text_field, bidi, bad, normalize, near_duplicates, max_tokens, long)
    if shard_tokens < 1:
        raise ValueError(f"prepare: shard_tokens must be at least 1, got {shard_tokens}")
    files = find_files(inputs)
    request = {
        "tokenizer": tokenizer.fingerprint,
        "policy": asdict(policy),
        "shard_tokens": shard_tokens,
        "files": [file.identity(policy) for file in files],
    }
    if check_out(out) and _same_request(out, request, overwrite):
        return _report(Corpus.open(out, tokenizer), out, began, reused=True)
    with new_folder(out) as folder:
        ledger = Ledger()
        told = {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        }
        writer = CorpusWriter(folder, told, shard_tokens)
        _write(writer, read_documents(files, policy, ledger), tokenizer, policy, ledger, request)
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
        index["ledger"]["used"],
        index["ledger"]["dropped"],
        index["ledger"].get("split", {}),
        index["ledger"]["removed_characters"],
        index["ledger"].get("normalized", {}),
        corpus.fingerprint,
        time.perf_counter() - began,
        reused,
    )


# ------------------------------------------------------------------------------------------------ writing


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
    writer: CorpusWriter,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    policy: Policy,
    ledger: Ledger,
    request: dict[str, Any],
) -> None:
    repeats = Repeats(policy, ledger)
    try:
        for batch in _batches(documents):
            batch = [document for document in batch if not repeats.drop(document)]  # not worth tokenising
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                reason = _unusable(ids, policy)
                if reason is not None:
                    ledger.drop(reason, document.place, document.hash)
                elif repeats.use(document):
                    for size, piece in _pieces(document, ids, tokenizer, policy, ledger):
                        writer.add(
                            [*piece, tokenizer.eos_id],
                            size,
                            document.source,
                            document.lang,
                            document.hash,
                            document.place.id,
                        )
    finally:
        writer.close()
    if not writer.count:
        raise ValueError(
            f"prepare: inputs must hold at least one usable document, got {ledger.read} read, "
            f"dropped {dict(ledger.dropped)}"
        )
    writer.finish(ledger.totals(), ledger.lines, request)


def _unusable(ids: list[int], policy: Policy) -> str | None:
    """Why a document of these tokens is dropped, or None."""
    if not ids:
        return "no tokens"  # the tokenizer's own normaliser left nothing of it
    long = policy.long == "drop" and policy.max_tokens is not None and len(ids) >= policy.max_tokens
    return "too long" if long else None


def _pieces(
    document: Document, ids: list[int], tokenizer: Tokenizer, policy: Policy, ledger: Ledger
) -> list[tuple[int, list[int]]]:
    """(UTF-8 bytes, tokens) of each document of the corpus that this one becomes: one, or as policy.long says."""
    limit = policy.max_tokens
    if limit is None or len(ids) < limit:
        return [(len(document.text.encode("utf-8")), ids)]
    if policy.long == "error":
        raise ValueError(
            f"prepare: {document.place.name} must have at most max_tokens = {limit} tokens with its end, got "
            f'{len(ids) + 1}; choose long="split" or "drop"'
        )
    pieces = split_tokens(document.text, tokenizer, limit - 1)
    ledger.split += Counter(documents=1, pieces=len(pieces))
    return [(len(text.encode("utf-8")), tokens) for text, tokens in pieces]


def split_tokens(text: str, tokenizer: Tokenizer, limit: int) -> list[tuple[str, list[int]]]:
    """`text` in pieces of at most `limit` tokens that give it back when joined, and their tokens.

    A piece ends behind the last line break in its second half, or else between words there, or else anywhere but
    inside a character.
    """
    ids, offsets = tokenizer.encode_with_offsets(text, special=False)
    pieces: list[tuple[str, list[int]]] = []
    begin = char = 0
    while len(ids) - begin > limit:
        whole = [at for at in range(begin + limit, begin, -1) if offsets[at][0] >= offsets[at - 1][1] > char]
        ends = {at: offsets[at - 1][1] for at in whole}
        half = [at for at in whole if at - begin > limit // 2]
        lines = [at for at in half if text[ends[at] - 1] == "\n"]
        words = [at for at in half if text[ends[at] - 1].isspace() or text[ends[at]].isspace()]
        if not whole:
            raise ValueError(f"prepare: max_tokens must be enough for one character, got {limit + 1}")
        cut = (lines or words or whole)[0]
        pieces.append((text[char : ends[cut]], ids[begin:cut]))
        begin, char = cut, ends[cut]
    return [*pieces, (text[char:], ids[begin:])]

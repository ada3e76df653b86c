"""A scored corpus cut into corpora of their own by a column: phases by difficulty that a run file can name.

    split_corpus(Path("corpora/he"), Path("corpora/he-phases"), "difficulty", [1, 1, 1])

writes part-1 (the lowest values) to part-3, each a corpus with its own hash and its documents' columns. A document
is in exactly one part; the parts share the tokens as the shares say, to within half a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import fsync, new_folder
from ..spelling import did_you_mean
from .corpus import Corpus, read_index, write_scores
from .corpus_writer import CorpusWriter
from .difficulty import split_phases


@dataclass(frozen=True)
class Part:
    """One of the corpora: where it is, what it holds, the lowest and the highest value of the column in it."""

    folder: Path
    documents: int
    tokens: int
    low: float
    high: float


def split_corpus(folder: Path, out: Path, by: str, shares: Sequence[float]) -> list[Part]:
    """Cut the corpus in `folder` by its column `by`, lowest values first, into a part for each of `shares`.

    Args:
        out: a new or empty folder; it appears whole, with all parts, or not at all.
    Raises: ValueError for a column the corpus does not have, a bad share, a part without a document.
    """
    corpus = Corpus.open(folder)
    if by not in corpus.columns:
        known = ", ".join(corpus.columns) or "none: run hebatron data score first"
        raise ValueError(
            f"data split: --by must name a column of {folder} ({known}), got {by!r}{did_you_mean(by, corpus.columns)}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"data split: --out must be a new or empty folder, got {out}")
    values = corpus.columns[by]
    part_of = split_phases(values, corpus.lengths, shares)
    views = []
    for part in range(len(shares)):
        if not (part_of == part).any():
            raise ValueError(
                f"data split: every part must hold a document, got none in part {part + 1} of {len(shares)} "
                f"from {len(corpus)} documents with shares {list(shares)}"
            )
        views.append(corpus.select(part_of == part))
    method = {"by": by, "shares": [float(share) for share in shares]}
    with new_folder(out) as scratch:
        for number, view in enumerate(views, 1):
            _write_part(scratch / f"part-{number}", view, {**method, "part": number})
        fsync(scratch)
    return [
        Part(
            out / f"part-{number}",
            len(view),
            view.num_tokens,
            float(view.columns[by].min()),
            float(view.columns[by].max()),
        )
        for number, view in enumerate(views, 1)
    ]


def _write_part(folder: Path, view: Corpus, method: dict[str, Any]) -> None:
    folder.mkdir()
    writer = CorpusWriter(folder, view.index["tokenizer"])
    try:
        for i in range(len(view)):
            writer.add(
                view.tokens(i), view.byte_count(i), view.source(i), view.lang(i), view.hash(i), view.id(i)
            )
    finally:
        writer.close()
    # The corpus it was cut from accounts for what was read and dropped.
    ledger = {"read": len(view), "used": len(view), "dropped": {}, "removed_characters": {}}
    origin = {**method, "corpus": view.index["fingerprint"]}
    writer.finish(ledger, [], {"origin": origin}, origin=origin)
    write_scores(folder, view.columns, {**method, "of": read_index(folder)["fingerprint"]})

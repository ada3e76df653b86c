"""What a corpus holds, as one object for JSON: what to look at before training on it."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..tokenizer import Tokenizer
from .corpus import Corpus
from .difficulty import document_text, words
from .hebrew import POINTS

SAMPLE_CHARS, EXAMPLES = 300, 5
_CHARACTERS = {
    "hebrew": re.compile("[\u05d0-\u05ea\u05ef-\u05f2\ufb1d-\ufb4f]"),
    "latin": re.compile("[A-Za-z\u00c0-\u024f]"),
    "digits": re.compile(r"\d"),
    "points": POINTS,
    "replacement": re.compile("\ufffd"),  # what is left of a text that was decoded wrongly
}


def inspect_corpus(corpus: Corpus, tokenizer: Tokenizer | None = None, samples: int = 3) -> dict[str, Any]:
    """Counts, lengths, ledger, difficulty; with the corpus's tokenizer also words, letters, near-duplicates, samples.

    near_duplicates is None without a tokenizer or without datasketch, which compares the texts.
    """
    found: dict[str, Any] = {
        "fingerprint": corpus.fingerprint,
        "tokenizer": {"fingerprint": corpus.tokenizer_fingerprint, "vocab_size": corpus.vocab_size},
        "documents": len(corpus),
        "tokens": corpus.num_tokens,
        "bytes": corpus.num_bytes,
        "sources": {name: _of(corpus, corpus.source_ids == i) for i, name in enumerate(corpus.sources)},
        "languages": {name: _of(corpus, corpus.lang_ids == i) for i, name in enumerate(corpus.langs)},
        "lengths": _histogram(corpus.lengths),
        "ledger": corpus.index["ledger"],
        "exact_duplicates": len(corpus) - len({corpus.hash(i) for i in range(len(corpus))}),
        "near_duplicates": None,
        "samples": [],
    }
    if tokenizer is not None:
        for lang, counts in _texts(corpus, tokenizer).items():
            found["languages"][lang] |= counts
        if importlib.util.find_spec("datasketch") is not None:
            found["near_duplicates"] = _near(corpus, tokenizer)
        for i in sorted(range(len(corpus)), key=corpus.hash)[:samples]:  # any order, always the same
            text = document_text(corpus, tokenizer, i)[:SAMPLE_CHARS]
            found["samples"].append(
                {"document": i, "id": corpus.id(i), "source": corpus.source(i), "text": text}
            )
    return found


def _of(corpus: Corpus, inside: npt.NDArray[np.bool_]) -> dict[str, Any]:
    lengths = corpus.lengths[inside]
    return {
        "documents": int(inside.sum()),
        "tokens": int(lengths.sum()),
        "bytes": sum(corpus.byte_count(int(i)) for i in np.flatnonzero(inside)),
        "length_quantiles": np.quantile(lengths, (0.05, 0.5, 0.95, 1)).astype(int).tolist(),
        "columns": {
            name: np.quantile(values[inside], (0.05, 0.5, 0.95)).tolist()
            for name, values in corpus.columns.items()
        },
    }


def _histogram(lengths: npt.NDArray[np.int64]) -> list[dict[str, int]]:
    """Documents and tokens by length, in octaves; the empty ones at both ends left out."""
    octave = np.log2(lengths).astype(int)
    return [
        {
            "from": 1 << k,
            "below": 2 << k,
            "documents": int((octave == k).sum()),
            "tokens": int(lengths[octave == k].sum()),
        }
        for k in range(octave.min(), octave.max() + 1)
    ]


def _texts(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """By language: words, tokens a word, and of which characters the text is made."""
    totals: dict[str, Counter[str]] = {lang: Counter() for lang in corpus.langs}
    for i in range(len(corpus)):
        text, total = document_text(corpus, tokenizer, i), totals[corpus.lang(i)]
        total["characters"] += len(text)
        total["words"] += len(words(text))
        total["tokens"] += len(corpus.tokens(i))
        found = {name: len(pattern.findall(text)) for name, pattern in _CHARACTERS.items()}
        total.update(found)
        total["pointed_documents"] += found["points"] > 0.1 * found["hebrew"]
    return {
        lang: {
            "words": total["words"],
            "tokens_per_word": total["tokens"] / max(total["words"], 1),
            **{name: total[name] / max(total["characters"], 1) for name in ("hebrew", "latin", "digits")},
            "points_per_hebrew_letter": total["points"] / max(total["hebrew"], 1),
            "pointed_documents": total["pointed_documents"],
            "replacement_characters": total["replacement"],
        }
        for lang, total in totals.items()
    }


def _near(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    from .duplicates import DEFAULT_THRESHOLD, NearDuplicates

    near = NearDuplicates()
    kept: list[int] = []
    pairs: list[dict[str, Any]] = []
    by_source: Counter[str] = Counter()
    for i in range(len(corpus)):
        found = near.add(document_text(corpus, tokenizer, i))
        if found is None:
            kept.append(i)
            continue
        by_source[corpus.source(i)] += 1
        pairs.append({"document": i, "repeats": kept[found[0]], "similarity": round(found[1], 3)})
    return {
        "threshold": DEFAULT_THRESHOLD,
        "documents": len(pairs),
        "by_source": dict(by_source),
        "examples": pairs[:EXAMPLES],
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The object as `hebatron data inspect` prints it; texts on lines of their own."""
    from ..training.metrics import printable, printable_name

    yield f"{found['documents']:,} documents, {found['tokens']:,} tokens, {found['bytes']:,} bytes"
    by_size = sorted(found["sources"].items(), key=lambda item: -item[1]["tokens"])
    quantiles = f"{'5 %':>8}{'50 %':>8}{'95 %':>8}{'longest':>10}"
    yield f"\n{'documents':>11}{'tokens':>15}{'share':>8}{'B/token':>9}{quantiles}  source"
    for name, source in by_size:
        low, middle, high, longest = source["length_quantiles"]
        yield (
            f"{source['documents']:>11,}{source['tokens']:>15,}{source['tokens'] / found['tokens']:>8.1%}"
            f"{source['bytes'] / source['tokens']:>9.2f}{low:>8,}{middle:>8,}{high:>8,}{longest:>10,}  "
            f"{printable_name(name)}"
        )
        for column, (low, middle, high) in source["columns"].items():
            yield f"{'':>13}{column:<15} (5 %, 50 %, 95 %) {low:.3f} {middle:.3f} {high:.3f}"
    yield "\ntokens of a document: documents, share of all tokens"
    most = max(octave["documents"] for octave in found["lengths"])
    for octave in found["lengths"]:
        bar = "#" * round(40 * octave["documents"] / most)
        span = f"{octave['from']:,} to {octave['below'] - 1:,}"
        yield f"{span:>24}{octave['documents']:>11,}{octave['tokens'] / found['tokens']:>8.1%}  {bar}".rstrip()
    ledger = found["ledger"]
    dropped = sum(ledger["dropped"].values())
    yield f"\nledger: {ledger['read']:,} read = {ledger['used']:,} used + {dropped:,} dropped"
    for name in ("dropped", "split", "removed_characters", "normalized", "repeated_ids"):
        if ledger.get(name):
            yield f"  {name}: {ledger[name]}"
    yield f"exact duplicates: {found['exact_duplicates']:,}"
    near = found["near_duplicates"]
    if near is None:
        read = any("words" in counts for counts in found["languages"].values())
        needed = 'pip install "hebatron[data]"' if read else "give --tokenizer"
        yield f"near-duplicates: not compared; {needed}"
    else:
        share = near["documents"] / found["documents"]
        yield f"near-duplicates at {near['threshold']}: {near['documents']:,} documents ({share:.1%})"
        for pair in near["examples"]:
            yield f"  document {pair['document']} repeats {pair['repeats']}, similarity {pair['similarity']}"
    for lang, counts in found["languages"].items():
        if "words" in counts:
            yield (
                f"{printable_name(lang)}: {counts['words']:,} words, {counts['tokens_per_word']:.3f} tokens per word"
            )
            yield (
                f"  letters: {counts['hebrew']:.1%} Hebrew, {counts['latin']:.1%} Latin; {counts['digits']:.1%} "
                f"digits; {counts['points_per_hebrew_letter']:.3f} points a Hebrew letter, "
                f"{counts['pointed_documents']:,} pointed documents; "
                f"{counts['replacement_characters']:,} replacement characters (U+FFFD)"
            )
    for sample in found["samples"]:
        name, source = printable_name(sample["id"] or "no id"), printable_name(sample["source"])
        yield f"\ndocument {sample['document']}, {name}, {source}:"
        yield printable(sample["text"])

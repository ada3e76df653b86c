"""How hard a document is to read, by four measures of its text, and one score out of them.

    rarity          mean of -log2 of each word's share of the other documents in its language (add-one smoothed)
    sentence_words  mean words a sentence; . ! ? and line ends close one
    mattr           different words over words, mean over windows of 50 (the whole of a shorter text)
    zstd_bits       compressed bits a character, mean over pieces of 2,000 characters, so that length does not count
    difficulty      mean of the four ranks within the language, from 0 (easiest) to 1

Ranks, not z-scores: rarity and sentence length have long tails, where one document would outweigh a measure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import zstandard

from .corpus import Corpus
from .hebrew import strip_points
from .tokenizer import Tokenizer

MEASURES = ("rarity", "sentence_words", "mattr", "zstd_bits")
WINDOW_WORDS, PIECE_CHARS = 50, 2000
_WORD = re.compile(r"[^\W\d_]+(?:[\"'\u05f3\u05f4\u2019\u201d][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?\u05c3\n]+")
Floats = npt.NDArray[np.float64]


def words(text: str) -> list[str]:
    return _WORD.findall(strip_points(text).casefold())


def sentence_words(text: str) -> float:
    counts = [len(words(sentence)) for sentence in _SENTENCE_END.split(text)]
    counts = [count for count in counts if count]
    return sum(counts) / len(counts) if counts else 0.0


def mattr(tokens: Sequence[str]) -> float:
    """Moving-average type-token ratio; 0 without words."""
    if not tokens:
        return 0.0
    window = min(WINDOW_WORDS, len(tokens))
    inside = Counter(tokens[:window])
    total = len(inside)
    for leaving, entering in zip(tokens, tokens[window:], strict=False):
        inside[leaving] -= 1
        if not inside[leaving]:
            del inside[leaving]
        inside[entering] += 1
        total += len(inside)
    return total / (len(tokens) - window + 1) / window


def zstd_bits(text: str) -> float:
    compressor = zstandard.ZstdCompressor(level=3)
    pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
    return 8 * sum(len(compressor.compress(piece.encode("utf-8"))) for piece in pieces) / max(len(text), 1)


def measure(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Floats]:
    """Every measure and the score, one number a document; the text is decoded twice, never held whole."""
    columns: dict[str, Floats] = {name: np.zeros(len(corpus)) for name in MEASURES}
    counts: dict[str, Counter[str]] = {lang: Counter() for lang in corpus.langs}
    for i in range(len(corpus)):
        counts[corpus.lang(i)].update(words(document_text(corpus, tokenizer, i)))
    totals = {lang: counter.total() for lang, counter in counts.items()}
    for i in range(len(corpus)):
        text = document_text(corpus, tokenizer, i)
        tokens, lang = words(text), corpus.lang(i)
        if tokens:
            own = Counter(tokens)
            others = totals[lang] - len(tokens) + len(counts[lang])
            bits = sum(n * np.log2(others / (counts[lang][w] - n + 1)) for w, n in own.items())
            columns["rarity"][i] = bits / len(tokens)
        columns["sentence_words"][i] = sentence_words(text)
        columns["mattr"][i] = mattr(tokens)
        columns["zstd_bits"][i] = zstd_bits(text)
    return {**columns, "difficulty": combine(columns, corpus.lang_ids)}


def document_text(corpus: Corpus, tokenizer: Tokenizer, i: int) -> str:
    return tokenizer.decode(corpus.tokens(i)[:-1].tolist())


def combine(columns: dict[str, Floats], groups: npt.NDArray[np.int64]) -> Floats:
    """Mean over the columns of each document's rank in its group, ties sharing theirs, scaled to 0..1."""
    score = np.zeros(len(groups))
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        for values in columns.values():
            _, place, count = np.unique(values[rows], return_inverse=True, return_counts=True)
            ranks = np.cumsum(count) - (count + 1) / 2
            score[rows] += ranks[place] / max(len(rows) - 1, 1)
    return score / len(columns)


def split_phases(
    score: Floats, tokens: npt.NDArray[np.int64], weights: Sequence[float]
) -> npt.NDArray[np.int64]:
    """Each document's phase: easiest first, phases sharing the tokens as `weights`; off by half a document at most.

    Raises: ValueError unless every weight is positive and finite.
    """
    parts = np.asarray(weights, np.float64)
    if not len(parts) or not np.isfinite(parts).all() or (parts <= 0).any():
        raise ValueError(f"split_phases: weights must be one or more positive numbers, got {list(weights)}")
    order = np.argsort(score, kind="stable")
    middle = np.cumsum(tokens[order]) - tokens[order] / 2
    bounds = np.cumsum(parts)[:-1] / parts.sum() * tokens.sum()
    phases = np.empty(len(order), np.int64)
    phases[order] = np.searchsorted(bounds, middle, side="right")
    return phases

"""How hard a document is to read, by measures of its text, and one score out of them.

    rarity          mean of -log2 of each word's share of the other documents in its language (add-one smoothed)
    sentence_words  mean words a sentence; . ! ? and line ends close one
    mattr           different words over words, mean over windows of 50 (the whole of a shorter text)
    zstd_bits       compressed bits a character, mean over pieces of 2,000 characters
    model_bits      a small model's bits a character, mean over pieces of up to 512 tokens that know nothing of each
                    other; with a model only. The first token, which nothing precedes, and the end of the text,
                    whose cost does not grow with it, are not counted
    difficulty      weighted mean of the ranks within the language, from 0 (easiest) to 1; every weight is 1
                    unless another is given

The last three measures depend on the length of a short text, whatever it says: they are corrected for it, language
by language (length_effect.py). Ranks, not z-scores: rarity and sentence length have long tails, where one document
would outweigh a measure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import zstandard

from ..spelling import did_you_mean
from ..tokenizer import Tokenizer
from .corpus import Corpus
from .hebrew import strip_points
from .length_effect import Floats, LengthEffect, cut_values, mean_of_pieces
from .model_bits import model_bits

if TYPE_CHECKING:  # measuring text alone does not wait for torch
    from ..model import Hebatron

MEASURES = ("rarity", "sentence_words", "mattr", "zstd_bits", "model_bits")
SCORE = "difficulty"
METHOD = "ranks-v2"  # v1: without a model, not corrected for length
WINDOW_WORDS, PIECE_CHARS = 50, 2000
WORD_CUTS = (4, 6, 8, 12, 18, 25, 35, WINDOW_WORDS)
CHAR_CUTS = (15, 20, 30, 40, 60, 90, 125, 180, 250, 350, 500, 700, 1000, 1400, PIECE_CHARS)
CUT_DOCUMENTS = 200  # of each language are measured at every length
_WORD = re.compile(r"[^\W\d_]+(?:[\"'\u05f3\u05f4\u2019\u201d][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?\u05c3\n]+")


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
    """Compressed bits a character of one piece; 0 for an empty one."""
    compressed = zstandard.ZstdCompressor(level=3).compress(text.encode("utf-8"))
    return 8 * len(compressed) / len(text) if text else 0.0


def document_text(corpus: Corpus, tokenizer: Tokenizer, i: int) -> str:
    return tokenizer.decode(corpus.tokens(i)[:-1].tolist())


# ---------------------------------------------------------------- a corpus


def measure(
    corpus: Corpus,
    tokenizer: Tokenizer,
    model: Hebatron | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    model_tokens: int | None = None,
    correct_length: bool = True,
    kept: Path | None = None,
    report: Callable[[int], None] = lambda documents: None,
) -> dict[str, Floats]:
    """Every measure and the score, one number a document; the text is decoded twice, never held whole.

    Args:
        model: adds model_bits; its tokenizer must be the corpus's.
        weights: of measures in the score, 1 for those not named.
        model_tokens: of each document, from its beginning, for model_bits; None: all.
        correct_length: False leaves the measures as they are.
        kept, report: of the model's reading, as in `model_bits`.
    Raises: ValueError for a weight that is not finite and >= 0, or of no measure; all of them 0.
    """
    names = [name for name in MEASURES if name != "model_bits" or model is not None]
    chosen = score_weights(names, weights or {})
    columns = {name: np.zeros(len(corpus)) for name in names}
    counts: dict[str, Counter[str]] = {lang: Counter() for lang in corpus.langs}
    sizes = np.zeros((2, len(corpus)))  # words and characters
    for i in range(len(corpus)):
        text = document_text(corpus, tokenizer, i)
        tokens = words(text)
        counts[corpus.lang(i)].update(tokens)
        sizes[:, i] = len(tokens), len(text)
    effects = _cut(corpus, tokenizer, sizes) if correct_length else {}
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
        pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
        for name, values, lengths in (
            ("mattr", [mattr(tokens)], [len(tokens)]),
            ("zstd_bits", [zstd_bits(piece) for piece in pieces], [len(piece) for piece in pieces]),
        ):
            columns[name][i] = mean_of_pieces(effects.get((name, lang)), values, lengths, lengths)
    if model is not None:
        columns["model_bits"] = model_bits(
            corpus,
            tokenizer,
            model,
            max_tokens=model_tokens,
            correct_length=correct_length,
            kept=kept,
            report=report,
        )
    return {**columns, SCORE: combine(columns, corpus.lang_ids, chosen)}


def _cut(corpus: Corpus, tokenizer: Tokenizer, sizes: Floats) -> dict[tuple[str, str], LengthEffect | None]:
    """(measure, language) to what length does to it."""
    by_hash = np.array(sorted(range(len(corpus)), key=corpus.hash))
    effects = {}
    for number, lang in enumerate(corpus.langs):
        mine = by_hash[corpus.lang_ids[by_hash] == number]
        for name, size, cuts, one in (
            ("mattr", sizes[0], WORD_CUTS, mattr),
            ("zstd_bits", sizes[1], CHAR_CUTS, zstd_bits),
        ):
            longest_first = mine[np.argsort(-np.minimum(size[mine], cuts[-1]), kind="stable")]
            texts = [document_text(corpus, tokenizer, int(i)) for i in longest_first[:CUT_DOCUMENTS]]
            parts = [words(text) for text in texts] if name == "mattr" else texts
            effects[name, lang] = LengthEffect.of(cuts, cut_values(parts, cuts, one))
    return effects


# ---------------------------------------------------------------- the score


def score_weights(names: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """The weight of each of `names`, 1 where none is given."""
    for name, value in weights.items():
        if name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(f"difficulty: weights must name one of {', '.join(names)}, got {name!r}{hint}")
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"difficulty: weight of {name} must be finite and >= 0, got {value}")
    chosen = {name: float(weights.get(name, 1.0)) for name in names}
    if not sum(chosen.values()):
        raise ValueError("difficulty: weights must leave a measure above 0, got none")
    return chosen


def combine(
    columns: Mapping[str, Floats], groups: npt.NDArray[np.int64], weights: Mapping[str, float] | None = None
) -> Floats:
    """Weighted mean over the columns of each document's rank in its group, ties sharing theirs, scaled to 0..1."""
    chosen = score_weights(list(columns), weights or {})
    score = np.zeros(len(groups))
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        for name, values in columns.items():
            score[rows] += chosen[name] * ranks(values[rows]) / max(len(rows) - 1, 1)
    return score / sum(chosen.values())


def ranks(values: Floats) -> Floats:
    """From 0; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    shared: Floats = (np.cumsum(count) - (count + 1) / 2)[place]
    return shared


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

"""Comparing a written answer with the right ones: what counts as the same text, overlap of words, and numbers."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

from ..data.hebrew import normalize

_NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?|[-−]?\.\d+")
_MARKED = re.compile(rf"####\s*({_NUMBER.pattern})")


def plain(text: str) -> str:
    """Without what does not make an answer another one: niqqud, cantillation and the like (hebrew-v1), case,
    punctuation, the amount of white space. A maqaf or hyphen separates words; a geresh or quote inside one does not.
    """
    text, _ = normalize(unicodedata.normalize("NFC", text), "hebrew-v1")
    text = re.sub(r"[-\u2010-\u2015]", " ", text.lower())
    kept = "".join(c for c in text if unicodedata.category(c)[0] not in "PC" or c.isspace())
    return " ".join(kept.split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 where `text` is one of the answers under `plain`."""
    return float(plain(text) in {plain(answer) for answer in answers})


def f1(text: str, answers: Sequence[str]) -> float:
    """The best overlap of words with an answer, under `plain`: 2 * common / (words here + words there)."""
    return max(_overlap(plain(text).split(), plain(answer).split()) for answer in answers)


def _overlap(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def number(text: str) -> Decimal | None:
    """The answer of a calculation written out: the number behind the first "####", or else the last number.

    Commas group digits ("1,234" is 1234), and "18.0" equals "18". None if there is no number.
    """
    marked = _MARKED.search(text)
    found = [marked[1]] if marked else _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def number_match(text: str, answers: Sequence[str]) -> float:
    """1 where the two calculations end in the same number."""
    value = number(text)
    return float(value is not None and value in [number(answer) for answer in answers])


def lacking(metric: str, answer: str) -> str | None:
    """What a right answer must have for this metric and `answer` has not: without it, writing nothing would be right,
    or nothing could be."""
    if metric in ("exact_match", "f1") and not plain(answer):
        return "a letter, a digit or a symbol"
    if metric == "number_match" and number(answer) is None:
        return "a number"
    return None


def chrf(text: str, answers: Sequence[str]) -> float:
    """sacrebleu's chrF of one text (characters' n-grams up to 6, beta 2), from 0 to 1."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ValueError(
            "chrf: sacrebleu must be installed, got none; pip install 'hebatron[eval]'"
        ) from error
    return CHRF().sentence_score(text, list(answers)).score / 100


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "f1": f1,
    "number_match": number_match,
    "chrf": chrf,
}

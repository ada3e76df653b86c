"""Hebrew spelling made one: named, versioned rules that change Hebrew characters and nothing else.

    text, changes = normalize(text, "hebrew-v1")

"none" is the default wherever a policy is chosen: what a rule removes cannot be had back, and a model trained
on the text as it is (the hub's) reads it as it is. "hebrew-v1" is for a model trained on Hebrew from the start:
one spelling of a word is one row of the embedding. A rule never changes under its name: another one gets
another name, and the name is part of a corpus's identity.

hebrew-v1, in this order:
    bidi control        U+061C, U+200E/F, U+202A-E, U+2066-9: removed, in any text
    presentation form   U+FB1D-FB4F: its letters, without its points (the alternative plus sign: "+")
    niqqud              U+05B0-05BD, 05BF, 05C1-2, 05C7: removed
    cantillation        U+0591-05AF, 05C4-5: removed
    maqaf               U+05BE: "-"
    paseq               U+05C0: removed
    sof pasuq           U+05C3: "."
    geresh, gershayim   U+05F3: "'"; U+05F4: '"'
  and on lines with a Hebrew letter only, so that other languages keep their typography:
    zero-width          U+00AD, 034F, 200B, 2060, FEFF: removed; U+200C/D (joiners, of emoji too) beside a letter
    quote               U+2018-201B: "'"; U+201C-201F: '"'
    no-break space      U+00A0, 202F: " "
Left alone: final letters in the wrong place and other spelling mistakes, dashes, Yiddish letters, white space.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Literal, get_args

Normalization = Literal["none", "hebrew-v1"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
BIDI_CONTROLS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

_NIQQUD, _CANTILLATION = "\u05b0-\u05bd\u05bf\u05c1\u05c2\u05c7", "\u0591-\u05af\u05c4\u05c5"
POINTS = re.compile(f"[{_NIQQUD}{_CANTILLATION}]")
_LETTER = "\u05d0-\u05ea\u05ef-\u05f2"
# A line is looked at once: a pattern that asks for a letter between two stars takes 13 s for 16 kB without one.
_LINE, _HAS_LETTER = re.compile(r"[^\n]+"), re.compile(f"[{_LETTER}]")
# Without the five code points of the block that are no characters.
_PRESENTATION = re.compile("[\ufb1d-\ufb36\ufb38-\ufb3c\ufb3e\ufb40\ufb41\ufb43\ufb44\ufb46-\ufb4f]")
_EVERYWHERE = [
    ("niqqud", re.compile(f"[{_NIQQUD}]"), ""),
    ("cantillation", re.compile(f"[{_CANTILLATION}]"), ""),
    ("maqaf", re.compile("\u05be"), "-"),
    ("paseq", re.compile("\u05c0"), ""),
    ("sof pasuq", re.compile("\u05c3"), "."),
    ("geresh", re.compile("\u05f3"), "'"),
    ("gershayim", re.compile("\u05f4"), '"'),
]
_ON_HEBREW_LINES = [
    ("zero-width", re.compile("[\u00ad\u034f\u200b\u2060\ufeff]"), ""),
    ("quote", re.compile("[\u2018-\u201b]"), "'"),
    ("quote", re.compile("[\u201c-\u201f]"), '"'),
    ("no-break space", re.compile("[\u00a0\u202f]"), " "),
]
_JOINERS = re.compile(f"(?<=[{_LETTER}])[\u200c\u200d]+|[\u200c\u200d]+(?=[{_LETTER}])")
_LINE_CHARACTERS = re.compile("[\u00ad\u034f\u200b\u2060\ufeff\u200c\u200d\u2018-\u201f\u00a0\u202f]")
_ANY = re.compile("[\u0591-\u05c7\u05f3\u05f4\ufb1d-\ufb4f]")


def check_normalization(op: str, name: str) -> None:
    if name not in NORMALIZATIONS:
        raise ValueError(f"{op}: normalize must be one of {NORMALIZATIONS}, got {name!r}")


def normalize(text: str, rules: str) -> tuple[str, Counter[str]]:
    """`text` under the named rules, and how many of its characters each rule changed; idempotent.

    Args:
        rules: "none" or "hebrew-v1".
    Raises: ValueError for another name.
    """
    check_normalization("normalize", rules)
    changes: Counter[str] = Counter()
    if rules == "none":
        return text, changes
    text = _substitute(BIDI_CONTROLS, "", text, "bidi control", changes)
    if _ANY.search(text):
        text, count = _PRESENTATION.subn(lambda match: _decompose(match[0]), text)
        changes["presentation form"] += count
        for name, pattern, replacement in _EVERYWHERE:
            text = _substitute(pattern, replacement, text, name, changes)
    if _LINE_CHARACTERS.search(text):
        text = _LINE.sub(lambda match: _normalize_line(match[0], changes), text)
    return text, +changes


def strip_points(text: str) -> str:
    """`text` without niqqud and cantillation: what comparing and counting words needs."""
    return POINTS.sub("", text)


def _substitute(pattern: re.Pattern[str], by: str, text: str, name: str, changes: Counter[str]) -> str:
    text, count = pattern.subn(by, text)
    changes[name] += count
    return text


def _decompose(character: str) -> str:
    """The letters of one presentation form."""
    parts = unicodedata.normalize("NFKD", character)
    return "".join(part for part in parts if not POINTS.match(part) and part != "\ufb1e")


def _normalize_line(line: str, changes: Counter[str]) -> str:
    if not _HAS_LETTER.search(line):
        return line
    for name, pattern, replacement in _ON_HEBREW_LINES:
        line = _substitute(pattern, replacement, line, name, changes)
    joined = _JOINERS.sub("", line)
    changes["zero-width"] += len(line) - len(joined)
    return joined

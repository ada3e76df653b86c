"""Hebrew normalisation: each rule, what it leaves alone, and counts that add up."""

from __future__ import annotations

import random
import re
import unicodedata

import pytest

from hebatron.data.hebrew import NORMALIZATIONS, normalize, strip_points

RULES = [
    ("niqqud", "שָׁלוֹם", "שלום", 3),
    ("cantillation", "בְּרֵאשִׁ֖ית", "בראשית", 1),
    ("presentation form", "\ufb2a\ufb4f\ufb1f \ufb21", "שאל\u05f2 א", 4),
    ("presentation form", "א \ufb29 ב", "א + ב", 1),
    ("bidi control", "\u200fשלום \u202eabc\u202c", "שלום abc", 3),
    ("maqaf", "בית\u05beספר", "בית-ספר", 1),
    ("paseq", "אמר\u05c0 לו", "אמר לו", 1),
    ("sof pasuq", "הארץ\u05c3", "הארץ.", 1),
    ("geresh", "ג\u05f3ירפה", "ג'ירפה", 1),
    ("gershayim", "צה\u05f4ל", 'צה"ל', 1),
    ("quote", "“שלום” אמר ’ה‘", "\"שלום\" אמר 'ה'", 4),
    ("quote", "מנכ”ל", 'מנכ"ל', 1),
    ("no-break space", "10\u00a0שקלים\u202f", "10 שקלים ", 2),
    ("zero-width", "ש\u200bל\u00adו\u2060ם\ufeff\u034f", "שלום", 5),
    ("zero-width", "ש\u200d\u200cל ום\u200d", "של ום", 3),
]
UNTOUCHED = [
    "It’s “fine” — co\u00adoperate, 5\u00a0km, caf\u00e9, e\u0301, x\u200by",
    "def f(x: str) -> int:\n    return len(x.split('\\u00a0')) % 7  # “no change”\n",
    r"$\int_0^1 x^2\,dx = \frac{1}{3}$, 3 × 4 − 2 ≤ 10, ∀x∈ℝ",
    "👩\u200d👧 שלום 👩\u200d👧",
    "מםנןכץ שלומ הולכימ",  # final forms in the wrong place
    "מה – זה — כן… 1948-1967 \t וכו'\r\n  \u2028",
    "\u05f2 \u05f0 a\ufb1c",
]
ALPHABET = (
    "אבגםןש אב  \n\n\r\"'-.abZ09"
    + "\u05b8\u05bc\u05c1\u05c7\u0591\u05af\u05c4\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u05f2"
    + "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u00a0\u202f\u2018\u2019\u201c\u201d\u201e"
    + "\u200e\u200f\u202e\u2066\u061c\ufb1d\ufb1e\ufb29\ufb2a\ufb37\ufb4f—é👧"
)


@pytest.mark.parametrize(("rule", "text", "expected", "count"), RULES)
def test_normalize_rule(rule: str, text: str, expected: str, count: int) -> None:
    result, changes = normalize(text, "hebrew-v1")
    assert result == expected
    assert changes[rule] == count
    assert normalize(text, "none") == (text, {})


@pytest.mark.parametrize("text", UNTOUCHED)
def test_normalize_leaves_the_rest_alone(text: str) -> None:
    assert normalize(text, "hebrew-v1") == (text, {})


def random_text(seed: int) -> str:
    source = random.Random(seed)
    return "".join(source.choices(ALPHABET, k=source.randrange(1, 60)))


def test_normalize_is_idempotent_and_counts_add_up() -> None:
    """Each rule changes single characters of the input: the counts are the characters that did not survive."""
    for seed in range(3000):
        text = random_text(seed)
        result, changes = normalize(text, "hebrew-v1")
        assert normalize(result, "hebrew-v1") == (result, {}), ascii(text)
        assert min(changes.values(), default=1) > 0
        removed = sum(
            changes[name] for name in ("bidi control", "niqqud", "cantillation", "paseq", "zero-width")
        )
        grown = sum(len(normalize(c, "hebrew-v1")[0]) - 1 for c in text if "\ufb1d" <= c <= "\ufb4f")
        assert len(result) == len(text) - removed + grown, ascii(text)
        kept = [c for c in text if normalize(f"א{c}א", "hebrew-v1")[0] == f"א{c}א"]
        assert sum(changes.values()) <= len(text) - len(kept), ascii(text)
        if any("\u05d0" <= c <= "\u05ea" for c in result) and "\n" not in text and "\u200c" not in text:
            joiners = result.count("\u200d")
            assert sum(changes.values()) == len(text) - len(kept) - joiners, ascii(text)


def test_normalize_never_joins_drops_or_changes_a_word() -> None:
    """Random words under marks of every kind, between every separator: the same words, letter by letter."""
    letters, marks = (
        "אבגדהוזחטיכךלמםנןסעפףצץקרשת",
        "\u05b0\u05b8\u05bc\u05c1\u05c2\u05c7\u0591\u05af\u05bd\u200f\u2060",
    )
    separators = [" ", "\n", "\u05be", " \u05c0 ", "\u05c3 ", "\u00a0", ", ", " \u201c", "\u201d ", " – "]
    for seed in range(2000):
        rng = random.Random(seed)
        words = ["".join(rng.choices(letters, k=rng.randrange(1, 8))) for _ in range(rng.randrange(1, 12))]
        if rng.random() < 0.3:
            words.append(rng.choice(["ג'ירפה", 'צה"ל', "abc", "x9"]))
        text = ""
        for word in words:
            for letter in word:
                text += letter + "".join(rng.choices(marks, k=rng.randrange(3)) if "\u05d0" <= letter else "")
            text += rng.choice(separators)
        result, _ = normalize(text, "hebrew-v1")
        assert re.findall(r"\w+(?:['\"]\w+)*", result) == words, ascii(text)
        assert normalize(result, "hebrew-v1") == (result, {}), ascii(text)


def test_normalize_leaves_lines_of_code_and_english_alone() -> None:
    plain = [chr(c) for c in range(0x20, 0x250)] + ["\t", "’", "“", "…", "\u00ad", "\u200b", "\u200d", "👧"]
    for seed in range(500):
        rng = random.Random(seed)
        line = "".join(rng.choices(plain, k=rng.randrange(1, 80)))
        assert normalize(line, "hebrew-v1") == (line, {})
        mixed, _ = normalize(f"{line}\nשָׁלוֹם\n{line}", "hebrew-v1")
        assert mixed == f"{line}\nשלום\n{line}"


def test_normalize_takes_a_long_line_without_hebrew_in_its_stride() -> None:
    line = "a" * 100_000 + "’"  # a search that begins anew at every character took 13 s for a sixth of it
    assert normalize(line, "hebrew-v1") == (line, {})


def test_normalize_never_touches_letters() -> None:
    for code in range(0x20, 0x3000):
        character = chr(code)
        if unicodedata.category(character)[0] in "LNS":
            assert normalize(f"א {character} ב", "hebrew-v1") == (f"א {character} ב", {}), hex(code)


def test_strip_points_keeps_punctuation() -> None:
    assert strip_points("בְּרֵאשִׁ֖ית\u05beאת\u05c3 a\u0301") == "בראשית\u05beאת\u05c3 a\u0301"


def test_normalize_refuses_other_names() -> None:
    assert NORMALIZATIONS == ("none", "hebrew-v1")
    with pytest.raises(ValueError, match=r"normalize: normalize must be one of .*, got 'hebrew'"):
        normalize("א", "hebrew")

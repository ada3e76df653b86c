"""Answers compared: what makes two texts the same answer, the overlap of words, and numbers."""

import sys
from decimal import Decimal

import pytest

from hebatron.evaluation.answers import METRICS, chrf, exact_match, f1, lacking, number, number_match, plain


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("שָׁלוֹם", "שלום"),  # niqqud
        ("שׁלום\u200f", "שלום"),  # a presentation form and a bidi mark
        ("תל־אביב", "תל אביב"),  # maqaf
        ("תל-אביב", "תל אביב"),
        ('צה"ל', "צהל"),
        ("צה״ל", "צהל"),
        ("  בשנת   1934.\n", "בשנת 1934"),
        ("The Cat!", "the cat"),
        ("«שלום», אמר", "שלום אמר"),
        ("e\u0301", "é"),
    ],
)
def test_plain_is_the_same_for_what_is_the_same_answer(text: str, same: str) -> None:
    assert plain(text) == plain(same) == same
    assert plain(plain(text)) == plain(text)
    assert exact_match(text, ["אחר", same]) == 1.0 and f1(text, [same]) == 1.0


def test_exact_match_tells_other_answers_apart() -> None:
    assert exact_match("ירושלים", ["חיפה"]) == 0.0
    assert exact_match("1.5", ["1,6"]) == 0.0
    assert exact_match("", ["חיפה"]) == 0.0


def test_f1_is_twice_the_common_words_over_all_words() -> None:
    assert f1("בשנת 1934", ["1934"]) == pytest.approx(2 / 3)
    assert f1("א א ב", ["א ב ב ג"]) == pytest.approx(2 * 2 / 7)  # words count as often as they are there
    assert f1("א", ["ב", "א ב"]) == pytest.approx(2 / 3)  # the best of the answers
    assert f1("א", ["ב"]) == f1("", ["א"]) == f1("א", ["!"]) == 0.0
    assert f1(".", ["!"]) == 1.0  # nothing left on either side


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 2 = 5\n#### 5", "5"),
        ("#### 1,234\nשאלה: 7", "1234"),  # the first marked one: what follows is another question
        ("התשובה היא 18.", "18"),
        ("18.0", "18"),
        ("יש לה 1,000 שקלים ועוד 3.50", "3.5"),
        ("#### -7", "-7"),
        ("מינוס זה −7", "-7"),
        (".5", "0.5"),
        ("#### 1.2.3", "1.2"),  # what a model writes is not always a number
        ("#### ..5", "0.5"),
        ("#### $18.", "18"),
        ("####", None),
        ("אין מספר", None),
    ],
)
def test_number_is_the_marked_one_or_the_last(text: str, value: str | None) -> None:
    assert number(text) == (None if value is None else Decimal(value))


def test_number_match_compares_values_and_never_matches_nothing() -> None:
    assert number_match("לכן 5.0", ["2 + 3\n#### 5"]) == 1.0
    assert number_match("לכן 6", ["#### 5"]) == number_match("", ["אין"]) == 0.0


def test_chrf_is_one_for_the_same_text_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert METRICS["chrf"] is chrf
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ValueError, match=r"chrf: sacrebleu must be installed, got none"):
        chrf("א", ["א"])
    monkeypatch.undo()
    pytest.importorskip("sacrebleu", reason="sacrebleu comes with the eval extra")
    assert chrf("שלום ושקט", ["שלום ושקט"]) == pytest.approx(1.0)
    assert 0 < chrf("שלום", ["שלום ושקט"]) < 1 and chrf("abc", ["שלום"]) == 0.0


@pytest.mark.parametrize(
    ("metric", "answer", "needed"),
    [
        ("exact_match", "?!", "a letter, a digit or a symbol"),
        ("f1", " \u05be - ", "a letter, a digit or a symbol"),
        ("f1", "\u05b8", "a letter, a digit or a symbol"),  # a point without its letter
        ("exact_match", "+", None),
        ("exact_match", "א.", None),
        ("number_match", "שבע", "a number"),
        ("number_match", "#### 7", None),
        ("chrf", "?!", None),
    ],
)
def test_what_a_right_answer_lacks_is_what_would_make_nothing_right(
    metric: str, answer: str, needed: str | None
) -> None:
    assert lacking(metric, answer) == needed
    if needed:  # writing nothing is right, or not even the answer itself is
        assert METRICS[metric]("", [answer]) == 1.0 or METRICS[metric](answer, [answer]) == 0.0

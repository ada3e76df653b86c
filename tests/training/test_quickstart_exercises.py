"""The generated Hebrew exercises obey the rules of agreement, and repeat exactly for a seed."""

from __future__ import annotations

import re

import pytest

from hebatron.quickstart import exercises as ex

EVERY_NOUN = ex.THINGS + ex.PEOPLE
NOUN_BY_FORM = {noun.plural: noun for noun in ex.THINGS} | {noun.singular: noun for noun in ex.THINGS}
ADJECTIVE_FORMS = {
    gender: {adjective.agreeing(gender, plural) for adjective in ex.ADJECTIVES for plural in (False, True)}
    for gender in (ex.MASCULINE, ex.FEMININE)
}


@pytest.mark.parametrize(
    ("number", "singular", "expected"),
    [
        (1, "ספר", "ספר אחד"),
        (1, "תמונה", "תמונה אחת"),
        (2, "שולחן", "שני שולחנות"),  # masculine in spite of -ot
        (2, "ביצה", "שתי ביצים"),  # feminine in spite of -im
        (3, "ספר", "שלושה ספרים"),
        (3, "תאנה", "שלוש תאנים"),
        (10, "לוח", "עשרה לוחות"),
        (10, "אבן", "עשר אבנים"),
        (12, "מפתח", "שנים עשר מפתחות"),
        (12, "עוגה", "שתים עשרה עוגות"),
        (22, "פרח", "עשרים ושניים פרחים"),
        (22, "חולצה", "עשרים ושתיים חולצות"),
        (30, "כדור", "שלושים כדורים"),
        (100, "מנורה", "מאה מנורות"),
    ],
)
def test_counted_follows_the_nouns_gender(number: int, singular: str, expected: str) -> None:
    assert ex.counted(number, NOUN_BY_FORM[singular]) == expected


def test_numerals_three_to_ten_take_the_reversed_ending() -> None:
    for number in range(3, 11):
        masculine, feminine = (ex.number_words(number, gender) for gender in "mf")
        assert masculine.endswith("ה")
        assert masculine == feminine if number == 8 else not feminine.endswith("ה")


def test_teens_end_by_gender_and_every_number_is_distinct() -> None:
    for gender, ending in (("m", "עשר"), ("f", "עשרה")):
        words = [ex.number_words(number, gender) for number in range(1, 101)]
        assert len(set(words)) == 100
        assert all(word.split()[-1] == ending for word in words[10:19])


def test_tables_have_the_regular_agreement_endings() -> None:
    for adjective in ex.ADJECTIVES:
        assert adjective.feminine.endswith("ה")
        assert adjective.masculine_plural.endswith("ים")
        assert adjective.feminine_plural.endswith("ות")
    for verb in ex.VERBS:
        assert verb.she.endswith("ה") and verb.they.endswith("ו") and verb.he != verb.she
    assert all(noun.plural.endswith(("ים", "ות")) and noun.gender in "mf" for noun in EVERY_NOUN)


def test_described_repeats_the_article_and_agrees() -> None:
    table, picture = NOUN_BY_FORM["שולחן"], NOUN_BY_FORM["תמונה"]
    large = ex.ADJECTIVES[0]
    assert ex.described(table, large, plural=True, definite=True) == "השולחנות הגדולים"
    assert ex.described(picture, large) == "תמונה גדולה"
    assert ex.described(picture, large, plural=True) == "תמונות גדולות"


def test_documents_agree_in_every_counted_phrase() -> None:
    gender_of = {form: gender for gender in "mf" for form in ex._UNITS[gender][2:] if form != "שמונה"}
    checked = 0
    for text in ex.documents(200, seed=3):
        words = re.findall(r"\w+", text)
        for before, numeral, noun in zip(words, words[1:], words[2:], strict=False):
            whole = before not in gender_of and before not in ex._TEENS["m"] + ex._TEENS["f"]
            if whole and numeral in gender_of and noun in NOUN_BY_FORM:
                assert NOUN_BY_FORM[noun].gender == gender_of[numeral], f"{numeral} {noun}"
                checked += 1
        for noun, adjective in re.findall(r"(?:יחיד|רבים): (\w+) (\w+)", text):
            assert adjective in ADJECTIVE_FORMS[NOUN_BY_FORM[noun].gender], f"{noun} {adjective}"
            checked += 1
    assert checked > 300


def test_documents_state_true_arithmetic_and_word_and_digit_forms_match() -> None:
    by_words = {ex.number_words(number): number for number in range(1, 101)}
    operators = {"+": "ועוד", "-": "פחות", "×": "כפול"}
    checked = 0
    for text in ex.documents(100, seed=1):
        for a, sign, b, result, words in re.findall(r"(\d+) ([+×-]) (\d+) = (\d+)\n(.*)\.", text):
            left, right = int(a), int(b)
            assert {"+": left + right, "-": left - right, "×": left * right}[sign] == int(result)
            first, second, total = re.split(f" {operators[sign]} | שווה ל", words)
            assert [by_words[first], by_words[second], by_words[total]] == [left, right, int(result)]
            checked += 1
    assert checked > 100


def test_documents_depend_on_the_seed_alone() -> None:
    assert list(ex.documents(20, seed=5)) == list(ex.documents(20, seed=5))
    assert list(ex.documents(20, seed=5)) == list(ex.documents(30, seed=5))[:20]
    assert list(ex.documents(20, seed=5)) != list(ex.documents(20, seed=6))


@pytest.mark.parametrize("number", [0, -1, 101])
def test_number_words_names_a_number_out_of_range(number: int) -> None:
    with pytest.raises(ValueError, match=f"number_words: number must be in 1..100, got {number}"):
        ex.number_words(number)

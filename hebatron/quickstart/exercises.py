"""Generated Hebrew arithmetic and grammar exercises, correct by construction.

The tables hold whole written forms, never rules that guess them: a noun brings its gender and plural
(the masculine shulchanot still takes gdolim), an adjective its four agreeing forms, a verb its three
past forms. Hebrew counts backwards for an English ear: shlosha, with the feminine-looking
ending, is the masculine numeral. Bare arithmetic uses the feminine, as the language does.

`documents(count, seed)` and `questions(count, seed)` are deterministic: item i is a function of (seed, i) alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MASCULINE, FEMININE = "m", "f"


@dataclass(frozen=True)
class Noun:
    """A countable noun: gender decides every agreement, whatever its plural looks like."""

    gender: str
    singular: str
    plural: str


@dataclass(frozen=True)
class Adjective:
    """The four agreeing forms of an adjective."""

    masculine: str
    feminine: str
    masculine_plural: str
    feminine_plural: str

    def agreeing(self, gender: str, plural: bool) -> str:
        if gender == MASCULINE:
            return self.masculine_plural if plural else self.masculine
        return self.feminine_plural if plural else self.feminine


@dataclass(frozen=True)
class Verb:
    """Third-person past forms: he, she, they."""

    he: str
    she: str
    they: str

    def agreeing(self, gender: str, plural: bool) -> str:
        if plural:
            return self.they
        return self.he if gender == MASCULINE else self.she


THINGS = (
    Noun("m", "ספר", "ספרים"),
    Noun("m", "תפוח", "תפוחים"),
    Noun("m", "כדור", "כדורים"),
    Noun("m", "פרח", "פרחים"),
    Noun("m", "מפתח", "מפתחות"),
    Noun("m", "כיסא", "כיסאות"),
    Noun("m", "שולחן", "שולחנות"),
    Noun("m", "לוח", "לוחות"),
    Noun("m", "מכתב", "מכתבים"),
    Noun("m", "שטיח", "שטיחים"),
    Noun("f", "מחברת", "מחברות"),
    Noun("f", "תמונה", "תמונות"),
    Noun("f", "עוגה", "עוגות"),
    Noun("f", "ביצה", "ביצים"),
    Noun("f", "אבן", "אבנים"),
    Noun("f", "קופסה", "קופסאות"),
    Noun("f", "מנורה", "מנורות"),
    Noun("f", "חולצה", "חולצות"),
    Noun("f", "צלחת", "צלחות"),
    Noun("f", "תאנה", "תאנים"),
)
PEOPLE = (
    Noun("m", "ילד", "ילדים"),
    Noun("m", "מורה", "מורים"),
    Noun("m", "תלמיד", "תלמידים"),
    Noun("m", "שכן", "שכנים"),
    Noun("m", "חבר", "חברים"),
    Noun("f", "ילדה", "ילדות"),
    Noun("f", "מורה", "מורות"),
    Noun("f", "תלמידה", "תלמידות"),
    Noun("f", "שכנה", "שכנות"),
    Noun("f", "חברה", "חברות"),
)
ADJECTIVES = (
    Adjective("גדול", "גדולה", "גדולים", "גדולות"),
    Adjective("קטן", "קטנה", "קטנים", "קטנות"),
    Adjective("חדש", "חדשה", "חדשים", "חדשות"),
    Adjective("ישן", "ישנה", "ישנים", "ישנות"),
    Adjective("טוב", "טובה", "טובים", "טובות"),
    Adjective("יפה", "יפה", "יפים", "יפות"),
    Adjective("כבד", "כבדה", "כבדים", "כבדות"),
    Adjective("אדום", "אדומה", "אדומים", "אדומות"),
    Adjective("לבן", "לבנה", "לבנים", "לבנות"),
    Adjective("ארוך", "ארוכה", "ארוכים", "ארוכות"),
)
VERBS = (
    Verb("לקח", "לקחה", "לקחו"),
    Verb("מצא", "מצאה", "מצאו"),
    Verb("ראה", "ראתה", "ראו"),
    Verb("קנה", "קנתה", "קנו"),
    Verb("מכר", "מכרה", "מכרו"),
    Verb("הביא", "הביאה", "הביאו"),
    Verb("שכח", "שכחה", "שכחו"),
    Verb("צייר", "ציירה", "ציירו"),
)
NAMES = (
    ("דוד", MASCULINE),
    ("משה", MASCULINE),
    ("יוסף", MASCULINE),
    ("דניאל", MASCULINE),
    ("רות", FEMININE),
    ("שרה", FEMININE),
    ("מרים", FEMININE),
    ("נועה", FEMININE),
)
WEEKDAYS = ("ראשון", "שני", "שלישי", "רביעי", "חמישי", "שישי")

_UNITS = {
    MASCULINE: ("אחד", "שניים", "שלושה", "ארבעה", "חמישה", "שישה", "שבעה", "שמונה", "תשעה", "עשרה"),
    FEMININE: ("אחת", "שתיים", "שלוש", "ארבע", "חמש", "שש", "שבע", "שמונה", "תשע", "עשר"),
}
_TEENS = {
    MASCULINE: ("אחד", "שנים", "שלושה", "ארבעה", "חמישה", "שישה", "שבעה", "שמונה", "תשעה"),
    FEMININE: ("אחת", "שתים", "שלוש", "ארבע", "חמש", "שש", "שבע", "שמונה", "תשע"),
}
_TEN_OF_TEENS = {MASCULINE: "עשר", FEMININE: "עשרה"}
_TENS = ("עשרים", "שלושים", "ארבעים", "חמישים", "שישים", "שבעים", "שמונים", "תשעים")
_TWO_BEFORE_NOUN = {MASCULINE: "שני", FEMININE: "שתי"}
_PRONOUN = {MASCULINE: "הוא", FEMININE: "היא"}
_TO_PRONOUN = {MASCULINE: "לו", FEMININE: "לה"}
_WERE = Verb("היה", "הייתה", "היו")
_REMAINED = Verb("נשאר", "נשארה", "נשארו")
_GAVE = Verb("נתן", "נתנה", "נתנו")
_BOUGHT = Verb("קנה", "קנתה", "קנו")


def number_words(number: int, gender: str = FEMININE) -> str:
    """A number from 1 to 100 in words; without a noun the language counts in the feminine."""
    if not 1 <= number <= 100:
        raise ValueError(f"number_words: number must be in 1..100, got {number}")
    if number == 100:
        return "מאה"
    if number <= 10:
        return _UNITS[gender][number - 1]
    if number < 20:
        return f"{_TEENS[gender][number - 11]} {_TEN_OF_TEENS[gender]}"
    tens, unit = divmod(number, 10)
    return f"{_TENS[tens - 2]} ו{_UNITS[gender][unit - 1]}" if unit else _TENS[tens - 2]


def counted(number: int, noun: Noun) -> str:
    """Number and noun in agreement: one follows its noun, two takes its short form."""
    if number == 1:
        return f"{noun.singular} {_UNITS[noun.gender][0]}"
    words = _TWO_BEFORE_NOUN[noun.gender] if number == 2 else number_words(number, noun.gender)
    return f"{words} {noun.plural}"


def described(noun: Noun, adjective: Adjective, plural: bool = False, definite: bool = False) -> str:
    """Noun and adjective in agreement; the article stands before both."""
    article = "ה" if definite else ""
    form = noun.plural if plural else noun.singular
    return f"{article}{form} {article}{adjective.agreeing(noun.gender, plural)}"


def _addition(draw: random.Random) -> str:
    a, b = draw.randint(1, 50), draw.randint(1, 50)
    words = f"{number_words(a)} ועוד {number_words(b)} שווה ל{number_words(a + b)}."
    return f"{a} + {b} = {a + b}\n{words}"


def _subtraction(draw: random.Random) -> str:
    a = draw.randint(2, 60)
    b = draw.randint(1, a - 1)
    words = f"{number_words(a)} פחות {number_words(b)} שווה ל{number_words(a - b)}."
    return f"{a} - {b} = {a - b}\n{words}"


def _multiplication(draw: random.Random) -> str:
    a, b = draw.randint(1, 10), draw.randint(1, 10)
    words = f"{number_words(a)} כפול {number_words(b)} שווה ל{number_words(a * b)}."
    return f"{a} × {b} = {a * b}\n{words}"


def _giving(draw: random.Random) -> str:
    (giver, gender), (receiver, _) = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    total = draw.randint(2, 20)
    given = draw.randint(1, total - 1)
    left = total - given
    remained = _REMAINED.agreeing(thing.gender, left > 1)
    return (
        f"ל{giver} {_WERE.they} {counted(total, thing)}. "
        f"{_PRONOUN[gender]} {_GAVE.agreeing(gender, False)} ל{receiver} {counted(given, thing)}.\n"
        f"כמה {thing.plural} נשארו ל{giver}? {remained} {_TO_PRONOUN[gender]} {counted(left, thing)}."
    )


def _buying(draw: random.Random) -> str:
    name, gender = draw.choice(NAMES)
    thing = draw.choice(THINGS)
    first, more = draw.randint(1, 12), draw.randint(1, 12)
    bought = _BOUGHT.agreeing(gender, False)
    return (
        f"ל{name} {_WERE.agreeing(thing.gender, first > 1)} {counted(first, thing)}. "
        f"{_PRONOUN[gender]} {bought} עוד {counted(more, thing)}.\n"
        f"כמה {thing.plural} יש ל{name}? יש {_TO_PRONOUN[gender]} {counted(first + more, thing)}."
    )


def _forms(draw: random.Random) -> str:
    noun, adjective = draw.choice(THINGS), draw.choice(ADJECTIVES)
    one, many = described(noun, adjective), described(noun, adjective, plural=True)
    the_one = described(noun, adjective, definite=True)
    the_many = described(noun, adjective, plural=True, definite=True)
    return f"יחיד: {one}. רבים: {many}.\nמיודע: {the_one}, {the_many}."


def _sentence(draw: random.Random) -> str:
    person, thing = draw.choice(PEOPLE), draw.choice(THINGS)
    adjective, verb = draw.choice(ADJECTIVES), draw.choice(VERBS)
    plural = draw.random() < 0.5
    the_thing = described(thing, adjective, plural=draw.random() < 0.5, definite=True)
    who = person.plural if plural else person.singular
    return f"ה{who} {verb.agreeing(person.gender, plural)} את {the_thing}."


def _counting(draw: random.Random) -> str:
    thing, adjective = draw.choice(THINGS), draw.choice(ADJECTIVES)
    number = draw.randint(2, 30)
    form = adjective.agreeing(thing.gender, True)
    return f"כמה {thing.plural} יש כאן? יש כאן {counted(number, thing)} {form}."


def _weekday(draw: random.Random) -> str:
    day = draw.randint(1, len(WEEKDAYS) - 2)
    before, today, after = WEEKDAYS[day - 1 : day + 2]
    return f"אתמול היה יום {before}, היום יום {today}, ומחר יום {after}."


def _comparison(draw: random.Random) -> str:
    large, small = sorted(draw.sample(range(1, 101), 2), reverse=True)
    return f"המספר {large} גדול מהמספר {small}, והמספר {small} קטן מהמספר {large}."


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    _addition,
    _subtraction,
    _multiplication,
    _giving,
    _buying,
    _forms,
    _sentence,
    _counting,
    _weekday,
    _comparison,
)


def documents(count: int, seed: int = 0, exercises_each: int = 8) -> Iterator[str]:
    """`count` documents of `exercises_each` exercises of mixed kinds."""
    for index in range(count):
        draw = random.Random(f"{seed}/{index}")
        yield "\n".join(draw.choice(_KINDS)(draw) for _ in range(exercises_each))


_ASKED: tuple[tuple[Callable[[random.Random], str], str], ...] = (  # an exercise and what ends its question
    (_addition, " = "),
    (_subtraction, " = "),
    (_multiplication, " = "),
    (_giving, "? "),
    (_buying, "? "),
)


def questions(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`count` exercises as (question, answer): "3 + 4 =" and "7" with the sentence that says it in words."""
    for index in range(count):
        draw = random.Random(f"question/{seed}/{index}")
        make, end = draw.choice(_ASKED)
        question, _, answer = make(draw).partition(end)
        yield question + end.rstrip(), answer

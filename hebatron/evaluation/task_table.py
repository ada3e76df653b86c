"""The tasks that `hebatron eval --tasks` knows by name, as plain data.

Names and numbers of examples are those of the Hebatron team's harness (arc_ai2_heb 25, copa_heb 5, ...); their prompts
are not published, so these are ours, in the usual forms: a question with the choices' texts scored behind "תשובה:",
or choices listed under letters and the letters scored. Figures are comparable among models measured here, and with
others' only as far as prompts agree.

Each task's `example` is a record it reads. The hub's own shapes are read too where fields are written "a|b": the first
that a record has. `gold` may be the choice's number from 0, its letter (A or א is the first), its label, or its text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

HEBREW_LETTERS, LATIN_LETTERS = "אבגדהוזחטי", "ABCDEFGHIJ"
Fields = dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Task:
    """How records become prompts and answers become scores.

    Attributes:
        kind: "choice", by likelihood; "text", written out.
        prompt: what comes before an answer. Names in braces are fields, and `options` the lettered choices; a line
            of a passage or a topic alone is left out where a record has none.
        example: a record.
        fields: name in the prompt, or choices, labels, gold or answers -> where it is in a record: "a|b" tries both,
            "a.b" goes into an object, several names make a list. A name that is not here stands for itself.
        shots: worked examples before the question.
        metrics: of a written answer (answers.py); of choices all are computed. The first goes into the mean.
        letters: choices are listed under these, and the letters are scored; "" scores the texts of the choices.
        choices: the same for every record. labels: what records call them, if not by their numbers.
        words: field -> what is written for each of its values.
        header: the prompt's beginning.
        max_new_tokens, stop: of a written answer.
        no_answer: what to write where a record's answers are an empty list.
    """

    kind: Literal["choice", "text"]
    prompt: str
    example: dict[str, Any]
    fields: Fields = field(default_factory=dict)
    shots: int = 0
    metrics: tuple[str, ...] = ("acc",)
    letters: str = ""
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    words: dict[str, dict[str, str]] = field(default_factory=dict)
    header: str = ""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)
    no_answer: str = ""


_CHOICES: Fields = {
    "choices": "choices.text|choices|options|endings",
    "labels": "choices.label",
    "gold": "answerKey|answer|gold|label",
}
_HE_EXAMPLE = {"question": "מהי בירת ישראל?", "choices": ["חיפה", "ירושלים", "אילת", "לוד"], "answer": 1}
_EN_EXAMPLE = {"question": "What do plants make?", "choices": ["sugar", "iron", "salt", "glass"], "answer": 0}
_HE_LETTERED = "{passage}\nשאלה: {question}\n{options}\nתשובה:"
_EN_LETTERED = "{passage}\nQuestion: {question}\n{options}\nAnswer:"
_HE_SUM = {"question": "לדנה 3 תפוחים, והיא קנתה עוד 2. כמה יש לה?", "answer": "3 + 2 = 5\n#### 5"}
_EN_SUM = {"question": "Dana has 3 apples and buys 2 more. How many?", "answer": "3 + 2 = 5\n#### 5"}


def _psychometric(hebrew: bool, shots: int) -> Task:
    return Task(
        "choice",
        _HE_LETTERED if hebrew else _EN_LETTERED,
        _HE_EXAMPLE if hebrew else _EN_EXAMPLE,
        {**_CHOICES, "passage": "passage|context|text"},
        shots,
        letters=HEBREW_LETTERS if hebrew else LATIN_LETTERS,
    )


TASKS: dict[str, Task] = {
    # ---- any file: what a record says is what the model sees
    "choice": Task(
        "choice",
        "{context}",
        {"context": "בירת ישראל היא", "choices": ["חיפה", "ירושלים"], "gold": 1},
        _CHOICES,
    ),
    "letters": Task("choice", _HE_LETTERED, _HE_EXAMPLE, _CHOICES, letters=HEBREW_LETTERS),
    "text": Task(
        "text",
        "{context}",
        {"context": "בירת ישראל היא", "answer": "ירושלים"},
        {"answers": "answers.text|answers|answer"},
        metrics=("exact_match", "f1"),
    ),
    # ---- Hebrew reasoning
    "arc_ai2_heb": Task(
        "choice", "שאלה: {question}\nתשובה:", _HE_EXAMPLE, _CHOICES, 25, metrics=("acc_norm",)
    ),
    "copa_heb": Task(
        "choice",
        "{premise}\nשאלה: {question}\nתשובה:",
        {
            "premise": "הגביע נשבר.",
            "choice1": "הוא נפל.",
            "choice2": "הוא נשטף.",
            "question": "cause",
            "label": 0,
        },
        {"choices": ("choice1", "choice2"), "gold": "label|answer"},
        5,
        words={"question": {"cause": "מה הייתה הסיבה לכך?", "effect": "מה קרה בעקבות זאת?"}},
    ),
    "hellaswag_heb": Task(
        "choice",
        "{topic}\n{ctx}",
        {
            "ctx": "הילד פתח את הספר והתחיל",
            "endings": ["לקרוא בו.", "לאכול.", "לשחות.", "לעוף."],
            "label": "0",
        },
        {**_CHOICES, "ctx": "ctx|context|query", "topic": "activity_label"},
        10,
        metrics=("acc_norm",),
    ),
    "mmlu_heb": Task(
        "choice",
        "שאלה: {question}\n{options}\nתשובה:",
        {**_HE_EXAMPLE, "subject": "geography"},
        _CHOICES,
        25,
        letters=HEBREW_LETTERS,
        header="להלן שאלות רב-ברירה ותשובותיהן.",
    ),
    "gsm8k_heb": Task(
        "text",
        "שאלה: {question}\nתשובה:",
        _HE_SUM,
        {"answers": "answer"},
        5,
        metrics=("number_match",),
        max_new_tokens=256,
        stop=("\n\n", "שאלה:"),
    ),
    "psychometric_heb_math": _psychometric(True, 5),
    "psychometric_heb_analogies": _psychometric(True, 5),
    "psychometric_heb_sentence_complete_he": _psychometric(True, 5),
    "psychometric_heb_sentence_text_he": _psychometric(True, 2),
    "psychometric_heb_understanding": _psychometric(True, 5),
    "psychometric_heb_restatement_en": _psychometric(False, 5),
    "psychometric_heb_sentence_complete_en": _psychometric(False, 5),
    "psychometric_heb_sentence_text_en": _psychometric(False, 2),
    # ---- Hebrew language
    "snli_heb": Task(
        "choice",
        "הנחה: {premise}\nטענה: {hypothesis}\nהאם הטענה נובעת מן ההנחה?",
        {"premise": "ילדה רצה בגן.", "hypothesis": "ילדה נמצאת בחוץ.", "label": "entailment"},
        {
            "premise": "premise|sentence1",
            "hypothesis": "hypothesis|sentence2",
            "gold": "label|gold_label|answer",
        },
        5,
        choices=("כן", "אולי", "לא"),
        labels=("entailment", "neutral", "contradiction"),
    ),
    "sentiment_heb": Task(
        "choice",
        "טקסט: {text}\nמה הרגש בטקסט?",
        {"text": "ארוחה נפלאה!", "label": "positive"},
        {"text": "text|comment|sentence", "gold": "label|sentiment|answer"},
        5,
        choices=("חיובי", "שלילי", "ניטרלי"),
        labels=("positive", "negative", "neutral"),
    ),
    "winograd_heb": Task(
        "choice",
        "{sentence}\nשאלה: {question}\nתשובה:",
        {
            "sentence": "הגביע לא נכנס לתיק כי הוא גדול מדי.",
            "question": "מה גדול מדי?",
            "choices": ["הגביע", "התיק"],
            "answer": 0,
        },
        {**_CHOICES, "sentence": "sentence|text"},
        5,
    ),
    "trivia_heb": Task("choice", "שאלה: {question}\nתשובה:", _HE_EXAMPLE, _CHOICES, 5, metrics=("acc_norm",)),
    "heq": Task(
        "text",
        "קטע: {context}\nשאלה: {question}\nתשובה:",
        {
            "context": "הבניין הוקם בשנת 1934 בידי אדריכל מחיפה.",
            "question": "מתי הוקם הבניין?",
            "answers": {"text": ["1934", "בשנת 1934"]},
        },
        {"context": "context|paragraph", "answers": "answers.text|answers|answer"},
        5,
        metrics=("f1", "exact_match"),
        no_answer="אין תשובה",
    ),
    "translation_en_he": Task(
        "text",
        "English: {source}\nעברית:",
        {"source": "Peace and quiet.", "target": "שלום ושקט."},
        {"source": "source|en|english", "answers": "target|he|hebrew"},
        5,
        metrics=("chrf",),
        max_new_tokens=256,
    ),
    "translation_he_en": Task(
        "text",
        "עברית: {source}\nEnglish:",
        {"source": "שלום ושקט.", "target": "Peace and quiet."},
        {"source": "source|he|hebrew", "answers": "target|en|english"},
        5,
        metrics=("chrf",),
        max_new_tokens=256,
    ),
    # ---- English
    "arc_challenge": Task(
        "choice", "Question: {question}\nAnswer:", _EN_EXAMPLE, _CHOICES, 25, metrics=("acc_norm",)
    ),
    "hellaswag": Task(
        "choice",
        "{topic}: {ctx}",
        {
            "activity_label": "Reading",
            "ctx": "A boy opens a book and starts",
            "endings": ["to read.", "to swim.", "to fly.", "to bark."],
            "label": "0",
        },
        {**_CHOICES, "topic": "activity_label"},
        10,
        metrics=("acc_norm",),
    ),
    "gsm8k": Task(
        "text",
        "Question: {question}\nAnswer:",
        _EN_SUM,
        {"answers": "answer"},
        5,
        metrics=("number_match",),
        max_new_tokens=256,
        stop=("\n\n", "Question:"),
    ),
}

"""The quickstart's chats: right answers, each string asked in one direction, readable as chats."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hebatron.chat.chats import ChatLedger, read_chats
from hebatron.quickstart import chats, exercises

PAIRS = [(f"Open file {i}", f"פתח קובץ {i}") for i in range(1000)] + [
    ("x" * 200, "ארוך"),
    ("long", "ב" * 200),
]
VERSES = [
    f"{i} and it came to pass after these things that God did prove Abraham\nshort verse" for i in range(500)
]


def test_questions_have_the_right_answer() -> None:
    operations = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}
    bare = 0
    for question, answer in exercises.questions(300, seed=3):
        assert question.endswith(("=", "?")) and answer.endswith(".")
        if match := re.fullmatch(r"(\d+) (.) (\d+) =", question):
            bare += 1
            expected = operations[match[2]](int(match[1]), int(match[3]))
            assert answer.splitlines()[0] == str(expected)
    assert 100 < bare < 250


def test_questions_depend_on_seed_and_index_alone() -> None:
    assert list(exercises.questions(9, 1))[:5] == list(exercises.questions(5, 1))
    assert list(exercises.questions(9, 1)) != list(exercises.questions(9, 2))


def test_chats_ask_each_string_in_one_direction() -> None:
    records = chats.gather(PAIRS, VERSES)
    by_task: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        question, answer = (message["content"] for message in record["messages"])
        by_task.setdefault(record["task"], []).append((question, answer))
    assert {task: len(found) for task, found in by_task.items()} == {
        "exercises": chats.EXERCISES,
        "translate_en_he": chats.TRANSLATIONS,
        "translate_he_en": chats.TRANSLATIONS,
        "continue_en": chats.VERSES,
    }
    to_hebrew = {question.removeprefix("תרגם לעברית: ") for question, _ in by_task["translate_en_he"]}
    to_english = {answer for _, answer in by_task["translate_he_en"]}
    assert len(to_hebrew) == len(to_english) == chats.TRANSLATIONS and not to_hebrew & to_english
    assert not {"x" * 200, "long"} & (to_hebrew | to_english)
    for question, answer in by_task["continue_en"]:
        assert f"{question.removeprefix('Continue: ')} {answer}" in {verse.split("\n")[0] for verse in VERSES}


def test_chats_repeat_for_a_seed() -> None:
    assert chats.gather(PAIRS, VERSES, 4) == chats.gather(PAIRS, VERSES, 4) != chats.gather(PAIRS, VERSES, 5)


def test_written_chats_are_read_as_chats(tmp_path: Path) -> None:
    records = chats.gather(PAIRS, VERSES)
    path = tmp_path / "chats.jsonl"
    chats.write(records, path)
    ledger = ChatLedger()
    read = list(read_chats([path], ledger))
    assert ledger.read == len(read) == len(records)
    assert [chat.messages for chat in read[:5]] == [record["messages"] for record in records[:5]]


def test_installed_chats_are_bilingual() -> None:
    try:
        records = chats.installed()
    except ValueError as error:
        pytest.skip(f"the quickstart's packages are not installed: {error}")
    assert {record["lang"] for record in records} == {"he", "en", "en-he", "he-en"}
    assert len(records) == chats.EXERCISES + 2 * chats.TRANSLATIONS + chats.VERSES

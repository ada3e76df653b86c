"""Tasks from files: every preset's record, gold in all its spellings, bad records by line, worked examples."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from hebatron.evaluation.benchmark import choose_shots
from hebatron.evaluation.task_table import TASKS
from hebatron.evaluation.tasks import Example, find_tasks, read_examples, read_record

QUESTION: dict[str, Any] = {"question": "מה?", "choices": ["אחת", "שתיים", "שלוש"]}
LABELLED: dict[str, Any] = {"question": "?", "answerKey": "A"}


def write(path: Path, records: list[Any]) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_example(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    (example,) = read_examples(write(tmp_path / f"{name}.jsonl", [task.example]), task)
    assert example.name == f"{tmp_path / name}.jsonl:1"
    assert "{" not in example.prompt and example.prompt == example.prompt.strip()
    texts = [v for k, v in task.example.items() if isinstance(v, str) and f"{{{k}}}" in task.prompt]
    assert all(text in example.prompt for text in texts if text not in ("cause", "effect"))
    if task.kind == "choice":
        assert len(example.choices) >= 2 and example.right == example.choices[example.gold]
    else:
        assert example.right and example.right not in example.prompt.split("\n")[-1]
    if task.letters:
        assert f"\n{example.right}. {task.example['choices'][example.gold]}" in example.prompt


def test_settings_are_those_of_the_harness() -> None:
    shots = {name: task.shots for name, task in TASKS.items()}
    assert shots["arc_ai2_heb"] == shots["mmlu_heb"] == shots["arc_challenge"] == 25
    assert shots["hellaswag_heb"] == shots["hellaswag"] == 10
    assert shots["copa_heb"] == shots["gsm8k_heb"] == shots["gsm8k"] == 5
    psychometric = {name: n for name, n in shots.items() if name.startswith("psychometric_heb_")}
    assert sorted(psychometric.values()) == [2, 2, 5, 5, 5, 5, 5, 5]
    assert {name for name, n in psychometric.items() if n == 2} == {
        "psychometric_heb_sentence_text_he",
        "psychometric_heb_sentence_text_en",
    }


@pytest.mark.parametrize(
    ("record", "gold"),
    [
        (QUESTION | {"answer": 2}, 2),
        (QUESTION | {"answer": "2"}, 2),  # HellaSwag's label, a number from 0
        (QUESTION | {"answer": "B"}, 1),
        (QUESTION | {"answer": "ג"}, 2),
        (QUESTION | {"answer": "אחת"}, 0),
        (QUESTION | {"label": 1}, 1),
        # ARC's shape: labels of the record's own, which may be numbers from 1
        ({"question": "?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, 1),
        ({"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}, 1),
        ({"question": "?", "choices": {"text": ["x", "y"], "label": [1, 2]}, "answerKey": "2"}, 1),
        ({"question": "?", "choices": {"text": ["x", "y"], "label": [1, 2]}, "answerKey": 1}, 0),
        ({"question": "?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": 1}, 0),
        ({"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": 1}, 1),
        ({"question": "?", "choices": [7, 2.5], "answer": "2.5"}, 1),
        (QUESTION | {"answer": 2, "labels": 7}, 2),  # a field of another kind, which the task does not read
    ],
)
def test_gold_is_a_number_a_letter_a_label_or_a_text(record: dict[str, Any], gold: int) -> None:
    assert read_record(record, TASKS["trivia_heb"], "x").gold == gold


@pytest.mark.parametrize("label", [1, "Neutral", "neutral", "1", "אולי"])
def test_gold_of_fixed_choices_is_a_label_too(label: Any) -> None:
    record = {"sentence1": "א", "sentence2": "ב", "gold_label": label}
    example = read_record(record, TASKS["snli_heb"], "x")
    assert (example.choices, example.gold) == (("כן", "אולי", "לא"), 1)


def test_a_line_with_an_optional_field_goes_without_it() -> None:
    task = TASKS["psychometric_heb_math"]
    bare = read_record(QUESTION | {"answer": 0}, task, "x").prompt
    assert bare == "שאלה: מה?\nא. אחת\nב. שתיים\nג. שלוש\nתשובה:"
    assert (
        read_record(QUESTION | {"answer": 0, "passage": "קטע {x}"}, task, "x").prompt == f"קטע {{x}}\n{bare}"
    )


def test_a_line_with_more_than_an_optional_field_is_never_left_out() -> None:
    record = {key: value for key, value in TASKS["hellaswag"].example.items() if key != "activity_label"}
    with pytest.raises(ValueError, match='must have a text in "activity_label", got fields'):
        read_record(record, TASKS["hellaswag"], "x")
    assert read_record(record, TASKS["hellaswag_heb"], "x").prompt == record["ctx"]


def test_answers_may_be_many_numbers_or_none() -> None:
    heq = TASKS["heq"]
    record = {"context": "א", "question": "ב"}
    assert read_record(record | {"answers": {"text": ["ג", "ד"]}}, heq, "x").answers == ("ג", "ד")
    assert read_record(record | {"answers": []}, heq, "x").answers == ("אין תשובה",)
    assert read_record({"question": "ב", "answer": 5}, TASKS["gsm8k"], "x").answers == ("5",)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("trivia_heb", "{", "must be one JSON object a line"),
        ("trivia_heb", '{"answer": ' + "1" * 5000 + "}", "must be one JSON object a line, got Exceeds the limit"),
        ("trivia_heb", "[1]", "must be a JSON object, got list"),
        ("trivia_heb", {"choices": ["a", "b"], "answer": 0}, 'must have a text in "question", got fields'),
        ("trivia_heb", QUESTION | {"question": 3, "answer": 0}, 'must have a text in "question", got int'),
        ("trivia_heb", {"question": "?", "answer": 0}, 'must have a list of two or more in "choices.text or choices'),
        ("trivia_heb", {"question": "?", "choices": ["a"], "answer": 0}, "must have a list of two or more in"),
        ("trivia_heb", QUESTION | {"choices": ["a", " "], "answer": 0}, "must have choices that are texts and not"),
        ("trivia_heb", QUESTION | {"choices": ["a", None], "answer": 0}, "must have choices that are texts"),
        ("trivia_heb", QUESTION, 'must have an answer in "answerKey or answer or gold or label" that names one of'),
        ("trivia_heb", QUESTION | {"answer": 3}, "that names one of the 3 choices, got 3"),
        ("trivia_heb", QUESTION | {"answer": -1}, "that names one of the 3 choices, got -1"),
        ("trivia_heb", QUESTION | {"answer": True}, "that names one of the 3 choices, got True"),
        ("trivia_heb", QUESTION | {"answer": "ארבע"}, "that names one of the 3 choices, got 'ארבע'"),
        ("trivia_heb", QUESTION | {"choices": ["1", "0"], "answer": "1"}, "that means one choice, got '1'"),
        ("trivia_heb", LABELLED | {"choices": {"text": ["a", "b"], "label": 5}}, 'have a list of 2, one a choice,'),
        ("trivia_heb", LABELLED | {"choices": {"text": ["a", "b"], "label": "AB"}}, """in "choices.label", got 'AB'"""),
        ("trivia_heb", LABELLED | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "one a choice, in"),
        ("trivia_heb", LABELLED | {"choices": {"text": ["a", "b"], "label": ["A", True]}}, "must have labels that are"),
        ("trivia_heb", LABELLED | {"choices": {"text": ["a", "b"], "label": ["A", "a"]}}, "have labels that differ"),
        ("letters", QUESTION | {"choices": list("abcdefghijk"), "answer": 0}, "must have at most 10 choices, got 11"),
        ("copa_heb", {"premise": "א", "choice1": "ב", "question": "cause", "label": 0}, 'in "choice1 and choice2"'),
        (
            "copa_heb",
            {"premise": "א", "choice1": "ב", "choice2": "ג", "question": "why", "label": 0},
            """must have one of cause, effect in "question", got 'why'""",
        ),
        ("gsm8k", {"question": "?"}, 'must have an answer in "answer"'),
        ("gsm8k", {"question": "?", "answer": []}, 'must have an answer in "answer"'),
        ("gsm8k", {"question": "?", "answer": {"a": 1}}, "must have answers that are texts and not blank"),
        ("gsm8k", {"question": "?", "answer": " "}, "must have answers that are texts and not blank"),
        ("gsm8k", {"question": "?", "answer": "כך"}, 'must have a number in each answer of "answer" for number_match'),
        ("text", {"context": "א", "answer": "?!"}, "answers or answer\" for exact_match, got '?!'"),
        ("heq", {"context": "א", "question": "ב", "answers": ["ג", "…"]}, "must have a letter, a digit or a symbol in"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, name: str, record: Any, message: str) -> None:
    path = write(tmp_path / f"{name}.jsonl", [TASKS[name].example, "", record])
    with pytest.raises(ValueError, match=re.escape(f"tasks: {path}:3 ") + ".*" + re.escape(message)):
        read_examples(path, TASKS[name])


def test_bytes_that_are_not_utf8_and_empty_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"context": "\xff", "answer": "x"}\n')
    with pytest.raises(ValueError, match=r"text.jsonl:1 must be UTF-8, got byte 0xff"):
        read_examples(path, TASKS["text"])
    for empty in (b"", b"\n\n"):
        path.write_bytes(empty)
        with pytest.raises(ValueError, match=r"text.jsonl must hold at least one record, got none"):
            read_examples(path, TASKS["text"])


# ---------------------------------------------------------------- files


def test_find_tasks_goes_by_name(tmp_path: Path) -> None:
    plain = write(tmp_path / "copa_heb.jsonl", [TASKS["copa_heb"].example])
    shots = write(tmp_path / "copa_heb.shots.jsonl", [TASKS["copa_heb"].example])
    packed = tmp_path / "mmlu_heb.test.jsonl.zst"
    record = json.dumps(TASKS["mmlu_heb"].example, ensure_ascii=False) + "\n"
    packed.write_bytes(zstandard.compress(record.encode()))
    (tmp_path / "README.md").write_text("not a task")
    found = find_tasks([tmp_path])
    assert [(file.name, file.path, file.shots) for file in found] == [
        ("copa_heb", plain, shots),
        ("mmlu_heb", packed, None),
    ]
    assert [file.task for file in found] == [TASKS["copa_heb"], TASKS["mmlu_heb"]]
    assert len(read_examples(packed, TASKS["mmlu_heb"])) == 1
    (other,) = find_tasks([plain], "trivia_heb")
    assert other.name == "copa_heb" and other.task is TASKS["trivia_heb"]


def test_find_tasks_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder must hold .jsonl or .jsonl.zst files, got none"):
        find_tasks([tmp_path])
    path = write(tmp_path / "mine.jsonl", [{}])
    with pytest.raises(ValueError, match=r"task must be one of choice, letters, .*, got file .*mine.jsonl"):
        find_tasks([tmp_path])
    with pytest.raises(ValueError, match=r"task must be one of .*, got name 'copa'"):
        find_tasks([path], "copa")
    for wrong in (tmp_path / "none.jsonl", write(tmp_path / "x.txt", [])):
        with pytest.raises(ValueError, match="input must be a folder or a"):
            find_tasks([wrong])
    with pytest.raises(ValueError, match="files must have different names, got 'mine' twice"):
        find_tasks([path, path], "text")


# ---------------------------------------------------------------- worked examples


def examples(count: int) -> list[Example]:
    return [Example(f"f:{i}", f"שאלה {i}", ("א", "ב"), i % 2) for i in range(count)]


def test_shots_are_never_the_item_nor_its_repeat() -> None:
    pool = examples(8)
    pool.append(replace(pool[3], name="f:9"))
    for item, shown in zip(pool, choose_shots(pool, pool, 7, seed=1), strict=True):
        assert len(shown) == 7 and not any(one.same_as(item) for one in shown)
    first, *others = choose_shots(pool, pool, 3, seed=1)
    assert sum(shown == first for shown in others) >= 4  # nearly all items have the same ones


def test_shots_never_show_the_question_with_another_answer() -> None:
    asked = Example("f:0", "מתי?", answers=("1934",))
    assert asked.same_as(Example("f:1", "מתי?", answers=("בשנת 1934",)))
    assert not asked.same_as(Example("f:1", "איפה?", answers=("1934",)))
    choice = Example("f:0", "מה?", ("א", "ב"), 0)
    assert choice.same_as(Example("f:1", "מה?", ("ב", "ג"), 1))
    assert not choice.same_as(Example("f:1", "מה?", ("ג", "ד"), 1))  # a prompt that says nothing of its own


def test_shots_depend_on_the_seed_and_the_pool_alone() -> None:
    items, pool = examples(4), [replace(one, prompt=f"אחר {i}") for i, one in enumerate(examples(30))]
    drawn = list(choose_shots(items, pool, 5, seed=1))
    assert drawn[0] == drawn[3] and len({one.prompt for one in drawn[0]}) == 5
    assert drawn[:2] == list(choose_shots(items[:2], pool, 5, seed=1))
    assert drawn[0] != next(choose_shots(items, pool, 5, seed=2))
    assert list(choose_shots(items, pool, 0, seed=1)) == [[]] * 4


def test_too_many_shots_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"shots must be at most the other examples there are \(3\) for f:0, got 4"
    ):
        list(choose_shots(examples(4), examples(4), 4, seed=0))

"""Tasks out of local files: records checked, worked examples chosen, prompts written.

A file is .jsonl or .jsonl.zst, one JSON object a line, and its name up to the first dot names the task (task_table.py,
where each has an example of a record): arc_ai2_heb.jsonl, copa_heb.test.jsonl.zst. Worked examples come from
NAME.shots.jsonl(.zst) beside it, or else from the file itself, never the item itself nor a repeat of it: one order of
the pool is drawn from the seed, and each item gets the first of it that are not the item. So nearly all items have
the same examples.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.documents import MAX_DOCUMENT_BYTES, raw_documents
from ..spelling import did_you_mean
from .answers import lacking
from .task_table import HEBREW_LETTERS, LATIN_LETTERS, TASKS, Fields, Task

SUFFIXES = (".jsonl", ".jsonl.zst")
Record = dict[str, Any]
OPTIONAL = (
    "passage",
    "topic",
)  # fields whose line of the prompt, if it has no other, goes where a record lacks them


@dataclass(frozen=True)
class Example:
    """One record as the model meets it. `name` is what messages say: file and line."""

    name: str
    prompt: str
    choices: tuple[str, ...] = ()  # as they are scored: letters, where the task has letters
    gold: int = 0
    answers: tuple[str, ...] = ()  # of a "text" task

    @property
    def right(self) -> str:
        return self.choices[self.gold] if self.choices else self.answers[0]

    def same_as(self, other: Example) -> bool:
        """Whether `other` answers this question: the same prompt, and among choices one in common, for a prompt may
        be the same words for all."""
        shared = not self.choices or set(self.choices) & set(other.choices)
        return self.prompt == other.prompt and bool(shared)


@dataclass(frozen=True)
class TaskFile:
    name: str
    task: Task
    path: Path
    shots: Path | None  # a file of worked examples


# ---------------------------------------------------------------- files


def find_tasks(paths: Sequence[Path], name: str | None = None) -> list[TaskFile]:
    """The tasks of files and folders (their .jsonl and .jsonl.zst files, sorted). `name`: they are all of this task.

    Raises: ValueError for a file that is not there or whose task is not known, or the same task name twice.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if _is_task_file(p))
            if not any(_is_task_file(p) for p in path.iterdir()):
                raise ValueError(f"tasks: folder must hold {' or '.join(SUFFIXES)} files, got none in {path}")
        elif path.name.endswith(SUFFIXES) and path.is_file():
            files.append(path)
        else:
            raise ValueError(f"tasks: input must be a folder or a {' or '.join(SUFFIXES)} file, got {path}")
    found = [_open_task(path, name) for path in files]
    for i, one in enumerate(found):
        if one.name in {other.name for other in found[:i]}:
            raise ValueError(f"tasks: files must have different names, got {one.name!r} twice ({one.path})")
    return found


def _is_task_file(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and ".shots." not in path.name and path.is_file()


def _open_task(path: Path, name: str | None) -> TaskFile:
    stem = path.name.split(".", 1)[0]
    if (name or stem) not in TASKS:
        given = f"name {name!r}" if name else f"file {path}"
        hint = did_you_mean(name or stem, TASKS)
        raise ValueError(f"tasks: task must be one of {', '.join(TASKS)}, got {given}{hint}")
    shots = next((p for s in SUFFIXES if (p := path.with_name(f"{stem}.shots{s}")).is_file()), None)
    return TaskFile(stem, TASKS[name or stem], path, shots)


def read_examples(path: Path, task: Task) -> list[Example]:
    """Every record of a file, checked; blank lines are passed over.

    Raises: ValueError naming file and line for a record that is not what the task reads, or a file without records.
    """
    examples = []
    for line, raw in raw_documents(path, ()):
        if isinstance(raw, bytes) and raw.strip():
            try:
                examples.append(read_record(_parse(raw), task, f"{path}:{line}"))
            except _BadRecord as bad:
                raise ValueError(f"tasks: {path}:{line} {bad}") from None
    if not examples:
        raise ValueError(f"tasks: {path} must hold at least one record, got none")
    return examples


class _BadRecord(ValueError):
    """What a record must be, and what it is."""


def _parse(raw: bytes) -> Record:
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise _BadRecord(f"must be at most {MAX_DOCUMENT_BYTES:,} bytes, got more")
    try:
        record = json.loads(raw.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise _BadRecord(f"must be UTF-8, got byte 0x{raw[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:  # Python's limit of digits is no JSONDecodeError
        raise _BadRecord(f"must be one JSON object a line, got {error}") from None
    if not isinstance(record, dict):
        raise _BadRecord(f"must be a JSON object, got {type(record).__name__}")
    return record


# ---------------------------------------------------------------- a record


def read_record(record: Record, task: Task, name: str) -> Example:
    """One record as an example. Raises: ValueError that says what it must be."""
    if task.kind == "text":
        return Example(name, _prompt(record, task, {}), answers=_answers(record, task))
    choices = task.choices or _choices(record, task.fields)
    gold = _gold(record, task, choices)
    if not task.letters:
        return Example(name, _prompt(record, task, {}), choices, gold)
    if len(choices) > len(task.letters):
        raise _BadRecord(f"must have at most {len(task.letters)} choices, got {len(choices)}")
    letters = tuple(task.letters[: len(choices)])
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices))
    return Example(name, _prompt(record, task, {"options": options}), letters, gold)


def _prompt(record: Record, task: Task, made: dict[str, str]) -> str:
    """The template with the record's texts; `made` are texts that are not the record's."""
    lines = []
    for line in task.prompt.split("\n"):
        roles = [role for _, role, _, _ in string.Formatter().parse(line) if role is not None]
        values = {role: made.get(role) or _text(record, role, task) for role in roles}
        missing = [role for role in roles if values[role] is None]
        if not missing:
            lines.append(line.format(**values))
        elif missing[0] not in OPTIONAL or len(roles) > 1:
            raise _BadRecord(f'must have a text in "{_shown(task.fields, missing[0])}", got {_keys(record)}')
    return "\n".join(lines)


def _text(record: Record, role: str, task: Task) -> str | None:
    value = _find(record, task.fields, role)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise _BadRecord(f'must have a text in "{_shown(task.fields, role)}", got {type(value).__name__}')
    words = task.words.get(role)
    if words is None:
        return value
    if value not in words:
        raise _BadRecord(f'must have one of {", ".join(words)} in "{role}", got {value!r:.60}')
    return words[value]


def _find(record: Record, fields: Fields, role: str) -> Any:
    """The first of a field's places that the record has; None if it has none."""
    places = fields.get(role, role)
    if isinstance(places, tuple):
        values = [record.get(place) for place in places]
        return None if None in values else values
    for place in places.split("|"):
        value: Any = record
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _choices(record: Record, fields: Fields) -> tuple[str, ...]:
    values = _find(record, fields, "choices")
    if not isinstance(values, list) or len(values) < 2:
        raise _BadRecord(
            f'must have a list of two or more in "{_shown(fields, "choices")}", got {_keys(record)}'
        )
    return _texts(values, "choices")


def _texts(values: list[Any], what: str) -> tuple[str, ...]:
    """Strings, and numbers as strings."""
    texts = [str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in values]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise _BadRecord(f"must have {what} that are texts and not blank, got {values!r:.80}")
    return tuple(texts)


def _gold(record: Record, task: Task, choices: Sequence[str]) -> int:
    """A number from 0, a label of the record or the task, a choice's text or its letter; where two readings differ,
    the record is refused."""
    value = _find(record, task.fields, "gold")
    labels, readings = _labels(record, task, choices), set[int]()
    if isinstance(value, int | str) and not isinstance(value, bool):
        if str(value).lower() in labels:
            readings = {labels.index(str(value).lower())}
        elif isinstance(value, int):
            readings = {value}
        else:
            readings = {i for i, choice in enumerate(choices) if choice == value}
            readings |= {int(value)} if value.isascii() and value.isdigit() else set()
            alphabets = (HEBREW_LETTERS, LATIN_LETTERS)
            readings |= {
                letters.index(value) for letters in alphabets if len(value) == 1 and value in letters
            }
    inside = {i for i in readings if 0 <= i < len(choices)}
    if len(inside) != 1:
        place = _shown(task.fields, "gold")
        problem = "that means one choice" if inside else f"that names one of the {len(choices)} choices"
        raise _BadRecord(f'must have an answer in "{place}" {problem}, got {value!r:.60}')
    return inside.pop()


def _labels(record: Record, task: Task, choices: Sequence[str]) -> list[str]:
    """What the record calls its choices (ARC: letters, or numbers from 1), or else the task; in lower case."""
    found = _find(record, task.fields, "labels") if "labels" in task.fields else None
    if found is None:
        return [label.lower() for label in task.labels]
    place = _shown(task.fields, "labels")
    if not isinstance(found, list) or len(found) != len(choices):
        raise _BadRecord(f'must have a list of {len(choices)}, one a choice, in "{place}", got {found!r:.60}')
    labels = [label.lower() for label in _texts(found, "labels")]
    if len(set(labels)) < len(labels):
        raise _BadRecord(f'must have labels that differ in "{place}", got {found!r:.60}')
    return labels


def _answers(record: Record, task: Task) -> tuple[str, ...]:
    value = _find(record, task.fields, "answers")
    values = value if isinstance(value, list) or value is None else [value]
    if values == [] and task.no_answer:
        values = [task.no_answer]
    if not values:
        raise _BadRecord(f'must have an answer in "{_shown(task.fields, "answers")}", got {_keys(record)}')
    texts = _texts(values, "answers")
    for metric in task.metrics:
        for text in texts:
            if needed := lacking(metric, text):
                place = _shown(task.fields, "answers")
                raise _BadRecord(
                    f'must have {needed} in each answer of "{place}" for {metric}, got {text!r:.60}'
                )
    return texts


def _shown(fields: Fields, role: str) -> str:
    places = fields.get(role, role)
    return " and ".join(places) if isinstance(places, tuple) else places.replace("|", " or ")


def _keys(record: Record) -> str:
    return f"fields {sorted(record)[:8]}"

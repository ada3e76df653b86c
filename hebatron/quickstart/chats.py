"""The quickstart's chats: Hebrew questions and answers, and short translations both ways, from installed packages.

Four tasks of two turns each, in the shape `hebatron.chat.chats` reads:

    exercises        Hebrew   generated arithmetic, bare and in stories (exercises.py)
    translate_en_he  both     interface strings of JupyterLab and Django
    translate_he_en  both     other strings of the same
    continue_en      English  the end of a verse of the Leeser Bible: the base language is asked too
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hebatron.quickstart import corpus, exercises

EXERCISES, TRANSLATIONS, VERSES = 700, 350, 300  # translations: each way
_MAX_CHARACTERS = 120  # of a string or verse: a chat stays under some 100 tokens
_MIN_VERSE_WORDS = 12

Record = dict[str, Any]


def chat(task: str, lang: str, question: str, answer: str) -> Record:
    """One record of a chat file."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"task": task, "lang": lang, "source": "quickstart", "messages": messages}


def installed(seed: int = 0) -> list[Record]:
    """The chats of the installed packages; raises ValueError naming one that is missing."""
    pairs = corpus.interface_pairs(corpus.catalogues())
    return gather(pairs, corpus.english_chapters(corpus.english_bible()), seed)


def gather(pairs: Sequence[tuple[str, str]], english: Iterable[str], seed: int = 0) -> list[Record]:
    """Every chat, in an order drawn from `seed`.

    Args:
        pairs: (English, Hebrew) interface strings. A string is asked for in one direction only.
        english: chapters of the English Bible, a verse a line.
    """
    draw = random.Random(f"chats/{seed}")
    short = [pair for pair in pairs if max(map(len, pair)) <= _MAX_CHARACTERS]
    draw.shuffle(short)
    to_hebrew, to_english = short[:TRANSLATIONS], short[TRANSLATIONS : 2 * TRANSLATIONS]
    records = [chat("exercises", "he", *pair) for pair in exercises.questions(EXERCISES, seed)]
    records += [chat("translate_en_he", "en-he", f"תרגם לעברית: {en}", he) for en, he in to_hebrew]
    records += [chat("translate_he_en", "he-en", f"Translate to English: {he}", en) for en, he in to_english]
    halves = list(_halves(english))
    records += [chat("continue_en", "en", *pair) for pair in draw.sample(halves, min(VERSES, len(halves)))]
    draw.shuffle(records)
    return records


def _halves(chapters: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Verses cut in the middle: what is to be continued, and how it goes on."""
    for chapter in chapters:
        for verse in chapter.splitlines():
            words = verse.split()
            if len(words) >= _MIN_VERSE_WORDS and len(verse) <= 2 * _MAX_CHARACTERS:
                middle = len(words) // 2
                yield f"Continue: {' '.join(words[:middle])}", " ".join(words[middle:])


def write(records: Iterable[Record], path: Path) -> None:
    """The records as a .jsonl file of chats."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")

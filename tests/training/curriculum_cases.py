"""Three small corpora and a curriculum over them, for the tests of plans."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from hebatron.curriculum.build import Curriculum, Phase, Plan
from hebatron.data.prepare import Corpus, prepare
from hebatron.tokenizer import Tokenizer

SOURCES = {
    "easy": {"tales": [f"הילד {w} הלך הביתה ושתה מים." for w in "דן גל רון יעל נועה מיה".split()]},
    "hard": {
        "law": ["סעיף א. " + "כל אדם זכאי להגנה על קניינו, לפי הדין. " * n for n in (1, 3, 9)],
        "notes": ["הערה", "הערת שוליים ארוכה מעט יותר"],
    },
    "base": {
        "english": [f"It was a {w} day and the ships stayed in port." for w in ("wet", "cold", "very windy")],
        "code": ["def twice(x: int) -> int:\n    return 2 * x\n", "print(twice(21))\n"],
    },
}


class ByteTokenizer:
    """Stands in for a Tokenizer, so that recorded hashes depend on nothing but our own code."""

    fingerprint, vocab_size, eos_id = "bytes", 257, 256

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]


def make_corpora(folder: Path) -> dict[str, Corpus]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, sources in SOURCES.items():
        records = [{"text": text, "source": source} for source, texts in sources.items() for text in texts]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        prepare([folder / f"{name}.jsonl"], folder / name, cast(Tokenizer, ByteTokenizer()))
    return {name: Corpus.open(folder / name) for name in SOURCES}


def three_phases(
    order: Any = "forward", shares: Sequence[float] = (0.3, 0.2, 0.1), **changes: Any
) -> Curriculum:
    phases = (
        Phase("base", {"base": 1}, tokens=320, seq_len=32, pinned=True),
        Phase("easy", {"easy": 1}, tokens=1000, seq_len=32, anchor_share=shares[0]),
        Phase("mixed", {"easy": 1, "hard/law": 2.5}, tokens=2000, seq_len=32, anchor_share=shares[1]),
        Phase("long", {"hard": 1}, tokens=3000, seq_len=80, anchor_share=shares[2]),
    )
    return Curriculum(phases, {"base/english": 3, "base/code": 1}, order, **changes)


ORDERS = [
    "forward",
    "easy_to_hard",
    "reversed",
    "shuffled",
    ("base", "mixed", "long", "easy"),
    ("long", "base", "easy", "mixed"),
]


def row_table(plan: Plan, row: int) -> list[tuple[int, ...]]:
    return [tuple(s) for s in plan.segments[plan.row_segments[row] : plan.row_segments[row + 1]].tolist()]


def document_pairs(corpus: Corpus) -> Counter[tuple[int, int]]:
    return Counter((d, t) for d in range(len(corpus)) for t in range(int(corpus.lengths[d]) - 1))


def change_phase(i: int, **changes: Any) -> Callable[[Curriculum], Curriculum]:
    def change(curriculum: Curriculum) -> Curriculum:
        phases = list(curriculum.phases)
        phases[i] = dataclasses.replace(phases[i], **changes)
        return dataclasses.replace(curriculum, phases=tuple(phases))

    return change

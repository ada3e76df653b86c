"""What the runs of experiment.py learnt and forgot: bits per byte and choices among four, on documents no run read.

    python bench/curriculum/measure.py OUT    # the finished runs not measured yet: OUT/runs/*/measured.json

Sets of four choices, made from held-out documents, the same for every run. A context is 32 words of a document:
    next   the 8 words that follow, or 8 words of other documents of the same source
    near   the 8 words that follow, or 8 later words of the same document
    order  the 8 words that follow, or the same with two neighbours exchanged
each on Hebrew of the three phases, and `next` on the anchor's sources.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiment import PHASES, Size, held_out

from hebatron.data.corpus import Corpus
from hebatron.data.difficulty import document_text
from hebatron.evaluation.evaluate import bits_per_byte
from hebatron.evaluation.scoring import Item, multiple_choice
from hebatron.files import replace_text
from hebatron.model import Hebatron
from hebatron.tokenizer import Tokenizer, load_tokenizer

CONTEXT_WORDS, CHOICE_WORDS, CHOICES = 32, 8, 4
ITEMS = {"hebrew": 200, "anchor": 400}  # a corpus and set
Words = list[str]


def documents(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, list[Words]]:
    """The words of each document long enough for every set, by source, in the order of the texts' hashes."""
    by_source: dict[str, list[Words]] = {}
    for i in sorted(range(len(corpus)), key=corpus.hash):
        words = document_text(corpus, tokenizer, i).split()
        if len(words) >= 2 * (CONTEXT_WORDS + CHOICE_WORDS):
            by_source.setdefault(corpus.source(i), []).append(words)
    return {source: found for source, found in by_source.items() if len(found) >= CHOICES}


def cut(draw: random.Random, words: Words) -> Words:
    begin = draw.randrange(len(words) - CHOICE_WORDS + 1)
    return words[begin : begin + CHOICE_WORDS]


def others(draw: random.Random, group: list[Words], which: int, end: int) -> list[Words]:
    return [
        cut(draw, group[i]) for i in draw.sample([i for i in range(len(group)) if i != which], CHOICES - 1)
    ]


def later(draw: random.Random, group: list[Words], which: int, end: int) -> list[Words]:
    return [cut(draw, group[which][end:]) for _ in range(CHOICES - 1)]


def exchanged(draw: random.Random, group: list[Words], which: int, end: int) -> list[Words]:
    truth = group[which][end - CHOICE_WORDS : end]
    swaps = []
    for i in draw.sample(range(CHOICE_WORDS - 1), CHOICES - 1):
        swaps.append([*truth[:i], truth[i + 1], truth[i], *truth[i + 2 :]])
    return swaps


Distractors = Callable[[random.Random, list[Words], int, int], list[Words]]
SETS: dict[str, Distractors] = {"next": others, "near": later, "order": exchanged}


def items(name: str, corpus_name: str, by_source: dict[str, list[Words]], count: int) -> list[Item]:
    """`count` items of one set, sources and documents drawn evenly; no choice occurs twice in an item."""
    draw, made = random.Random(f"{name}/{corpus_name}"), []
    while len(made) < count:
        group = by_source[draw.choice(sorted(by_source))]
        which = draw.randrange(len(group))
        last = len(group[which]) - CHOICE_WORDS  # room for a later distractor
        end = draw.randrange(CONTEXT_WORDS + CHOICE_WORDS, last + 1)
        begin = end - CHOICE_WORDS
        truth = group[which][begin:end]
        choices = [" " + " ".join(words) for words in (truth, *SETS[name](draw, group, which, end))]
        gold = draw.randrange(CHOICES)
        choices[0], choices[gold] = choices[gold], choices[0]
        if len(set(choices)) == CHOICES:
            made.append(Item(" ".join(group[which][begin - CONTEXT_WORDS : begin]), choices, gold))
    return made


def all_items(out: Path, size: Size) -> dict[str, list[Item]]:
    """Items by "set/corpus"."""
    tokenizer = load_tokenizer(out / "tokenizer")
    made = {}
    for corpus_name, corpus in held_out(out, size).items():
        by_source = documents(corpus, tokenizer)
        for name in SETS if corpus_name in PHASES else ("next",):
            count = ITEMS["hebrew" if corpus_name in PHASES else "anchor"]
            made[f"{name}/{corpus_name}"] = items(name, corpus_name, by_source, count)
    return made


def measure(out: Path, name: str, size: Size, made: dict[str, list[Item]]) -> dict[str, Any]:
    """Over all held-out text bits per byte and bytes, by corpus and source; by set, "1" where the item was right."""
    final = out / "runs" / name / "final"
    model, tokenizer = Hebatron.from_pretrained(final).eval(), load_tokenizer(final)
    unseen = held_out(out, size)
    bpb = {corpus_name: bits_per_byte(model, corpus) for corpus_name, corpus in unseen.items()}
    num_bytes = {corpus_name: bytes_by_source(corpus) for corpus_name, corpus in unseen.items()}
    right: dict[str, str] = {}
    for set_name, questions in made.items():
        scores = multiple_choice(model, tokenizer, questions).scores
        best = [max(range(CHOICES), key=lambda c, row=row: row[c].log_prob) for row in scores]
        right[set_name] = "".join(
            str(int(choice == q.gold)) for choice, q in zip(best, questions, strict=True)
        )
    return {"bpb": bpb, "bytes": num_bytes, "right": right}


def bytes_by_source(corpus: Corpus) -> dict[str, int]:
    counts: dict[str, int] = {}
    for i in range(len(corpus)):
        counts[corpus.source(i)] = counts.get(corpus.source(i), 0) + corpus.byte_count(i)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path)
    arguments = parser.parse_args()
    out, size = arguments.out, Size()
    made = all_items(out, size)
    for final in sorted((out / "runs").glob("*/final")):
        path = final.parent / "measured.json"
        if not path.exists():
            measured = measure(out, final.parent.name, size, made)
            replace_text(path, json.dumps(measured))
            accuracy = {key: f"{row.count('1') / len(row):.3f}" for key, row in measured["right"].items()}
            print(final.parent.name, accuracy, flush=True)


if __name__ == "__main__":
    main()

"""`hebatron data score`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    score = add_verb(group, "score", run, "measure how hard each document is, and split a corpus into phases")
    score.add_argument("corpus", metavar="CORPUS", type=Path)
    score.add_argument("--tokenizer", type=Path, required=True, help="the folder of the corpus's tokenizer")
    score.add_argument("--phases", type=int, default=3, help="print the split into this many equal shares")


def run(arguments: Arguments) -> int:
    from hebatron.corpus import Corpus, write_scores
    from hebatron.difficulty import MEASURES, measure, split_phases
    from hebatron.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    if arguments.phases < 1:
        raise ValueError(f"data score: --phases must be at least 1, got {arguments.phases}")
    corpus = Corpus.open(arguments.corpus, tokenizer)
    columns = measure(corpus, tokenizer)
    write_scores(arguments.corpus, columns, {"name": "ranks-v1", "measures": list(MEASURES)})
    phases = split_phases(columns["difficulty"], corpus.lengths, [1.0] * arguments.phases)
    for phase in range(arguments.phases):
        inside = phases == phase
        means = "  ".join(f"{name} {columns[name][inside].mean():.3f}" for name in columns if inside.any())
        print(
            f"phase {phase + 1}: {inside.sum():,} documents {corpus.lengths[inside].sum():,} tokens  {means}"
        )
    return 0

"""`hebatron data split`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    split = add_verb(group, "split", run, "cut a scored corpus into corpora by difficulty, easiest first")
    split.add_argument("corpus", metavar="CORPUS", type=Path)
    split.add_argument("--out", required=True, type=Path, help="a new folder, for part-1, part-2, ...")
    split.add_argument("--by", default="difficulty", help="the column of data score to cut by")
    shares = split.add_mutually_exclusive_group()
    shares.add_argument("--parts", type=int, default=3, help="parts of equal tokens")
    shares.add_argument(
        "--shares",
        type=float,
        nargs="+",
        metavar="S",
        help="each part's share of the tokens, for example 3 1 2",
    )


def run(arguments: Arguments) -> int:
    from hebatron.data.corpus_parts import split_corpus

    if arguments.parts < 1:
        raise ValueError(f"data split: --parts must be at least 1, got {arguments.parts}")
    shares = arguments.shares or [1.0] * arguments.parts
    for part in split_corpus(arguments.corpus, arguments.out, arguments.by, shares):
        print(
            f"{part.folder}: {part.documents:,} documents, {part.tokens:,} tokens, "
            f"{arguments.by} {part.low:.4f} to {part.high:.4f}"
        )
    return 0

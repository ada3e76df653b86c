"""`hebatron data inspect`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    inspect = add_verb(
        group, "inspect", run, "what a corpus holds: counts, lengths, duplicates, letters, ledger, samples"
    )
    inspect.add_argument("corpus", metavar="CORPUS", type=Path)
    inspect.add_argument(
        "--tokenizer",
        type=Path,
        help="the corpus's tokenizer: adds words, letters, near-duplicates and samples",
    )
    inspect.add_argument("--samples", type=int, help="documents to show the beginning of (default 3)")
    inspect.add_argument("--json", action="store_true", help="everything as one JSON object")


def run(arguments: Arguments) -> int:
    import json

    from hebatron.data.corpus import Corpus
    from hebatron.data.inspection import inspect_corpus, lines
    from hebatron.tokenizer import load_tokenizer

    samples = 3 if arguments.samples is None else arguments.samples
    if samples < 0:
        raise ValueError(f"data inspect: --samples must be at least 0, got {samples}")
    if arguments.samples is not None and arguments.tokenizer is None:
        raise ValueError("data inspect: --tokenizer must be given with --samples, got none")
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    found = inspect_corpus(Corpus.open(arguments.corpus, tokenizer), tokenizer, samples)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(lines(found)))
    return 0

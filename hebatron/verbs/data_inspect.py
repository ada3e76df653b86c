"""`hebatron data inspect`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    inspect = add_verb(
        group, "inspect", run, "what a corpus holds: counts, lengths, ledger, difficulty, samples"
    )
    inspect.add_argument("corpus", metavar="CORPUS", type=Path)
    inspect.add_argument("--tokenizer", type=Path, help="the corpus's tokenizer: adds words and samples")
    inspect.add_argument("--samples", type=int, default=3, help="documents to show the beginning of")


def run(arguments: Arguments) -> int:
    import numpy as np

    from hebatron.corpus import Corpus
    from hebatron.difficulty import document_text, words
    from hebatron.metrics import printable, printable_name
    from hebatron.tokenizer import load_tokenizer

    if arguments.samples < 0:
        raise ValueError(f"data inspect: --samples must be at least 0, got {arguments.samples}")
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    corpus = Corpus.open(arguments.corpus, tokenizer)
    print(f"{len(corpus):,} documents, {corpus.num_tokens:,} tokens, {corpus.num_bytes:,} bytes")
    for name in corpus.sources:
        inside = corpus.source_ids == corpus.sources.index(name)
        low, middle, high, longest = np.quantile(corpus.lengths[inside], (0.05, 0.5, 0.95, 1)).astype(int)
        print(f"  {inside.sum():>9,} documents {corpus.lengths[inside].sum():>13,} tokens, of a document (5 %, 50 %, "
              f"95 %, longest) {low:,} {middle:,} {high:,} {longest:,}  {printable_name(name)}")  # fmt: skip
        for column, values in corpus.columns.items():
            low, middle, high = np.quantile(values[inside], (0.05, 0.5, 0.95))
            print(f"            {column:<15} (5 %, 50 %, 95 %) {low:.3f} {middle:.3f} {high:.3f}")
    ledger = corpus.index["ledger"]
    print(
        f"ledger: {ledger['read']:,} read = {ledger['used']:,} used + {sum(ledger['dropped'].values()):,} dropped"
    )
    for name in ("dropped", "removed_characters", "normalized", "repeated_ids"):
        if ledger.get(name):
            print(f"  {name}: {ledger[name]}")
    if tokenizer is None:
        return 0
    for lang in corpus.langs:
        of_lang = np.flatnonzero(corpus.lang_ids == corpus.langs.index(lang))
        count = sum(len(words(document_text(corpus, tokenizer, int(i)))) for i in of_lang)
        tokens = corpus.lengths[of_lang].sum()
        print(f"{printable_name(lang)}: {count:,} words, {tokens / max(count, 1):.3f} tokens per word")
    for i in sorted(range(len(corpus)), key=corpus.hash)[: arguments.samples]:  # any order, always the same
        print(
            f"\ndocument {i}, {printable_name(corpus.id(i) or 'no id')}, {printable_name(corpus.source(i))}:"
        )
        print(printable(document_text(corpus, tokenizer, i)[:300]))
    return 0

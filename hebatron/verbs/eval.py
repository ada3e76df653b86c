"""`hebatron eval`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb, open_model


def register(group: VerbGroup) -> None:
    evaluate = add_verb(group, "eval", run, "bits per byte of a prepared corpus, by source")
    evaluate.add_argument("model", metavar="RUN|MODEL", type=Path, help="a run or model folder")
    evaluate.add_argument("corpora", metavar="CORPUS", nargs="+", type=Path)
    evaluate.add_argument("--max-tokens", type=int, help="at most this many tokens of each source")


def run(arguments: Arguments) -> int:
    from hebatron.data import Corpus
    from hebatron.evaluate import bits_per_byte
    from hebatron.metrics import printable_name

    model, tokenizer, _ = open_model(arguments.model)
    for folder in arguments.corpora:
        corpus = Corpus.open(folder, tokenizer)
        for source, value in bits_per_byte(model, corpus, max_tokens=arguments.max_tokens).items():
            print(f"{value:8.4f} bits per byte  {folder}  {printable_name(source)}")
    return 0

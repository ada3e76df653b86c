"""`hebatron data prepare`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hebatron.verbs import Arguments, VerbGroup, add_verb

if TYPE_CHECKING:
    from hebatron.tokenizer import Tokenizer


def register(group: VerbGroup) -> None:
    prepare = add_verb(
        group, "prepare", run, "tokenise .txt, .jsonl(.zst), .parquet and .arrow files into a corpus"
    )
    prepare.add_argument(
        "inputs", metavar="IN", nargs="+", type=Path, help="files, folders of them, or hf:NAME[@SPLIT]"
    )
    prepare.add_argument("--out", required=True, type=Path, help="the corpus folder to write")
    tokenizer = prepare.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json")
    tokenizer.add_argument(
        "--train-tokenizer", type=Path, metavar="DIR", help="train a byte-level BPE, saved as DIR at the end"
    )
    prepare.add_argument("--vocab-size", type=int, help="entries of a trained tokenizer (default 8192)")
    prepare.add_argument(
        "--source",
        help="name of the source (default: each record's, or the file's name; a folder's for its .txt)",
    )
    prepare.add_argument("--lang", help="language code (default: each record's)")
    prepare.add_argument("--text-field", default="text", help="field of a .jsonl record that holds the text")
    prepare.add_argument(
        "--bad", choices=("error", "drop"), default="error", help="what a broken document does"
    )
    prepare.add_argument(
        "--bidi", choices=("drop", "keep"), default="drop", help="direction marks in the text"
    )
    prepare.add_argument(
        "--normalize", choices=("none", "hebrew-v1"), default="none", help="rules for the spelling of Hebrew"
    )
    prepare.add_argument(
        "--near-duplicates",
        nargs="?",
        type=float,
        const=0.8,
        metavar="SIMILARITY",
        help="drop texts this similar to an earlier one (0.8 if no number is given)",
    )
    prepare.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens of one document, its end included"
    )
    prepare.add_argument(
        "--long", choices=("error", "drop", "split"), default="error", help="what a longer document does"
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace another corpus in --out")


def run(arguments: Arguments) -> int:
    from hebatron.data.prepare import check_out, prepare, read_texts
    from hebatron.tokenizer import load_tokenizer, train_bpe
    from hebatron.training.metrics import printable_name

    names = (
        "source",
        "lang",
        "text_field",
        "bidi",
        "bad",
        "normalize",
        "near_duplicates",
        "max_tokens",
        "long",
    )
    policy = {name: getattr(arguments, name) for name in names}
    if arguments.tokenizer is not None and arguments.vocab_size is not None:
        raise ValueError(
            f"data prepare: --train-tokenizer must be given with --vocab-size, got --tokenizer {arguments.tokenizer}"
        )
    vocab_size = 8192 if arguments.vocab_size is None else arguments.vocab_size
    if arguments.tokenizer is not None:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        check_out(arguments.out)  # before the work
        earlier = _earlier_tokenizer(arguments.train_tokenizer)
        tokenizer = train_bpe(read_texts(arguments.inputs, **policy), vocab_size)
        if earlier is not None and earlier.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                "data prepare: --train-tokenizer must be a new or empty folder, or hold the tokenizer these inputs "
                f"give, got another in {arguments.train_tokenizer}"
            )
    report = prepare(arguments.inputs, arguments.out, tokenizer, overwrite=arguments.overwrite, **policy)
    if arguments.train_tokenizer is not None and earlier is None:
        _save_whole(tokenizer, arguments.train_tokenizer)
    done = "already there" if report.reused else f"written in {report.seconds:.1f} s"
    print(f"{report.folder}: {report.documents:,} documents, {report.tokens:,} tokens, {done}")
    for source, counts in report.by_source.items():
        per_token = counts["bytes"] / counts["tokens"]
        totals = f"{counts['documents']:>9,} documents {counts['tokens']:>13,} tokens"
        print(f"  {totals} {per_token:>6.2f} bytes/token  {printable_name(source)}")
    print(f"  {report.read:>9,} documents read, {report.used:,} used, dropped: {report.dropped or 'none'}")
    if report.split:
        print(f"  {report.split['documents']:>9,} documents split into {report.split['pieces']:,}")
    if report.normalized:
        print(f"  characters changed by {arguments.normalize}: {report.normalized}")
    return 0


def _earlier_tokenizer(folder: Path) -> Tokenizer | None:
    """What an earlier --train-tokenizer left in `folder`; raises if something else is there."""
    from hebatron.tokenizer import load_tokenizer

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"data prepare: --train-tokenizer must be a new or empty folder, got {folder}")
    return load_tokenizer(folder)


def _save_whole(tokenizer: Tokenizer, folder: Path) -> None:
    """Save under another name beside `folder`, then rename: it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        tokenizer.save(Path(scratch) / "tokenizer")
        (Path(scratch) / "tokenizer").rename(folder)

"""The `hebatron` command: one verb, one function here; everything heavy is imported inside it.

Bad input (ValueError, BackendError, OSError) is one line on stderr and exit code 2; --debug shows the
traceback. Hebrew is printed on lines of its own, never inside a table: its order is the terminal's work.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hebatron.model import Hebatron
    from hebatron.tokenizer import Tokenizer

Arguments = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    # An idle OpenMP thread spins 300,000 rounds by default, on the core that the thread it waits for needs.
    # Quickstart steps on 2 cores, tokens/s at 300,000 and 3,000 rounds: 3,600 and 3,900 alone, 260 and 2,100
    # beside another 2-thread process. libgomp reads this when torch loads it; a user's own setting stays.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    parser = build_parser()
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and arguments.run is not run_train:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    arguments.overrides = overrides
    try:
        code: int = arguments.run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if arguments.debug or not _is_expected(error):
            raise
        from hebatron.metrics import printable_name

        print(f"hebatron: {printable_name(_one_line(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hebatron: interrupted", file=sys.stderr)
        return 130
    return code


def _is_expected(error: Exception) -> bool:
    from hebatron_kernels import BackendError  # imports torch, which a typing error should not wait for

    return isinstance(error, (ValueError, OSError, BackendError))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _seed(text: str) -> int:
    """A seed as torch takes it; argparse reports the ValueError of a text that is no integer."""
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**63), got {text}")
    return seed


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; parsing imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="hebatron", description="Train, adapt and run Hebatron-class models."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(
        group: argparse._SubParsersAction[argparse.ArgumentParser],
        name: str,
        run: Callable[[Arguments], int],
        help: str,
    ) -> argparse.ArgumentParser:
        added = group.add_parser(name, help=help, description=help, parents=[common])
        added.set_defaults(run=run)
        return added

    verb(verbs, "doctor", run_doctor, "what is compiled, which form serves each operator, and a self-check")

    info = verb(verbs, "info", run_info, "layers, parameters and memory of a model")
    info.add_argument("model", metavar="PATH|PRESET", help="a folder or config.json, or a preset's name")
    info.add_argument("--context", type=int, default=65536, help="tokens of context for the memory figures")

    quick = verb(verbs, "quickstart", run_quickstart, "train, check and export a small Hebrew model, offline")
    quick.add_argument(
        "--out", type=Path, help="a new or empty folder (default: runs/quickstart, or -2, ...)"
    )
    quick.add_argument("--seed", type=_seed, default=0)
    quick.add_argument("--resume", action="store_true", help="go on in --out where an earlier one stopped")

    data = verbs.add_parser("data", help="prepare training text").add_subparsers(
        metavar="VERB", required=True
    )
    prepare = verb(data, "prepare", run_prepare, "tokenise .txt, .jsonl and .jsonl.zst files into a corpus")
    prepare.add_argument("inputs", metavar="IN", nargs="+", type=Path, help="files, or folders of them")
    prepare.add_argument("--out", required=True, type=Path, help="the corpus folder to write")
    tokenizer = prepare.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json")
    tokenizer.add_argument(
        "--train-tokenizer", type=Path, metavar="DIR", help="train a byte-level BPE, saved as DIR at the end"
    )
    prepare.add_argument("--vocab-size", type=int, default=8192, help="entries of a trained tokenizer")
    prepare.add_argument("--source", help="name of the source (default: each record's, or the file's name)")
    prepare.add_argument("--lang", help="language code (default: each record's)")
    prepare.add_argument("--text-field", default="text", help="field of a .jsonl record that holds the text")
    prepare.add_argument(
        "--bad", choices=("error", "drop"), default="error", help="what a broken document does"
    )
    prepare.add_argument(
        "--bidi", choices=("drop", "keep"), default="drop", help="direction marks in the text"
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace another corpus in --out")

    train = verb(verbs, "train", run_train, "train from a run file; resumes where the run folder left off")
    train.add_argument("run_file", metavar="RUN.toml", type=Path)
    train.add_argument(
        "--force", action="store_true", help="resume although the run file or the plan has changed"
    )
    train.epilog = "Any field of the run file can be given as --section.field VALUE."

    evaluate = verb(verbs, "eval", run_eval, "bits per byte of a prepared corpus, by source")
    evaluate.add_argument("model", metavar="RUN|MODEL", type=Path, help="a run or model folder")
    evaluate.add_argument("corpora", metavar="CORPUS", nargs="+", type=Path)
    evaluate.add_argument("--max-tokens", type=int, help="at most this many tokens of each source")

    generate = verb(verbs, "generate", run_generate, "continue a prompt")
    generate.add_argument("model", metavar="RUN|MODEL", type=Path, help="a run or model folder")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=_seed, default=0)

    export = verbs.add_parser("export", help="write a model for others").add_subparsers(
        metavar="VERB", required=True
    )
    hub = verb(export, "hf", run_export, "write a folder that transformers and serving engines open")
    hub.add_argument("source", metavar="RUN|MODEL", type=Path, help="a run or model folder")
    hub.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    hub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")

    plot = verb(verbs, "plot", run_plot, "draw a run's metrics as a PNG")
    plot.add_argument("run_folder", metavar="RUN", type=Path)
    plot.add_argument("--out", type=Path, help="default: RUN/metrics.png")
    return parser


def run_doctor(arguments: Arguments) -> int:
    from hebatron.doctor import examine

    diagnosis = examine()
    print(diagnosis.text())
    return 1 if diagnosis.problems else 0


def run_info(arguments: Arguments) -> int:
    from hebatron.config import ModelConfig
    from hebatron.presets import PRESETS
    from hebatron.sizes import describe

    if arguments.model in PRESETS:
        config = PRESETS[arguments.model]()
    elif Path(arguments.model).exists():
        config = ModelConfig.load(arguments.model)
    else:
        presets = ", ".join(PRESETS)
        raise ValueError(
            f"info: PATH|PRESET must be an existing path or one of {presets}, got {arguments.model}"
        )
    print(describe(config, arguments.context))
    return 0


def run_quickstart(arguments: Arguments) -> int:
    from hebatron.quickstart.run import quickstart

    return quickstart(arguments.out, seed=arguments.seed, resume=arguments.resume)


def run_prepare(arguments: Arguments) -> int:
    from hebatron.data import check_out, prepare, read_texts
    from hebatron.metrics import printable_name
    from hebatron.tokenizer import load_tokenizer, train_bpe

    policy = {name: getattr(arguments, name) for name in ("source", "lang", "text_field", "bidi", "bad")}
    if arguments.tokenizer is not None:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        check_out(arguments.out)  # before the work
        earlier = _earlier_tokenizer(arguments.train_tokenizer)
        tokenizer = train_bpe(read_texts(arguments.inputs, **policy), arguments.vocab_size)
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
    print(f"  {report.read:>9,} documents read, dropped: {report.dropped or 'none'}")
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


def run_train(arguments: Arguments) -> int:
    from hebatron.runconfig import load_run_config
    from hebatron.train import train

    train(load_run_config(arguments.run_file, arguments.overrides), force=arguments.force)
    return 0


def _open_model(path: Path) -> tuple[Hebatron, Tokenizer, Path]:
    """Model, tokenizer and the tokenizer's folder of a model folder or of a run: final/ or its newest checkpoint."""
    from hebatron.metrics import printable
    from hebatron.model import Hebatron
    from hebatron.run import open_trained, pick_device
    from hebatron.tokenizer import load_tokenizer

    if (path / "checkpoints").is_dir() and not (path / "final").is_dir():
        model, tokenizer_folder, notices = open_trained(path)
        for notice in notices:
            print(f"hebatron: {printable(notice)}", file=sys.stderr)
        return model.eval(), load_tokenizer(tokenizer_folder), tokenizer_folder
    if (path / "final").is_dir():
        path = path / "final"  # a run that reached its end; training further removes it
    return Hebatron.from_pretrained(path, device=pick_device()).eval(), load_tokenizer(path), path


def run_eval(arguments: Arguments) -> int:
    from hebatron.data import Corpus
    from hebatron.evaluate import bits_per_byte
    from hebatron.metrics import printable_name

    model, tokenizer, _ = _open_model(arguments.model)
    for folder in arguments.corpora:
        corpus = Corpus.open(folder, tokenizer)
        for source, value in bits_per_byte(model, corpus, max_tokens=arguments.max_tokens).items():
            print(f"{value:8.4f} bits per byte  {folder}  {printable_name(source)}")
    return 0


def run_generate(arguments: Arguments) -> int:
    import torch

    model, tokenizer, _ = _open_model(arguments.model)
    ids = tokenizer.encode(arguments.prompt)
    if not ids:
        raise ValueError(f"generate: PROMPT must hold at least one token, got {arguments.prompt!r}")
    out = model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    print(tokenizer.decode(out[0].tolist()))
    return 0


def run_export(arguments: Arguments) -> int:
    import torch

    from hebatron.hub import export_hf

    model, _, tokenizer_folder = _open_model(arguments.source)
    export_hf(model, tokenizer_folder, arguments.out, dtype=getattr(torch, arguments.dtype))
    print(f"{arguments.out}: open it with transformers' AutoModelForCausalLM and AutoTokenizer")
    return 0


def run_plot(arguments: Arguments) -> int:
    from hebatron.metrics import plot

    try:
        path = plot(arguments.run_folder, arguments.out)
    except ModuleNotFoundError as error:
        raise ValueError(
            'plot: matplotlib must be installed, got none; run: pip install "matplotlib>=3.8"'
        ) from error
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

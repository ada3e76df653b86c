"""The `hebatron` command: its parser, its error lines and its exit codes; each verb is a file of hebatron/verbs.

Bad input (ValueError, BackendError, OSError) is one line on stderr and exit code 2; --debug shows the
traceback. A reader that goes away ends the command quietly, as SIGPIPE would. Hebrew is printed on lines
of its own, never inside a table: its order is the terminal's work.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from hebatron.verbs import Arguments as Arguments
from hebatron.verbs import (
    Parser,
    average,
    bench,
    chat,
    data_inspect,
    data_prepare,
    data_score,
    data_split,
    doctor,
    export_hf,
    fields,
    generate,
    info,
    plan,
    plot,
    quickstart,
    report,
    train,
)
from hebatron.verbs import eval as evaluate


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    # An idle OpenMP thread spins 300,000 rounds by default, on the core that the thread it waits for needs.
    # Quickstart steps on 2 cores, tokens/s at 300,000 and 3,000 rounds: 3,600 and 3,900 alone, 260 and 2,100
    # beside another 2-thread process. libgomp reads this when torch loads it; a user's own setting stays.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    parser = build_parser()
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and not arguments.takes_overrides:
        arguments.parser.refuse(overrides)
    arguments.overrides = overrides
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # `hebatron ... | head` has read enough; Python's own flush at the end must not meet it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, RuntimeError) as error:
        if arguments.debug or not _is_expected(error):
            raise
        from .training.metrics import printable_name

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


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; parsing imports nothing heavy."""
    parser = Parser(prog="hebatron", description="Train, adapt and run Hebatron-class models.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    doctor.register(verbs)
    bench.register(verbs)
    info.register(verbs)
    quickstart.register(verbs)
    data = verbs.add_parser("data", help="prepare training text")
    data_verbs = data.add_subparsers(metavar="VERB", required=True)
    data_prepare.register(data_verbs)
    data_score.register(data_verbs)
    data_split.register(data_verbs)
    data_inspect.register(data_verbs)
    fields.register(verbs)
    plan.register(verbs)
    train.register(verbs)
    average.register(verbs)
    evaluate.register(verbs)
    generate.register(verbs)
    chat.register(verbs)
    export = verbs.add_parser("export", help="write a model for others")
    export_verbs = export.add_subparsers(metavar="VERB", required=True)
    export_hf.register(export_verbs)
    plot.register(verbs)
    report.register(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The verbs of the `hebatron` command, one file each.

A file holds `register(group)`, which adds the verb's parser with `add_verb`, and `run(arguments)`, which
does the work and returns the exit code. Everything heavy is imported inside `run`. cli.py lists the files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hebatron.spelling import did_you_mean

if TYPE_CHECKING:
    from hebatron.model import Hebatron
    from hebatron.tokenizer import Tokenizer

Arguments = argparse.Namespace
VerbGroup = argparse._SubParsersAction
OVERRIDES = "Any field of the run file can be given as --section.field VALUE; hebatron fields lists them."


class Parser(argparse.ArgumentParser):
    """A parser whose help tells defaults, and whose errors tell what a word that it does not know may have meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter, **options})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            told = f"must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}"
            raise argparse.ArgumentError(action, told)

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: VERB"):  # the verbs, with what they do
            self.exit(2, self.format_help())
        super().error(message)

    def refuse(self, words: list[str]) -> None:
        """The error of words that no argument takes."""
        hint = did_you_mean(words[0].partition("=")[0], self._option_string_actions)
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")


class _HelpFormatter(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        told, default = action.help or "", action.default
        if "default" in told or default is False or default in (None, argparse.SUPPRESS, []):
            return told
        return f"{told} (default: %(default)s)"


def add_verb(
    group: VerbGroup, name: str, run: Callable[[Arguments], int], help: str
) -> argparse.ArgumentParser:
    """One verb's parser, with --debug. A verb that takes any `--section.field VALUE` sets takes_overrides."""
    added: argparse.ArgumentParser = group.add_parser(name, help=help, description=help)
    added.add_argument("--debug", action="store_true", help="show the traceback of an error")
    added.set_defaults(run=run, parser=added, takes_overrides=False)
    return added


def seed(text: str) -> int:
    """A seed as torch takes it; argparse reports the ValueError of a text that is no integer."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**63), got {text}")
    return value


def open_model(path: Path) -> tuple[Hebatron, Tokenizer, Path]:
    """Model, tokenizer and the tokenizer's folder of a model folder or of a run: final/ or its newest checkpoint."""
    from hebatron.model import Hebatron
    from hebatron.tokenizer import load_tokenizer
    from hebatron.training.metrics import printable
    from hebatron.training.run import open_trained, pick_device

    if (path / "checkpoints").is_dir() and not (path / "final").is_dir():
        model, tokenizer_folder, notices = open_trained(path)
        for notice in notices:
            print(f"hebatron: {printable(notice)}", file=sys.stderr)
        return model.eval(), load_tokenizer(tokenizer_folder), tokenizer_folder
    if (path / "final").is_dir():
        path = path / "final"  # a run that reached its end; training further removes it
    return Hebatron.from_pretrained(path, device=pick_device()).eval(), load_tokenizer(path), path

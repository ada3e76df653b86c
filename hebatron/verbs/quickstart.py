"""`hebatron quickstart`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb, seed


def register(group: VerbGroup) -> None:
    quick = add_verb(group, "quickstart", run, "train, check and export a small Hebrew model, offline")
    quick.add_argument(
        "--out", type=Path, help="a new or empty folder (default: runs/quickstart, or -2, ...)"
    )
    quick.add_argument("--seed", type=seed, default=0, help="of weights, order of text and samples")
    quick.add_argument("--resume", action="store_true", help="go on in --out where an earlier one stopped")


def run(arguments: Arguments) -> int:
    from hebatron.quickstart.run import quickstart

    return quickstart(arguments.out, seed=arguments.seed, resume=arguments.resume)

"""`hebatron train`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    train = add_verb(group, "train", run, "train from a run file; resumes where the run folder left off")
    train.add_argument("run_file", metavar="RUN.toml", type=Path)
    train.add_argument(
        "--force", action="store_true", help="resume although the run file or the plan has changed"
    )
    train.epilog = "Any field of the run file can be given as --section.field VALUE."
    train.set_defaults(takes_overrides=True)


def run(arguments: Arguments) -> int:
    from hebatron.training.runconfig import load_run_config
    from hebatron.training.train import train

    train(load_run_config(arguments.run_file, arguments.overrides), force=arguments.force)
    return 0

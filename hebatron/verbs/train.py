"""`hebatron train`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import OVERRIDES, Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    train = add_verb(group, "train", run, "train from a run file; resumes where the run folder left off")
    train.add_argument("run_file", metavar="RUN.toml", type=Path)
    train.add_argument(
        "--force", action="store_true", help="resume although the run file or the plan has changed"
    )
    train.epilog = OVERRIDES
    train.set_defaults(takes_overrides=True)


def run(arguments: Arguments) -> int:
    from hebatron.training.inputs import check_inputs
    from hebatron.training.runconfig import load_run_config
    from hebatron.training.train import train

    config = load_run_config(arguments.run_file, arguments.overrides)
    check_inputs(config, arguments.run_file)
    train(config, force=arguments.force)
    return 0

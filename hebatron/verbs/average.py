"""`hebatron average`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    average = add_verb(group, "average", run, "the mean of a run's last checkpoints, as a model")
    average.add_argument("run_dir", metavar="RUN", type=Path)
    average.add_argument(
        "--last", type=int, default=2, help="how many checkpoints, at most training.keep_last"
    )


def run(arguments: Arguments) -> int:
    from hebatron.training.average import average_checkpoints

    print(average_checkpoints(arguments.run_dir, arguments.last))
    return 0

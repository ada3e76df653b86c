"""`hebatron plot`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    plot = add_verb(group, "plot", run, "draw a run's metrics as a PNG")
    plot.add_argument("run_folder", metavar="RUN", type=Path)
    plot.add_argument("--out", type=Path, help="default: RUN/metrics.png")


def run(arguments: Arguments) -> int:
    from hebatron.figures import plot

    try:
        path = plot(arguments.run_folder, arguments.out)
    except ModuleNotFoundError as error:
        raise ValueError(
            'plot: matplotlib must be installed, got none; run: pip install "matplotlib>=3.8"'
        ) from error
    print(path)
    return 0

"""`hebatron plot`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    plot = add_verb(group, "plot", run, "draw a run's metrics as a PNG, or compare several runs")
    plot.add_argument("run_folders", metavar="RUN", nargs="+", type=Path)
    plot.add_argument(
        "--out", type=Path, help="default: RUN/metrics.png, with several runs comparison.png here"
    )
    plot.add_argument("--over", choices=("tokens", "steps"), help="x axis of several runs (default: tokens)")


def run(arguments: Arguments) -> int:
    from hebatron.files import check_writable
    from hebatron.report.comparison import compare, comparison_lines
    from hebatron.report.figures import plot, plot_runs
    from hebatron.report.history import load_histories

    folders = arguments.run_folders
    if len(folders) == 1 and arguments.over is not None:
        raise ValueError(f"plot: two RUN or more must be given with --over, got {folders[0]} alone")
    if arguments.out is not None:
        check_writable(arguments.out, "plot: --out")
    if len(folders) == 1:
        print(plot(folders[0], arguments.out))
        return 0
    histories, names = load_histories(folders)
    path = plot_runs(histories, names, arguments.out or Path("comparison.png"), arguments.over or "tokens")
    print("\n".join(comparison_lines(compare(histories, names), histories, names)))
    print(path)
    return 0

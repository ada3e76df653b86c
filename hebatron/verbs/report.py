"""`hebatron report`."""

from __future__ import annotations

from pathlib import Path

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    report = add_verb(group, "report", run, "a run, or several compared, as one HTML page")
    report.add_argument("run_folders", metavar="RUN", nargs="+", type=Path)
    report.add_argument(
        "--out", type=Path, help="default: RUN/report.html, with several runs comparison.html here"
    )


def run(arguments: Arguments) -> int:
    from hebatron.files import check_writable
    from hebatron.report.comparison import write_comparison
    from hebatron.report.page import write_report

    folders = arguments.run_folders
    if arguments.out is not None:
        check_writable(arguments.out, "report: --out")
    if len(folders) == 1:
        print(write_report(folders[0], arguments.out))
    else:
        print(write_comparison(folders, arguments.out or Path("comparison.html")))
    return 0

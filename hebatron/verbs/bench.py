"""`hebatron bench`."""

from __future__ import annotations

import sys
from pathlib import Path

from hebatron.spelling import did_you_mean
from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    bench = add_verb(group, "bench", run, "time the operators against their peers and the machine's limits")
    bench.add_argument(
        "nouns", metavar="NOUN", nargs="*", help="norm, conv, ssd, linear, moe, attention, loss; default: all"
    )
    bench.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name holds one")
    bench.add_argument("--rounds", type=int, default=9, help="turns of each rival, of which the medians are")
    bench.add_argument("--seconds", type=float, default=8.0, help="the most one rival takes for a case")
    bench.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of kernels.json, roofline.png"
    )


def run(arguments: Arguments) -> int:
    import hebatron

    folder = Path(hebatron.__file__).resolve().parent.parent / "bench"
    if not (folder / "suite.py").is_file():
        raise ValueError(
            f"bench: hebatron must be a source checkout, which has the benchmarks, got {folder.parent}"
        )
    if arguments.rounds < 1:
        raise ValueError(f"bench: --rounds must be >= 1, got {arguments.rounds}")
    sys.path.insert(0, str(folder))
    from suite import NOUNS, run_suite

    wrong = [noun for noun in arguments.nouns if noun not in NOUNS]
    if wrong:
        hint = did_you_mean(wrong[0], NOUNS)
        raise ValueError(f"bench: NOUN must be one of {', '.join(NOUNS)}, got {wrong[0]}{hint}")
    run_suite(arguments.nouns or NOUNS, arguments.only, arguments.rounds, arguments.seconds, arguments.out)
    return 0

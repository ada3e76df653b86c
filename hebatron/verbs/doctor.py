"""`hebatron doctor`."""

from __future__ import annotations

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    add_verb(group, "doctor", run, "what is compiled, which form serves each operator, and a self-check")


def run(arguments: Arguments) -> int:
    from hebatron.doctor import examine

    diagnosis = examine()
    print(diagnosis.text())
    return 1 if diagnosis.problems else 0

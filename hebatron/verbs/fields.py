"""`hebatron fields`."""

from __future__ import annotations

from hebatron.verbs import Arguments, VerbGroup, add_verb


def register(group: VerbGroup) -> None:
    fields = add_verb(group, "fields", run, "every field of a run file: default, type, meaning")
    fields.add_argument("name", metavar="NAME", nargs="?", help="a section or field; default: all")


def run(arguments: Arguments) -> int:
    from hebatron.training.listing import listing

    print(listing(arguments.name))
    return 0

"""Every field of a run file with its default, type, condition and meaning, as TOML: what `hebatron fields` prints.

Read from the dataclasses: a field means what the comment behind it says, a section what its docstring begins with.
A field without a default, or with none that TOML can write, is a comment.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

from ..spelling import did_you_mean
from .sections import RunConfig
from .trees import default_of, plain, type_name

WIDTH = 32  # of `name = default`; what follows stands behind it
Section = tuple[str, str, dict[str, str]]  # place, head, and the line of each field


def listing(name: str | None = None) -> str:
    """The whole run file, or the section or field of this name; ValueError with the closest for one there is not."""
    sections = list(_sections(RunConfig, "", ""))
    known = [f"{place}.{key}".strip(".") for place, _, lines in sections for key in ("", *lines)]
    if name and name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"fields: NAME must be a section or field of a run file, got {name}{hint}")
    blocks = []
    for place, head, lines in sections:
        chosen = [
            line
            for key, line in lines.items()
            if not name or f"{place}.{key}.".lstrip(".").startswith(f"{name}.")
        ]
        if chosen:
            blocks.append("\n".join([head, *chosen]))
    return "\n\n".join(blocks)


def _sections(kind: type[Any], place: str, head: str) -> Iterator[Section]:
    """The section of this dataclass, then those inside it; `head`: its TOML header."""
    hints, comments = typing.get_type_hints(kind), _comments(kind)
    lines: dict[str, str] = {}
    inside: list[tuple[type[Any], str, str]] = []
    for spec in dataclasses.fields(kind):
        hint, where = hints[spec.name], f"{place}.{spec.name}".lstrip(".")
        inner = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        if inner is None:
            lines[spec.name] = _line(spec, hint, comments[spec.name])
        else:
            header = f"[[{where}]]" if typing.get_origin(hint) is tuple else f"[{where}]"
            told = f"  # {comments[spec.name]}" if comments[spec.name] else ""
            inside.append((typing.cast(type[Any], inner), where, f"{header}{told}"))
    told = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    yield place, f"# {told}\n{head}".rstrip(), lines
    for section in inside:
        yield from _sections(*section)


def _line(spec: dataclasses.Field[Any], hint: Any, meaning: str) -> str:
    default = default_of(spec)
    if default is dataclasses.MISSING or default is None:
        setting = f"# {spec.name} ="
    else:
        setting = f"{spec.name} = {json.dumps(plain(default), ensure_ascii=False)}"
    parts = [type_name(hint), spec.metadata.get("condition"), default is dataclasses.MISSING and "required"]
    return f"{setting:<{WIDTH}}  # {meaning} ({', '.join(part for part in parts if part)})"


def _comments(kind: type[Any]) -> dict[str, str]:
    """What stands as a comment behind each field, on any of its lines."""
    source = inspect.getsource(kind)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {
        token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    found: dict[str, str] = {}
    for node in typing.cast(ast.ClassDef, definition).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(by_line[line] for line in lines if line in by_line)
    return found

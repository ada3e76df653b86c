"""Trees of frozen dataclasses as tables of plain values, and back: what run files and checkpoints hold.

Unknown keys are refused with "did you mean", and every error names the place: `phases[1].tokens must be ...`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..spelling import did_you_mean

TYPE_NAMES = {str: "a string", Path: "a string", int: "an integer", float: "a number", bool: "true or false"}


def from_table(kind: type[Any], table: Mapping[str, Any], place: str = "") -> Any:
    """Build dataclass `kind` from a TOML table, refusing unknown keys, missing keys and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{place}." if place else ""
    for key in table:
        if key not in fields:
            raise ValueError(f"{prefix}{key} must be one of {', '.join(fields)}{did_you_mean(key, fields)}")
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in table:
            raise ValueError(f"{prefix}{name} must be given, got nothing")
    hints = typing.get_type_hints(kind)
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:  # a dataclass that checks itself, such as Phase
        raise ValueError(f"{place}: {error}") from error


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return tuple(value) if isinstance(value, list) else value
    if origin in (
        typing.Union,
        types.UnionType,
    ):  # "X | None" (null in a saved run), "str | tuple[str, ...]" and "float | dict[str, float] | None"
        if value is None and types.NoneType in args:
            return None
        wanted = tuple if isinstance(value, list) else dict if isinstance(value, dict) else None
        fits = [arg for arg in args if wanted is not None and get_origin(arg) is wanted]
        return _convert((fits or args)[0], value, place)
    if origin is Literal:
        if value not in args:
            choices = ", ".join(map(str, args))
            raise ValueError(f"{place} must be one of {choices}, got {value!r}{did_you_mean(value, args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{place} must be an array, got {value!r}")
        return tuple(_convert(args[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin is dict or dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{place} must be a table, got {value!r}")
        if origin is dict:
            return {key: _convert(args[1], item, f"{place}.{key}") for key, item in value.items()}
        return from_table(hint, value, place)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{place} must be {TYPE_NAMES[hint]}, got {value!r}")
    return value


def type_name(hint: Any) -> str:
    """The type of a field in the words of the errors: "an integer", "one of drop, cut", "an array, each a string"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args if arg is not types.NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (tuple, dict):
        each, many = (args[0], "an array") if origin is tuple else (args[1], "a table")
        return many if each is Any else f"{many}, each {type_name(each)}"
    return TYPE_NAMES.get(hint, "a table")


def hint_at(hint: Any, key: str) -> Any:
    """The type of the field that a dotted key such as phases.1.tokens names in dataclass `hint`."""
    for part in key.split("."):
        options = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        hint = next(o for o in options if dataclasses.is_dataclass(o) or get_origin(o) in (tuple, dict))
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint)[part]
        else:
            hint = get_args(hint)[0 if get_origin(hint) is tuple else 1]
    return hint


def to_table(config: Any, *, hashed_only: bool = False) -> dict[str, Any]:
    """The tree as JSON values; `hashed_only` leaves out what cannot change the weights."""
    table: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value = plain(getattr(config, spec.name), hashed_only)
        if hashed_only and not spec.metadata.get("hashed", True):
            continue
        if hashed_only and "young" in spec.metadata and value == plain(default_of(spec), True):
            continue
        table[spec.name] = value
    return table


def default_of(spec: dataclasses.Field[Any]) -> Any:
    """A field's default; MISSING where it has none."""
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def plain(value: Any, hashed_only: bool = False) -> Any:
    """A value of the tree as JSON has it."""
    if dataclasses.is_dataclass(value):
        return to_table(value, hashed_only=hashed_only)
    if isinstance(value, (tuple, list)):
        return [plain(item, hashed_only) for item in value]
    if isinstance(value, dict):
        return {key: plain(item, hashed_only) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two trees of JSON values differ: `training.seed: 1 -> 2`, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [
            (f"{place}.{key}".lstrip("."), old.get(key), new.get(key))
            for key in sorted(old.keys() | new.keys())
        ]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{place}[{i}]", left, right) for i, (left, right) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{place}: {old!r} -> {new!r}"]
    return [line for where, left, right in pairs for line in differences(left, right, where)]

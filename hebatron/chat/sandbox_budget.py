"""What a chat template may use and what it pays for that: the budget of one rendering, filters, tests, methods.

Each pays before it does anything. Others, and formatting with widths, do not exist.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

MAX_WORK = 1_000_000  # a chat of 1,000 turns takes 320,000 in the Nemotron-3 form
MAX_BYTES = 96 << 20  # a text of 1 M Hebrew tokens has 8 MB, and a template touches it a few times
MAX_DEPTH, MAX_INDENT = 64, 16
CALL, ELEMENT = 10, 5  # work

TEXT_FILTERS = ("trim", "lower", "upper", "title", "capitalize", "string", "int", "float", "length", "count")
PLAIN_FILTERS = ("default", "d", "abs", "items", "first", "last")
ITERABLE_FILTERS = ("list", "map", "select", "reject", "selectattr", "rejectattr")
COMPARING_FILTERS = ("sort", "unique", "min", "max", "dictsort")
COMPARING_TESTS = [
    "in",
    "eq",
    "equalto",
    "==",
    "ne",
    "!=",
    "lt",
    "lessthan",
    "<",
    "le",
    "<=",
    "gt",
    "greaterthan",
    ">",
    "ge",
] + [">=", "upper", "lower"]
PLAIN_TESTS = [
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "sequence",
    "iterable",
    "number",
    "integer",
    "float",
] + ["boolean", "true", "false", "even", "odd", "divisibleby", "callable", "sameas"]
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith replace join find "
        "rfind index rindex count upper lower title capitalize removeprefix removesuffix isdigit isalpha isspace "
        "isupper islower isalnum isnumeric".split()
    ),
    dict: frozenset("get items keys values".split()),
    list: frozenset("index count".split()),
    tuple: frozenset("index count".split()),
}
_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.work = self.bytes = 0

    def spend(self, work: int) -> None:
        self.work += abs(work)
        if self.work > MAX_WORK:
            raise ValueError(f"a rendering must take at most {MAX_WORK:,} steps, got more")

    def make(self, size: int) -> None:
        self.bytes += abs(size)
        if self.bytes > MAX_BYTES:
            raise ValueError(
                f"a rendering must handle at most {MAX_BYTES >> 20} MiB of text in all, got more"
            )

    def hold(self, value: Any) -> Any:
        """Pays for a value itself, not for what it refers to."""
        if isinstance(value, str):
            self.make(sys.getsizeof(value))
        elif isinstance(value, (list, tuple, dict)):
            self.make(64 + 16 * len(value))
        return value

    def write(self, value: Any, per_item: int = 8, factor: int = 1, depth: int = 0) -> Any:
        """Pays for all of a value, as printing, comparing or searching it reads it."""
        if isinstance(value, str):
            self.make(factor * sys.getsizeof(value))
        elif isinstance(value, (list, tuple, dict, KeysView, ValuesView, ItemsView)):
            if depth >= MAX_DEPTH:
                raise ValueError(f"a value must be nested at most {MAX_DEPTH} deep, got more")
            for item in value:
                self.spend(ELEMENT)
                self.make(per_item)
                for part in (item, value[item]) if isinstance(value, Mapping) else (item,):
                    self.write(part, per_item, max(factor, 4), depth + 1)  # repr: \x00 for a NUL
        elif type(value).__name__ == "Namespace":
            raise ValueError("a namespace must not be printed or compared, got one")
        return value

    def rounds(self, items: Iterable[Any], work: int = ELEMENT) -> Iterator[Any]:
        for item in items:
            self.spend(work)
            yield item

    def lines(self, text: str) -> int:
        """The lines of a text, paid for as a list."""
        count = 1 + sum(map(text.count, _LINE_ENDS))
        self.make(64 * count + sys.getsizeof(text))
        return count


# ---------------------------------------------------------------- methods, filters and tests


def pay_method(budget: Budget, value: Any, name: str, args: list[Any]) -> None:
    """Pays for value.name(*args) before it is called; an iterable to join becomes a list."""
    kind = next((kind for kind in METHODS if isinstance(value, kind)), None)
    if kind is None or name not in METHODS[kind]:
        raise ValueError(f"a template must not call {type(value).__name__}.{name}, got such a call")
    if kind is not str:
        if name in ("index", "count"):
            budget.write(value)
            budget.write(args)
        return
    budget.hold(value)
    budget.write(args)
    if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.make(4 * value.count(args[0]) * len(args[1]))
    elif name in ("split", "rsplit"):
        separator = args[0] if args else None
        budget.make(
            64 * (value.count(separator) if isinstance(separator, str) and separator else len(value) // 2)
        )
    elif name == "splitlines":
        budget.lines(value)
    elif name == "join" and args:
        args[0] = list(budget.rounds(args[0]))
        budget.write(args[0])
        budget.make(sys.getsizeof(value) * len(args[0]))


def paid_filters(budget: Budget, original: Mapping[str, Any]) -> dict[str, Any]:
    """The filters there are, each of which pays first."""
    from jinja2.utils import _PassArg, pass_context

    def paying(name: str, pay: Callable[[Any, list[Any], dict[str, Any]], Any]) -> Any:
        """`pay` charges for (value, args, options) and returns the value to go on with."""
        function = original[name]
        kind = _PassArg.from_obj(function)  # what it wants before the value

        @pass_context  # and so never folded into a constant while the template is compiled
        def paid(context: Any, value: Any, *args: Any, **options: Any) -> Any:
            budget.spend(CALL)
            given = list(args)
            value = pay(value, given, options)
            first: dict[Any, list[Any]] = {
                None: [],
                _PassArg.context: [context],
                _PassArg.eval_context: [context.eval_ctx],
                _PassArg.environment: [context.environment],
            }
            return budget.hold(function(*first[kind], value, *given, **options))

        return paid

    def text(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        return budget.write(value)

    def plain(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        return value

    def each(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        if isinstance(value, str):
            budget.make(80 * len(value))  # a text a character
        return budget.rounds(value) if isinstance(value, Iterable) else value

    def compare(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        value = value if isinstance(value, Mapping) else list(each(value, args, options))
        for _ in range(max(1, len(value).bit_length())):
            budget.write(value)
        return value

    def join(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        value = compare(value, args, options)
        separator = args[0] if args else options.get("d", "")
        budget.make(len(value) * sys.getsizeof(separator))
        return value

    def reverse(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        return budget.hold(value) if isinstance(value, str) else list(each(value, args, options))

    def add(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        numbers = list(each(value, args, options))
        if any(
            not isinstance(n, (int, float, Mapping)) for n in [*numbers, *args[1:], *options.values()][:1]
        ):
            raise ValueError("sum must be of numbers, got something else")
        return numbers

    def replace(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        given = [*args, *(options[key] for key in ("old", "new") if key in options)]
        pay_method(budget, str(budget.write(value)), "replace", [str(budget.write(arg)) for arg in given[:2]])
        return value

    def indent(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        width = args[0] if args else options.get("width", 4)
        size = width if isinstance(width, int) else len(width)
        if size > MAX_INDENT:
            raise ValueError(f"indent must be at most {MAX_INDENT} wide, got {size}")
        budget.make(budget.lines(str(budget.write(value))) * 4 * max(size, 0))
        return value

    def rounded(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        precision = args[0] if args else options.get("precision", 0)
        if not isinstance(precision, int) or abs(precision) > 20:
            raise ValueError(f"round must have a precision of at most 20, got {precision!r:.20}")
        return value

    def formatted(value: Any, args: list[Any], options: dict[str, Any]) -> Any:
        text = str(budget.write(value))
        if re.search(r"%(?![sd%])", text):
            raise ValueError("format must use %s and %d alone, got another")
        budget.write([*args, *options.values()])
        return value

    pays = dict.fromkeys(TEXT_FILTERS, text) | dict.fromkeys(PLAIN_FILTERS, plain)
    pays |= dict.fromkeys(ITERABLE_FILTERS, each) | dict.fromkeys(COMPARING_FILTERS, compare)
    pays |= {"join": join, "reverse": reverse, "sum": add, "replace": replace, "indent": indent}
    pays |= {"round": rounded, "format": formatted, "length": plain, "count": plain}
    found = {name: paying(name, pay) for name, pay in pays.items()}

    @pass_context
    def tojson(
        context: Any, value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
    ) -> str:
        """Plain JSON: jinja2's own filter escapes < and & for HTML."""
        budget.spend(CALL)
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= MAX_INDENT):
            raise ValueError(f"tojson must indent by 0 to {MAX_INDENT}, got {indent!r:.20}")
        separators = options.get("separators") or ("", "")
        if options.keys() - {"separators", "sort_keys"} or sum(map(len, separators)) > MAX_INDENT:
            raise ValueError("tojson must have short separators and no other options, got others")
        budget.write(value, 16 + MAX_DEPTH * (indent or 0), 6)  # \u0000 for a NUL
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    @pass_context
    def safe(context: Any, value: Any) -> str:
        return str(budget.write(value))

    return {**found, "tojson": tojson, "safe": safe}


def paid_tests(budget: Budget, original: Mapping[str, Any]) -> dict[str, Any]:
    def paying(function: Callable[..., Any]) -> Any:
        def paid(value: Any, *args: Any) -> Any:
            budget.spend(CALL)
            budget.write(value)
            budget.write(args)
            return function(value, *args)

        return paid

    plain = {name: original[name] for name in PLAIN_TESTS}
    return plain | {name: paying(original[name]) for name in COMPARING_TESTS}

"""jinja2's immutable sandbox, with a bound on what one rendering may do: a chat template is a stranger's program.

Two sums are kept, and nothing is done before it is paid for, so a hostile template is refused in bounded time and
memory, and the same way on every machine:
    work    expressions evaluated: a loop's body each round, a macro's each call, an element in a filter, a call
    bytes   of text and lists made, compared, searched or written
Filters, tests and methods are those of sandbox_budget.py, globals those at the end of this file; `recursive` loops
and ** do not exist. `safe` returns its text: nothing here is HTML.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from .sandbox_budget import CALL, ELEMENT, Budget, paid_filters, paid_tests, pay_method

MAX_TEMPLATE_CHARS = 1 << 16  # compiling takes some 10 us a character; the hub's have 10,000 to 30,000


def sandbox(budget: Budget) -> Any:
    """An environment whose templates spend `budget`, with what chat templates expect: raise_exception, tojson,
    {% generation %}, {% break %}."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError as JinjaError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import pass_context
    from jinja2.visitor import NodeTransformer

    def counted(node: Any, name: str, *args: int) -> Any:
        return nodes.Filter(node, name, [nodes.Const(a) for a in args], [], None, None, lineno=node.lineno)

    def weight(parts: Iterable[Any]) -> int:
        whole = [node for part in parts for node in (part, *part.find_all(nodes.Node))]
        return len(whole) + sum(len(n.data) // 64 for n in whole if isinstance(n, nodes.TemplateData))

    class Pays(NodeTransformer):
        """What may run again pays for its body; what reads or makes texts, for them."""

        def visit_For(self, node: Any) -> Any:
            if node.recursive:
                raise JinjaError("a loop must not be recursive")
            node = self._body(node)
            node.iter = counted(node.iter, "<rounds>", ELEMENT + weight([node.test] if node.test else []))
            return node

        def _body(self, node: Any) -> Any:
            node = self.generic_visit(node)
            cost = nodes.Const(weight(node.body), lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(counted(cost, "<spend>"), lineno=node.lineno))
            return node

        visit_Macro = visit_CallBlock = visit_Block = _body

        def visit_Output(self, node: Any) -> Any:
            node = self.generic_visit(node)
            node.nodes = [
                n if isinstance(n, nodes.TemplateData) else counted(n, "<write>") for n in node.nodes
            ]
            return node

        def visit_Concat(self, node: Any) -> Any:
            node = self.generic_visit(node)
            node.nodes = [counted(n, "<write>") for n in node.nodes]
            return node

        def visit_Compare(self, node: Any) -> Any:
            node = self.generic_visit(node)
            node.expr = counted(node.expr, "<write>")
            for operand in node.ops:
                inside = operand.op in ("in", "notin")
                operand.expr = counted(operand.expr, "<search>" if inside else "<write>")
            return node

        def visit_Getitem(self, node: Any) -> Any:
            node = self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                node.node = counted(node.node, "<hold>")
            return node

    class Generation(Extension):
        """{% generation %} marks answers for other trainers; here it renders what is inside."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            return Pays().visit(super()._parse(source, name, filename))

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            budget.spend(CALL)
            owner, given = getattr(function, "__self__", None), list(args)
            if isinstance(owner, (str, dict, list, tuple, int, float)):
                pay_method(budget, owner, function.__name__, given)
            else:
                budget.write(given)
            return budget.hold(super().call(context, function, *given, **kwargs))

        def wrap_str_format(self, value: Any) -> Any:
            if super().wrap_str_format(value) is not None:  # a width would make any length
                raise ValueError("a template must not call str.format, got such a call")
            return None

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                raise ValueError("a template must not use **, got one")
            if operator == "%" and isinstance(left, str):
                raise ValueError("a template must not format text by %, got one")
            numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
            if numbers and operator == "*":
                if sum(n.bit_length() for n in (left, right) if isinstance(n, int)) > 4096:
                    raise ValueError("a number must have at most 4,096 bits, got more")
            elif not numbers:
                sizes = [sys.getsizeof(s) if hasattr(s, "__len__") else s for s in (left, right)]
                if all(isinstance(size, int) for size in sizes):
                    budget.make(sizes[0] * sizes[1] if operator == "*" else sizes[0] + sizes[1])
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise JinjaError(message)

    @pass_context
    def search(context: Any, value: Any) -> Any:
        return value if isinstance(value, dict) else budget.write(value)

    @pass_context
    def write(context: Any, value: Any) -> Any:
        return budget.write(value)

    @pass_context
    def hold(context: Any, value: Any) -> Any:
        return budget.hold(value)

    @pass_context
    def spend(context: Any, work: int) -> None:
        budget.spend(work)

    @pass_context
    def rounds(context: Any, items: Any, work: int) -> Any:
        return budget.rounds(items, work)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters = paid_filters(budget, environment.filters)
    environment.tests = paid_tests(budget, environment.tests)
    own = {"<search>": search, "<write>": write, "<hold>": hold, "<spend>": spend, "<rounds>": rounds}
    environment.filters |= own  # no template can write these names after a |
    kept = {name: environment.globals[name] for name in ("dict", "namespace", "range")}
    environment.globals = {**kept, "raise_exception": refuse}
    return environment

"""The sandbox of chat templates: what is hostile is refused before it costs anything, the rest is plain jinja2."""

# ruff: noqa: E501
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hebatron.chat.sandbox import MAX_TEMPLATE_CHARS
from hebatron.chat.template import NEMOTRON3, ChatTemplate

jinja2 = pytest.importorskip("jinja2")

BIG = "{% set s = 'ab' * 1000000 %}"
GROW = "{% set n = namespace(s=%s) %}{% for i in range(60) %}{% set n.s = %s %}{% endfor %}"
HOSTILE = {
    "import": "{{ ''.__class__.__mro__ }}",
    "append": "{{ messages.append(1) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that choose": "{% for i in range(99999) %}{% for j in range(99999) if j > 99999 %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "macro of much": "{% macro f() %}" + "{{ 1 }}" * 4000 + "{% endmacro %}{% for i in range(99999) %}{% set x = f() %}{% endfor %}",
    "block of much": "{% block b %}" + "{% set x = 1 %}" * 4000 + "{% for i in range(99999) %}{{ self.b() }}{% endfor %}{% endblock %}",
    "times": "{{ 'a' * 1000000000 }}",
    "times list": "{{ [1] * 1000000000 }}",
    "power": "{{ 2 ** 999999999 }}",
    "number": GROW.replace("%s", "9" * 99, 1).replace("%s", "n.s * n.s"),
    "concat": GROW.replace("%s", "'ab'", 1).replace("%s", "n.s ~ n.s"),
    "add": GROW.replace("%s", "'ab'", 1).replace("%s", "n.s + n.s"),
    "add lists": GROW.replace("%s", "[1]", 1).replace("%s", "n.s + n.s"),
    "nested lists": GROW.replace("%s", "[1]", 1).replace("%s", "[n.s, n.s]") + "{{ n.s }}",
    "compare nested": GROW.replace("%s", "[1]", 1).replace("%s", "[n.s, n.s]") + "{{ n.s == n.s[0] }}",
    "kept lists": BIG + GROW.replace("%s", "[]", 1).replace("range(60)", "range(9999)").replace("%s", "n.s + [s ~ i]"),
    "set block": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "output": BIG + "{% for i in range(300) %}{{ s }}{% endfor %}",
    "list of one text": BIG + "{{ [s] * 1000 }}",
    "items of one text": BIG + "{{ dict(a=[s] * 1000).items() }}",
    "search": BIG + "{% for i in range(99999) %}{% if 'c' in s %}{% endif %}{% endfor %}",
    "compare": BIG + "{% set t = s ~ '' %}{% for i in range(99999) %}{% if s == t %}{% endif %}{% endfor %}",
    "equalto": BIG + "{{ ([s] * 9999) | select('equalto', s ~ '') | list | length }}",
    "sort": BIG + "{{ ([s, s ~ ''] * 9999) | sort | length }}",
    "slices": BIG + "{% for i in range(99999) %}{% set t = s[i:] %}{% endfor %}",
    "center": "{{ 'a' | center(1000000000) }}",
    "center method": "{{ 'a'.center(1000000000) }}",
    "center of markup": "{{ ('a' | safe).center(1000000000) }}",
    "zfill by map": "{{ ['a'] | map('center', 1000000000) | list }}",
    "method by attr": "{{ ('a' | attr('ljust'))(1000000000) }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "indent": "{{ ('a\n' * 100000) | indent(1000000) }}",
    "indent often": "{{ ('\u2028' * 3000000) | indent(16) }}",
    "replace": BIG + "{{ s | replace('', s) }}",
    "replace method": BIG + "{{ s.replace('a', 'b' * 1000000) }}",
    "join": BIG + "{{ ('a' * 100000) | join(s) }}",
    "join method": BIG + "{{ s.join(['a'] * 1000) }}",
    "join filter": BIG + "{{ ([''] * 10000) | join(s) }}",
    "split": "{{ ('אב ' * 3000000).split() }}",
    "split by": "{{ ('אבג,' * 3000000).split(',') | length }}",
    "splitlines": "{{ ('אבג\n' * 3000000).splitlines() | length }}",
    "list": "{{ ('א' * 3000000) | list | length }}",
    "map": "{{ ('a' * 3000000) | map('upper') | list | length }}",
    "tojson": "{{ ([[[1]]] * 100000) | tojson(indent=1000000) }}",
    "tojson deep": GROW.replace("%s", "[1]", 1).replace("range(60)", "range(3000)").replace("%s", "[n.s]") + "{{ n.s | tojson(indent=16) }}",
    "tojson nul": "{{ ('\x00' * 20000000) | tojson }}",
    "sum of lists": "{{ ([[1] * 1000] * 1000) | sum(start=[]) | length }}",
    "round": "{{ 1 | round(1000000000, 'ceil') }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "its own budget": "{% for i in range(9999) %}{{ [-1000000] | map('<spend>') | list }}{% endfor %}" + BIG * 99,
    "dictsort of a list": "{{ messages | dictsort }}",
    "deep loops": "{% for m in messages %}" * 25 + "{% endfor %}" * 25,
    "digits": "{{ " + "1" * 5000 + " }}",
    "error": "{{ raise_exception('no') }}",
    "long": "a" * (MAX_TEMPLATE_CHARS + 1),
}  # fmt: skip
CHILD = """
import re, sys, time
from test_sandbox import HOSTILE
from hebatron.chat.template import ChatTemplate, TemplateError
def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
for name, text in HOSTILE.items():
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before, began = resident("VmRSS"), time.process_time()
    try:
        ChatTemplate(text).render([{"role": "user", "content": "a"}])
        print(name, "rendered")
    except TemplateError:
        pass
    took, grown = time.process_time() - began, resident("VmHWM") - before
    if took > 5 or grown > 200:  # about a second at most where it is quick; without a budget, hours
        print(f"{name}: {took:.2f} s, {grown:.0f} MB")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hostile_template_is_refused_in_seconds_and_200_megabytes() -> None:
    path = [str(Path(__file__).parent), *sys.path]
    child = f"import sys; sys.path[:0] = {path!r}\n{CHILD}"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


IDIOMS = [
    "{{ messages | length }} {{ messages[0]['role'] }} {{ messages[-1].content }}",
    "{% for m in messages[1:] %}{{ loop.index0 }}{{ m.role | upper }}{{ m.content | trim }}{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ m['content'] + '|' }}{% else %}none{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
    "{{ messages | rejectattr('role', 'in', ['user']) | list | tojson }}",
    "{{ (messages | first).keys() | list | sort | join('-') }}{{ messages | map(attribute='role') | unique | list }}",
    "{% set n = namespace(out='') %}{% for m in messages %}{% set n.out = n.out ~ m.role %}{% endfor %}{{ n.out }}",
    "{% macro say(m, end='!') %}{{ m.content }}{{ end }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% if 'x' in messages[0].content and messages[0] is mapping and nothing is not defined %}y{% else %}n{% endif %}",
    "{{ messages[0].content.split(' ')[-1] }}{{ messages[0].content.replace('a', 'bb').strip() | indent(2) }}",
    "{{ messages[0].content[::-1] }}{{ messages[0].content | reverse }}{{ [3, 1] | sort(reverse=true) | list }}",
    "{{ 'a<b>&\"' | tojson(indent=2) }}{{ 'é\u05d0' | tojson }}{{ {'b': 1, 'a': [1.5, none, true]} | tojson }}",
    "{% for k, v in {'x': 1, 'y': 'z'} | items %}{{ k }}={{ v }};{% endfor %}{{ {'b': 1, 'a': 2} | dictsort }}",
    "{% for k, v in {'x': 1}.items() %}{{ k ~ v }}{% endfor %}{{ [1, 2.5] | sum }}{{ 2.567 | round(1) }}{{ '7' | int + 1 }}",
    "{{ none | default('d', true) }}{{ x | default('e') }}{{ 'ab' | safe }}{{ '%s-%d' | format('a', 3) }}{{ [1] + [2] }}",
    "{{ 'a'.startswith('a') }}{{ 'b'.endswith(('a', 'b')) }}{{ ', '.join(['a', 'b']) }}{{ 'A\nB'.splitlines() }}",
    "{% set x %}{{ 1 }}{{ 'b' }}{% endset %}{{ x }}{% set y = 5 if x else 6 %}{{ y * 3 - 4 // 2 }}{{ 'ab' * 2 }}",
    "{{ range(3) | list }}{{ dict(a=1)['a'] }}{{ messages[0].get('name', 'q') }}{{ messages | map('length') | list }}",
    "{% for i in range(9) %}{% if i == 3 %}{% continue %}{% endif %}{% if i > 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}{{ loop.last }}{% endfor %}",
    NEMOTRON3,
]  # fmt: skip


@pytest.mark.parametrize("text", IDIOMS)
def test_what_chat_templates_do_renders_as_in_plain_jinja2(text: str) -> None:
    messages = [
        {"role": "system", "content": "  abc a\nline "},
        {"role": "user", "content": "שלום x עולם"},
        {"role": "assistant", "content": "<think>\nr\n</think>\nb", "tool_calls": []},
    ]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    values = {"tools": None, "add_generation_prompt": False, "enable_thinking": True}
    expected = plain.from_string(text).render(messages=messages, truncate_history_thinking=True, **values)
    assert ChatTemplate(text).render(messages) == expected


def test_a_long_chat_fits_the_budget() -> None:
    """1,000 turns, and a single one of 1 M tokens."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"שלום {i} " * 40} for i in range(1000)]
    assert ChatTemplate(NEMOTRON3).render(turns).count("<|im_start|>") == 1001
    long = [{"role": "user", "content": "שלום " * 800_000}, {"role": "assistant", "content": "א"}]
    assert len(ChatTemplate(NEMOTRON3).render(long)) > 4_000_000

"""Pieces of a report: one HTML page with everything inside it, no script and no address that leaves it.

Whatever comes out of data (names, samples, configuration) goes through `text` or `prose`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from ..training.metrics import printable, printable_name

STYLE = """
:root { --ink: #1c2330; --soft: #5b6577; --line: #dde2ea; --card: #f6f8fb; --page: #fff; --mark: #2f6db3;
        --old: #b9c4d4; --good: #1b7f4b; --bad: #b3372f; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #9aa5b8; --line: #333c4b; --card: #1c222d;
        --page: #12161d; --mark: #74a9e6; --old: #4b5871; --good: #5fc28d; --bad: #f0857d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
       font: 16px/1.55 system-ui, "Segoe UI", "Noto Sans", "Noto Sans Hebrew", sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .8rem; padding-top: .6rem; font-size: 1.25rem; border-top: 1px solid var(--line); }
h3 { margin: 1.6rem 0 .5rem; font-size: 1rem; }
p, li { margin: .5rem 0; max-width: 52rem; overflow-wrap: anywhere; }
a { color: var(--mark); }
nav a { margin-right: 1rem; white-space: nowrap; }
.soft, summary { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 60%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
td { border-bottom: 1px solid var(--line); max-width: 32rem; }
th, td { padding: .32rem 1.1rem .32rem 0; vertical-align: top; }
.n { text-align: right; white-space: nowrap; }
.group td { font-weight: 600; padding-top: .9rem; }
pre, .tile, .sample p { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
                        padding: .7rem .9rem; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.45; }
.charts { display: grid; gap: .8rem 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
.charts.narrow { max-width: 32rem; }
figure { margin: 0; } img { width: 100%; display: block; }
.tiles { display: grid; gap: .7rem; margin: .9rem 0; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); }
.tile b { display: block; font-size: 1.25rem; overflow-wrap: anywhere; }
.tile > span { color: var(--soft); font-size: .85rem; }
.sample { display: grid; grid-template-columns: 7.5rem 1fr; align-items: baseline; gap: 0 .8rem; }
.sample p { white-space: pre-wrap; margin: .25rem 0; max-width: none; line-height: 1.7; }
.sample p b { color: var(--mark); }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.bar { display: block; height: .5rem; margin: .2rem 0; border-radius: 2px; background: var(--mark); }
@media (max-width: 40rem) { .sample { grid-template-columns: 1fr; } body { padding: 1rem .8rem; }
                             th, td { padding-right: .6rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
               .wide, pre { overflow: visible; } pre { white-space: pre-wrap; }
               figure, tr, .tile, .sample { break-inside: avoid; } h2, h3 { break-after: avoid; }
               .charts { grid-template-columns: 1fr 1fr; } .charts.small { grid-template-columns: 1fr 1fr 1fr; }
               details::details-content { content-visibility: visible; block-size: auto; } }
"""


def text(name: object) -> str:
    """One line out of data: control characters shown, escaped, and its direction kept to itself."""
    return f"<bdi>{escape(printable_name(str(name)))}</bdi>"


def prose(words: str) -> str:
    """Lines out of data, for a block that has its own direction."""
    return escape(printable(words))


def page(title: str, head: str, sections: Iterable[tuple[str, str]]) -> str:
    """`head`, links to the sections and the sections: (title, ready HTML); `title`s are plain text."""
    listed = list(sections)
    links = " ".join(f'<a href="#s{i}">{prose(name)}</a>' for i, (name, _) in enumerate(listed))
    bodies = "".join(
        f'<section id="s{i}"><h2>{prose(name)}</h2>{body}</section>\n'
        for i, (name, body) in enumerate(listed)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{prose(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{text(title)}</h1>\n{head}<nav>{links}</nav>\n{bodies}</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """An HTML table; cells are ready HTML, columns listed in `numeric` are right-aligned. A row of one cell is the
    heading of a group."""
    right = set(numeric)

    def line(cells: Sequence[str], tag: str) -> str:
        if len(cells) == 1 < len(head):
            return f"<tr class=group><td colspan={len(head)}>{cells[0]}</td></tr>"
        marked = (f"<{tag}{' class=n' if i in right else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """(ready HTML of the figure, plain text of what it is) each."""
    boxes = "".join(
        f'<div class="tile"><b>{figure}</b><span>{prose(what)}</span></div>' for figure, what in figures
    )
    return f'<div class="tiles">{boxes}</div>\n'


def soft(words: str) -> str:
    """A note in plain text."""
    return f'<p class="soft">{prose(words)}</p>'


def notices(lines: Sequence[str]) -> str:
    """Lines of plain text that must not be missed."""
    items = "".join(f'<li class="bad">{text(line)}</li>' for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def pre(words: str) -> str:
    return f"<pre>{prose(words)}</pre>"


def charts(pictures: Iterable[tuple[str, bytes]], small: bool = False, narrow: bool = False) -> str:
    """(plain text of what it shows, SVG) each. As images they can run nothing, and their ids do not meet."""
    figures = "".join(
        f'<figure><img alt="{prose(what)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"></figure>'
        for what, svg in pictures
    )
    kind = " small" if small else " narrow" if narrow else ""
    return f'<div class="charts{kind}">{figures}</div>' if figures else ""


def yes_no(value: bool) -> str:
    return '<span class="good">yes</span>' if value else '<span class="bad">no</span>'

"""The quickstart's report: one HTML page with everything inside it, no script and no link that leaves it.

`render(findings)` is a pure function from what the run found to the page's text.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from hebatron.metrics import Record
from hebatron.quickstart.findings import ExportCheck, Findings, Measured, ResumeCheck, Sample, SpeedCheck

SECTIONS = (
    "Curriculum",
    "Training",
    "Bits per byte, before and after",
    "Samples",
    "Stop and resume",
    "Export",
    "Speed against a dense model",
    "Router",
    "Tokenizer",
    "Model",
    "Machine",
    "How to repeat this",
)

_STYLE = """
:root { --ink: #1c2330; --soft: #5b6577; --line: #dde2ea; --card: #f6f8fb; --mark: #2f6db3; --old: #b9c4d4;
        --good: #1b7f4b; --bad: #b3372f; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: #fff; color: var(--ink);
       font: 16px/1.55 system-ui, "Segoe UI", "Noto Sans", "Noto Sans Hebrew", sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.2rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .94rem; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
th, td { padding: .38rem .9rem .38rem 0; vertical-align: top; }
.n { text-align: right; white-space: nowrap; }
td:has(.bar) { min-width: 9rem; }
pre, img, .tile, .sample div { border: 1px solid var(--line); border-radius: 8px; }
pre, .tile, .sample div { background: var(--card); padding: .7rem .9rem; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.45; }
img { width: 100%; }
.tiles, .sample { display: grid; gap: .7rem; margin: .9rem 0; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.sample { grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
.tile b { display: block; font-size: 1.3rem; }
.tile span { color: var(--soft); font-size: .85rem; }
.sample h3 { margin: 0 0 .3rem; font-size: .8rem; color: var(--soft); font-weight: 600; }
.he { white-space: pre-wrap; font-size: 1.05rem; line-height: 1.7; margin: 0; overflow-wrap: anywhere; }
.he b { color: var(--mark); }
b .good, b .bad, .good, .bad { font-weight: 600; font-size: inherit; }
.tile b span { display: inline; }
.good, .tile .good { color: var(--good); }
.bad, .tile .bad { color: var(--bad); }
.bar { display: block; height: .5rem; margin: .2rem 0; border-radius: 2px; background: var(--mark); }
.bar.old { background: var(--old); }
.load { display: flex; align-items: flex-end; gap: 3px; height: 3.4rem; }
.load i { flex: 1; max-width: 1.6rem; min-height: 1px; border-radius: 2px 2px 0 0; background: var(--mark); }
"""


def render(findings: Findings) -> str:
    """The page as a string of HTML."""
    bodies = (
        _curriculum(findings),
        _training(findings),
        _bits_per_byte(findings.measured),
        "".join(_sample(sample) for sample in findings.measured.samples),
        _resume(findings.measured.resume),
        _export(findings.measured.export),
        _speed(findings.measured.speed),
        _router(findings.measured.metrics),
        _tokenizer(findings),
        f"<pre>{escape(findings.model_card)}</pre>",
        f"<pre>{escape(findings.diagnosis.text())}</pre>",
        _repeat(findings),
    )
    sections = "".join(
        f"<section><h2>{escape(title)}</h2>{body}</section>\n"
        for title, body in zip(SECTIONS, bodies, strict=True)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>hebatron quickstart</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>hebatron quickstart</h1>\n{_head(findings)}{sections}</body>\n</html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """An HTML table; cells are ready HTML, columns listed in `numeric` are right-aligned."""

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f"<{tag}{' class=n' if i in numeric else ''}>{cell}</{tag}>" for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line([escape(h) for h in head], "th")}{body}</table></div>'


def _tile(figure: str, label: str) -> str:
    return f'<div class="tile"><b>{figure}</b><span>{escape(label)}</span></div>'


def _yes_no(value: bool) -> str:
    return '<span class="good">yes</span>' if value else '<span class="bad">no</span>'


def _head(f: Findings) -> str:
    m = f.measured
    steps = [record for record in m.metrics if record["kind"] == "step"]
    tokens = sum(record["tokens"] for record in steps)
    seconds = sum(seconds for _, seconds in f.stages)
    hebrew = [source for source, language in m.languages.items() if language == "he"]
    before, after = (_mean([bpb[source] for source in hebrew]) for bpb in (m.bpb_before, m.bpb_after))
    tiles = (
        _tile(f"{tokens:,}", f"tokens trained in {len(steps)} steps"),
        _tile(f"{before:.2f} &rarr; {after:.2f}", "bits per byte of held-out Hebrew, mean of its sources"),
        _tile(_yes_no(m.resume.bit_exact), "stop and resume bit-exact"),
        _tile(f"{m.export.max_logit_difference:.1e}", "largest logit difference to transformers"),
        _tile(f"{m.speed.speed_ratio:.2f}&times;", "speed of a dense model of the same total size"),
        _tile(f"{seconds / 60:.1f} min", "in all on this machine"),
    )
    intro = (
        "A base on English and code, then three Hebrew phases from easy to hard with English and code "
        "mixed in as an anchor. All text comes from installed packages; nothing was downloaded."
    )
    return f'<p class="soft">{intro}</p>\n<div class="tiles">{"".join(tiles)}</div>\n'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _curriculum(f: Findings) -> str:
    rows = [
        (
            f"<b>{escape(phase.name)}</b>",
            escape(phase.sources),
            f"{phase.tokens:,}",
            str(phase.steps),
            str(phase.seq_len),
            f"{phase.anchor_share:.0%}" if phase.anchor_share else "&ndash;",
        )
        for phase in f.phases
    ]
    table = _table(("phase", "sources", "tokens", "steps", "row length", "anchor"), rows, (2, 3, 4, 5))
    return (
        f'{table}<p class="soft">A step is {f.tokens_per_step:,} tokens. The anchor is English and code.</p>'
    )


def _training(f: Findings) -> str:
    picture = base64.b64encode(f.figure.read_bytes()).decode()
    alt = "training loss, bits per byte, learning rate and router entropy by step"
    return f'<img alt="{alt}" src="data:image/png;base64,{picture}">'


def _bits_per_byte(m: Measured) -> str:
    ends = {record["phase"]: record["bpb"] for record in m.metrics if record["kind"] == "eval"}
    top = max([*m.bpb_before.values(), *m.bpb_after.values()], default=1.0)
    rows = []
    for source, after in m.bpb_after.items():
        before = m.bpb_before[source]
        change = after - before
        bars = "".join(
            f'<span class="bar{old}" style="width:{100 * value / top:.1f}%"></span>'
            for value, old in ((before, " old"), (after, ""))
        )
        by_phase = [f"{bpb[source]:.3f}" if source in bpb else "" for bpb in ends.values()]
        verdict = f'<span class="{"bad" if change > 0 else "good"}">{change:+.3f}</span>'
        rows.append((escape(source), m.languages[source], *by_phase, verdict, bars))
    note = (
        "Held-out documents at the end of each phase; smaller is better. A rise in English or code is what "
        "the Hebrew phases made it forget. Bars: after the base and at the end."
    )
    head = ("source", "language", *(f"after {phase}" for phase in ends), "change", "")
    numeric = range(2, 3 + len(ends))
    return f'<p class="soft">{note}</p>{_table(head, rows, numeric)}'


def _sample(sample: Sample) -> str:
    def card(title: str, text: str) -> str:
        prompt, rest = escape(sample.prompt), escape(text)
        return f'<div><h3>{title}</h3><p class="he" dir="rtl" lang="he"><b>{prompt}</b>{rest}</p></div>'

    return (
        f'<div class="sample">{card("after the base", sample.before)}{card("at the end", sample.after)}</div>'
    )


def _resume(check: ResumeCheck) -> str:
    rows = [
        (f"{check.steps} steps without a stop", f"<code>{check.digest_through}</code>"),
        (
            f"stopped after {check.stopped_at}, resumed to {check.steps}",
            f"<code>{check.digest_resumed}</code>",
        ),
    ]
    table = _table(("run", "sha256 of weights and optimizer state"), rows)
    return f"<p>Bit-exact: {_yes_no(check.bit_exact)}</p>{table}"


def _export(check: ExportCheck) -> str:
    rows = [
        ("folder", escape(str(check.folder))),
        ("reader", f"transformers {escape(check.transformers_version)}, unpatched"),
        ("largest logit difference", f"{check.max_logit_difference:.2e}"),
        ("same greedy text", _yes_no(check.same_greedy_text)),
    ]
    return _table(("", ""), rows)


def _speed(check: SpeedCheck) -> str:
    rows = [
        (
            "mixture of experts",
            f"{check.total_moe:,}",
            f"{check.active_moe:,}",
            f"{check.tokens_per_s_moe:,.0f}",
        ),
        ("dense", f"{check.total_dense:,}", f"{check.active_dense:,}", f"{check.tokens_per_s_dense:,.0f}"),
    ]
    head = ("model", "total parameters", "active per token", "tokens per second")
    note = (
        f"Prefill of {check.batch} &times; {check.length} tokens, medians of {check.repeats} interleaved "
        f"runs: {check.speed_ratio:.2f}&times; the dense model's speed, with {check.size_ratio:.2f}&times; "
        "fewer active parameters (output head included)."
    )
    return f"{_table(head, rows, (1, 2, 3))}<p>{note}</p>"


def _router(metrics: Sequence[Record]) -> str:
    loads = [record for record in metrics if record["kind"] == "eval" and record["router_load"]]
    if not loads:
        return '<p class="soft">No mixture-of-experts layer.</p>'
    last_step = [record for record in metrics if record["kind"] == "step" and record["router"]][-1]
    rows = []
    for layer, (counts, stats) in enumerate(zip(loads[-1]["router_load"], last_step["router"], strict=True)):
        top = max(*counts, 1)
        bars = "".join(f'<i style="height:{100 * count / top:.1f}%" title="{count}"></i>' for count in counts)
        figures = (
            f"{stats['load_entropy']:.3f}",
            f"{stats['max_over_ideal']:.2f}&times;",
            f"{stats['dead']:.0%}",
        )
        rows.append((str(layer + 1), *figures, f'<div class="load">{bars}</div>'))
    head = ("layer", "entropy / ln E", "largest load", "idle experts", "tokens by expert")
    note = "Loads of the last training steps; an entropy of 1 is an even load."
    return f'{_table(head, rows, (1, 2, 3))}<p class="soft">{note}</p>'


def _tokenizer(f: Findings) -> str:
    rows = [
        (
            escape(row.name),
            f"{row.num_bytes:,}",
            f"{row.num_tokens:,}",
            f"{row.bytes_per_token:.2f}",
            f"{row.bytes_per_token:.2f}&times; fewer",
        )
        for row in f.tokenizer
    ]
    head = ("held-out text", "bytes", "tokens", "bytes per token", "tokens against a byte model")
    note = f"Byte-level BPE of {f.vocab_size:,} entries, trained on the training text of this run."
    return f'<p class="soft">{note}</p>{_table(head, rows, (1, 2, 3, 4))}'


def _repeat(f: Findings) -> str:
    total = sum(phase.steps for phase in f.phases)
    text = (
        f"{f.command}\n\nseed {f.seed}, {total} steps; the same command on the same machine and thread count "
        "gives the same losses"
    )
    rows = [(escape(name), f"{seconds:.1f}") for name, seconds in f.stages]
    rows.append(("<b>all</b>", f"<b>{sum(seconds for _, seconds in f.stages):.1f}</b>"))
    return f"<pre>{escape(text)}</pre>{_table(('stage', 'seconds'), rows, (1,))}"

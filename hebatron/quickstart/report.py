"""The quickstart's report: its run's page (hebatron.report.page) with what the other stages found.

`render(findings)` reads the run folder that the findings name and returns the page's text.
"""

from __future__ import annotations

from html import escape

from hebatron.quickstart.findings import ChatCheck, ExportCheck, Findings, ResumeCheck, SpeedCheck
from hebatron.report import html
from hebatron.report import page as run_report
from hebatron.report.history import load_history
from hebatron.report.html import yes_no

SECTIONS = (
    "Stop and resume",
    "Chats",
    "Export",
    "Speed against a dense model",
    "Tokenizer",
    "Model",
    "Machine",
    "How to repeat this",
)


def render(findings: Findings) -> str:
    """The page as a string of HTML: the run's sections, then SECTIONS."""
    head, sections = run_report.render(load_history(findings.run_dir))
    bodies = (
        _resume(findings.resume),
        _chats(findings.chats),
        _export(findings.export),
        _speed(findings.speed),
        _tokenizer(findings),
        html.pre(findings.model_card),
        html.pre(findings.diagnosis.text()),
        _repeat(findings),
    )
    return html.page(
        "hebatron quickstart", _head(findings) + head, [*sections, *zip(SECTIONS, bodies, strict=True)]
    )


def _head(f: Findings) -> str:
    seconds = sum(seconds for _, seconds in f.stages)
    intro = (
        "A base on English and code, then three Hebrew phases from easy to hard with English and code "
        "mixed in as an anchor. All text comes from installed packages; nothing was downloaded."
    )
    checks = (
        (yes_no(f.resume.bit_exact), "stop and resume bit-exact"),
        (f"{f.export.max_logit_difference:.1e}", "largest logit difference to transformers"),
        (f"{f.speed.speed_ratio:.2f}&times;", "speed of a dense model of the same total size"),
        (f"{seconds / 60:.1f} min", "in all on this machine"),
    )
    return html.soft(intro) + html.tiles(checks)


def _resume(check: ResumeCheck) -> str:
    rows = [
        (f"{check.steps} steps without a stop", f"<code>{check.digest_through}</code>"),
        (
            f"stopped after {check.stopped_at}, resumed to {check.steps}",
            f"<code>{check.digest_resumed}</code>",
        ),
    ]
    table = html.table(("run", "sha256 of weights and optimizer state"), rows)
    return f"<p>Bit-exact: {yes_no(check.bit_exact)}</p>{table}"


def _chats(check: ChatCheck) -> str:
    note = (
        f"Supervised fine-tuning in {check.steps} steps on {check.used - check.held_out:,} chats, of which only "
        f"the answers bear loss ({check.masked_shares['all']:.0%} of the tokens do not); {check.held_out:,} others "
        "are held out."
    )
    losses = [
        (
            escape(name.removeprefix("task/")),
            f"{check.masked_shares[name]:.0%}",
            f"{check.losses_before[name]:.3f}",
            f"{check.losses_after[name]:.3f}",
        )
        for name in check.losses_before
    ]
    texts = [
        (
            escape(name),
            f"{before:.3f}",
            f"{check.bpb_after[name]:.3f}",
            f"{check.bpb_after[name] - before:+.3f}",
        )
        for name, before in check.bpb_before.items()
    ]
    said = [
        [f'<div dir="auto">{escape(text)}</div>' for text in (s.prompt, s.before, s.after)]
        for s in check.samples
    ]
    head = ("held-out chats", "masked", "nats per learnt token, before", "after")
    return (
        html.soft(note)
        + html.table(head, losses, (1, 2, 3))
        + html.table(("asked", "answered before", "after"), said)
        + html.table(("held-out text", "bits per byte, before", "after", "change"), texts, (1, 2, 3))
    )


def _export(check: ExportCheck) -> str:
    rows = [
        ("folder", escape(str(check.folder))),
        ("reader", f"transformers {escape(check.transformers_version)}, unpatched"),
        ("largest logit difference", f"{check.max_logit_difference:.2e}"),
        ("same greedy text", yes_no(check.same_greedy_text)),
    ]
    return html.table(("", ""), rows)


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
    return f"{html.table(head, rows, (1, 2, 3))}<p>{note}</p>"


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
    return f"{html.soft(note)}{html.table(head, rows, (1, 2, 3, 4))}"


def _repeat(f: Findings) -> str:
    text = (
        f"{f.command}\n\nseed {f.seed}; the same command on the same machine and thread count "
        "gives the same losses"
    )
    rows = [(escape(name), f"{seconds:.1f}") for name, seconds in f.stages]
    rows.append(("<b>all</b>", f"<b>{sum(seconds for _, seconds in f.stages):.1f}</b>"))
    return f"{html.pre(text)}{html.table(('stage', 'seconds'), rows, (1,))}"

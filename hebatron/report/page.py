"""One HTML page of a run: what it read, how it learnt, what it forgot, how its experts shared the work, what it wrote.

    write_report(Path("runs/forward"))        # runs/forward/report.html

A part that the run folder cannot fill says what is absent.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..curriculum.plan import Plan
from ..files import replace_text
from ..sizes import count_parameters
from ..training.metrics import Record, duration
from ..training.runconfig import config_hash, describe
from ..training.sections import RunConfig
from . import html
from .charts import expert_charts, expert_maps, map_key, source_charts, training_charts
from .history import History, language_name, load_history, mean, mean_groups

Section = tuple[str, str]  # title, ready HTML


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """The page of a run (default: run_dir/report.html), written whole or not at all. Returns its path."""
    history = load_history(run_dir)
    path = run_dir / "report.html" if out is None else out
    replace_text(path, html.page(run_dir.resolve().name, *render(history)))
    return path


def render(history: History) -> tuple[str, list[Section]]:
    """The page's head and its sections."""
    absent = list(history.absent)
    plan = None
    if history.config is not None and history.config.sft is None:
        try:
            plan = history.plan()
        except (ValueError, OSError) as error:
            absent.append(f"plan: {error}")
    head = headline(history, plan) + html.notices(absent)
    return head, [
        *run_sections(history),
        *text_sections(history, plan),
        ("Configuration", configuration(history)),
    ]


def run_sections(history: History) -> list[Section]:
    """What the run did, from its records alone."""
    chats = chat_section(history)
    return [
        ("Alarms", alarms(history)),
        ("Training", training(history)),
        ("Held-out text by source", html.charts(source_charts(history)) or NO_EVALUATION),
        ("Learnt and forgotten", change_table(history)),
        *([("Chats", chats)] if chats else []),
        ("Experts", experts(history)),
        ("Samples", samples(history)),
    ]


def text_sections(history: History, plan: Plan | None) -> list[Section]:
    """What the run read."""
    return [("Plan", plan_section(history, plan)), ("Data", ledger(history))]


NO_EVALUATION = html.soft("Absent: the run has no evaluation of held-out text yet.")


# ---------------------------------------------------------------- head


def headline(history: History, plan: Plan | None) -> str:
    steps, model, config = history.all_steps, history.model, history.config
    done = steps[-1]["step"] if steps else 0
    total = len(plan.steps(config.training.tokens_per_batch)) if plan and config else None
    boxes = []
    if model is not None:
        size = count_parameters(model)
        what = f"parameters, {size.active_with_head:,} active per token with the head; {model.pattern}"
        boxes.append((f"{size.total:,}", what))
    tokens = sum(record["tokens"] for record in steps)
    of_total = f" of {total:,}" if total is not None and total != done else ""
    boxes.append((f"{tokens:,}", f"tokens trained on in {done:,}{of_total} steps"))
    times = [record["time"] for record in history.records if "time" in record]
    speeds = [record["time"]["tokens_per_s"] for record in steps if "time" in record]
    if speeds:
        seconds = duration(sum(time["seconds"] for time in times))
        boxes.append((seconds, f"of steps and evaluations; median {statistics.median(speeds):,.0f} tokens/s"))
    boxes += [change_tile(history, name, sources) for name, sources in mean_groups([history]).items()]
    if history.steps:
        last = history.steps[-20:]
        boxes.append(
            (f"{mean(r['loss'] for r in last):.3f}", f"training loss, mean of the last {len(last)} steps")
        )
    if config is not None:
        boxes.append((html.text(order_name(config)), f"order of the phases; seed {config.training.seed}"))
    boxes.append(
        (html.text(str(history.state.get("plan_hash", "not known"))[:12]), plan_label(history, plan))
    )
    state = "finished" if (history.run_dir / "final").is_dir() else "unfinished: no final model in the folder"
    return f'<p class="soft">{html.text(history.run_dir)} &middot; {state}</p>\n{html.tiles(boxes)}'


def order_name(config: RunConfig) -> str:
    return config.order if isinstance(config.order, str) else ", ".join(config.order)


def plan_label(history: History, plan: Plan | None) -> str:
    stated = history.state.get("plan_hash")
    if plan is None or stated is None:
        return "plan, as the newest checkpoint states it"
    if plan.hash == stated:
        return "plan; the corpora still give this one"
    return f"plan of the newest checkpoint; NOT what the corpora give now, {plan.hash:.12}"


def change_tile(history: History, name: str, sources: Sequence[str]) -> tuple[str, str]:
    """Mean bits per byte at the first phase's end and at the end."""
    (first, before), (_, after) = history.phase_evals[0], history.phase_evals[-1]
    ends = [mean(record["bpb"].get(source, float("nan")) for source in sources) for record in (before, after)]
    return (
        f"{ends[0]:.3f} &rarr; {ends[1]:.3f}",
        f"bits per byte, {name}, mean of {len(sources)}, since {first}",
    )


# ---------------------------------------------------------------- what the run did


def alarms(history: History) -> str:
    """Of evaluations, and of single steps with the rows and documents they read."""
    rows = [(r["step"], r["phase"], line, "") for r in history.evals for line in r.get("alarms", ())]
    of_steps = history.of_kind("alarm")
    rows += [(r["step"], r["phase"], r["what"], read_by(r)) for r in of_steps]
    if not rows:
        return html.soft(f"None in {len(history.all_steps)} steps and {len(history.evals)} evaluations.")
    raised = sum(bool(record.get("alarms")) for record in history.evals)
    last = len(history.evals[-1].get("alarms", ())) if history.evals else 0
    note = (
        f"In {raised} of {len(history.evals)} evaluations, {last} at the last one; {len(of_steps)} of a step."
    )
    cells = [(str(step), *map(html.text, rest)) for step, *rest in sorted(rows, key=lambda row: row[0])]
    table = html.table(("step", "phase", "alarm", "what it read"), cells, (0,))
    return f'<p><span class="bad">{note}</span></p>' + folded(f"{len(rows)} alarms", table, len(rows) > 8)


def read_by(alarm: Record) -> str:
    first, last = alarm["rows"]
    documents = "; ".join(f"{name}: {', '.join(some)}" for name, some in alarm["documents"].items())
    return f"rows {first} to {last}; {documents}"


def folded(summary: str, body: str, fold: bool = True) -> str:
    return f"<details><summary>{html.prose(summary)}</summary>{body}</details>" if fold else body


def training(history: History) -> str:
    if not history.steps:
        return html.soft("Absent: the run has no training step with a loss yet.")
    skipped = len(history.all_steps) - len(history.steps)
    note = f"{skipped} steps were skipped: their gradient was not finite. " if skipped else ""
    return html.soft(f"{note}Bands are the phases.") + html.charts(training_charts(history))


def change_table(history: History, key: str = "bpb") -> str:
    """Every source at the end of each phase; the best in bold, and the change since the first phase's end."""
    ends = [(name, record[key]) for name, record in history.phase_evals if record.get(key)]
    if not ends:
        return NO_EVALUATION
    sources = list(dict.fromkeys(source for _, values in ends for source in values))
    groups = history.by_language(sources) if key == "bpb" else {"chats": sources}

    def row(name: str, values: Sequence[float | None]) -> list[str]:
        known = [value for value in values if value is not None]
        cells = [
            "&ndash;" if v is None else f"<b>{v:.3f}</b>" if v == min(known) else f"{v:.3f}" for v in values
        ]
        first, last = values[0], values[-1]
        if len(values) < 2 or first is None or last is None:
            return [name, *cells, "&ndash;"]
        return [name, *cells, f'<span class="{"bad" if last > first else "good"}">{last - first:+.3f}</span>']

    rows: list[list[str]] = []
    for group, members in groups.items():
        means = [
            mean(values[source] for source in members) if all(s in values for s in members) else None
            for _, values in ends
        ]
        rows.append([html.text(group)])
        rows += [row(html.text(source), [values.get(source) for _, values in ends]) for source in members]
        if len(members) > 1 and key == "bpb":
            rows.append(row(f"<i>mean of {len(members)}</i>", means))
    unit = "Bits per byte of held-out text" if key == "bpb" else "Nats per learnt token of held-out chats"
    so_far = "" if (history.run_dir / "final").is_dir() else " The last column is as far as the run has come."
    note = (
        f"{unit} at the end of each phase, the best in bold; a rise since {ends[0][0]} is forgetting.{so_far}"
    )
    head = ("source", *(html.text(name) for name, _ in ends), f"since {html.text(ends[0][0])}")
    return html.soft(note) + html.table(head, rows, range(1, len(head)))


def chat_section(history: History) -> str:
    """Of a run over chats: the account of them, what the rows hold by task, loss of held-out ones."""
    body = ""
    for record in history.of_kind("chats"):
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in record.get("dropped", {}).items())
        told = ", ".join(f"{record[k]:,} {k.replace('_', ' ')}" for k in CHAT_COUNTS if k in record)
        body += html.soft(f"Chats: {told}; dropped: {dropped or 'none'}.")
        groups = record.get("rows", {}).get("groups", {})
        rows = [
            (
                html.text(name),
                *(f"{g[k]:,}" for k in ("samples", "tokens", "learnt")),
                f"{g['masked_share']:.1%}",
            )
            for name, g in groups.items()
        ]
        body += html.table(("", "readings", "tokens", "learnt", "masked"), rows, range(1, 5))
    if any(record.get("chat_loss") for record in history.evals):
        unit = "loss (nats per learnt token)"
        body += change_table(history, "chat_loss") + html.charts(source_charts(history, "chat_loss", unit))
    return body


CHAT_COUNTS = ("read", "used", "truncated", "held_out", "measured")


def experts(history: History) -> str:
    pictures = list(expert_charts(history))
    if not pictures:
        return html.soft("Absent: no expert layer in the run's records.")
    maps = list(expert_maps(history))
    body = html.charts(pictures) + layer_table(history)
    if not maps:
        return body + html.soft(
            "Absent: the loads of single experts are kept at evaluations, and there is none yet."
        )
    note = (
        "Every expert's load in the steps of the evaluations, against an even share. Dotted: ends of phases."
    )
    body += f"<h3>Expert load</h3>{html.soft(note)}{html.charts([map_key()], narrow=True)}"
    return body + html.charts(maps, small=True)


def layer_table(history: History) -> str:
    """The last step's load, layer by layer, and the last evaluation's by language."""
    last = next(record for record in reversed(history.steps) if record.get("router"))
    judged = next((record for record in reversed(history.evals) if record.get("router_languages")), {})
    languages = judged.get("router_languages", {})
    rows = []
    for layer, load in enumerate(last["router"]):
        cells = [
            str(layer),
            f"{load['load_entropy']:.3f}",
            f"{load['max_over_ideal']:.2f}&times;",
            f"{load['dead']:.0%}",
        ]
        cells += [f"{loads[layer]['load_entropy']:.3f}" for loads in languages.values()]
        overlap = judged.get("expert_overlap")
        rows.append([*cells, f"{overlap[layer]:.1%}" if overlap else "&ndash;"])
    head = [
        "layer",
        "evenness",
        "largest load",
        "idle",
        *(f"evenness on {html.text(language_name(code))}" for code in languages),
    ]
    return html.table([*head, "shared by Hebrew and English"], rows, range(1, len(head) + 1))


def samples(history: History) -> str:
    """What the model wrote, by prompt: at the ends of phases, and folded away at the other evaluations."""
    written = history.of_kind("sample")
    if not written:
        return html.soft("Absent: the run wrote no sample (training.sample_prompts).")
    ends = {record["step"] for _, record in history.phase_evals} | {written[0]["step"], written[-1]["step"]}
    body = ""
    for prompt in dict.fromkeys(record["prompt"] for record in written):
        of_prompt = [record for record in written if record["prompt"] == prompt]
        shown = "".join(sample(record) for record in of_prompt if record["step"] in ends)
        rest = [record for record in of_prompt if record["step"] not in ends]
        body += f'<h3 dir="auto">{html.prose(prompt)}</h3>{shown}'
        body += folded(f"{len(rest)} more steps", "".join(map(sample, rest))) if rest else ""
    return body


def sample(record: Record) -> str:
    answer = "\n" if record.get("chat") else ""  # otherwise the text goes on with the prompt
    words = f"<b>{html.prose(record['prompt'])}</b>{answer}{html.prose(record['text'])}"
    return (
        f'<div class="sample"><span class="soft">step {record["step"]}</span><p dir="auto">{words}</p></div>'
    )


# ---------------------------------------------------------------- what the run read


def plan_section(history: History, plan: Plan | None) -> str:
    if plan is None:
        return html.soft(
            "Absent: " + ("a run over chats has rows of chats." if history.of_kind("chats") else "see above.")
        )
    told = plan.describe()
    assert history.config is not None
    steps = plan.steps(history.config.training.tokens_per_batch)
    phases = [
        (
            html.text(phase["name"]), f"{phase['tokens']:,}", f"{phase['tokens'] / told['tokens']:.1%}",
            f"{phase['anchor_share']:.1%}", f"{phase['documents']:,}", f"{phase['seq_len']:,}",
            f"{sum(step.phase == phase['name'] for step in steps):,}",
            ", ".join(f"{html.text(n)} {of['tokens'] / phase['tokens']:.0%}" for n, of in phase["sources"].items()),
        )
        for phase in told["phases"]
    ]  # fmt: skip
    sources = [
        (
            html.text(source["name"]) + (" (anchor)" if source["anchor"] else ""), f"{source['tokens']:,}",
            f"{source['tokens'] / told['tokens']:.1%}", f"{source['documents']:,}", f"{source['epochs']:.2f}",
        )
        for source in told["sources"]
    ]  # fmt: skip
    head = ("phase", "tokens", "share", "of it anchor", "documents", "row length", "steps", "sources")
    hashes = "".join(
        f"<br>{name} <code>{html.text(told[name])}</code>" for name in ("hash", "rows_hash", "anchor_hash")
    )
    return (
        html.table(head, phases, range(1, 7))
        + "<h3>Sources</h3>"
        + html.table(("source", "tokens", "share", "documents", "times read"), sources, range(1, 5))
        + f'<p class="soft">rows_hash and anchor_hash are the same in every order.{hashes}</p>'
    )


def ledger(history: History) -> str:
    """What became of every document, corpus by corpus."""
    if not history.corpora:
        return html.soft("Absent: no corpus of the configuration is where it was.")
    rows = [ledger_row(name, corpus.index) for name, corpus in history.corpora]
    head = (
        "corpus",
        "read",
        "used",
        "dropped",
        "tokens",
        "bytes per token",
        "languages",
        "dropped for, changed",
    )
    table = html.table(head, rows, range(1, 6))
    sources = [
        (html.text(name), html.text(source), *(f"{counts[k]:,}" for k in ("documents", "tokens", "bytes")))
        for name, corpus in history.corpora
        for source, counts in corpus.index["by_source"].items()
    ]
    by_source = html.table(("corpus", "source", "documents", "tokens", "bytes"), sources, range(2, 5))
    return table + folded(f"{len(sources)} sources", by_source)


def ledger_row(name: str, index: Mapping[str, Any]) -> list[str]:
    told = index["ledger"]
    tokens, size = (sum(counts[key] for counts in index["by_lang"].values()) for key in ("tokens", "bytes"))
    notes = [f"{html.text(reason)} {count:,}" for reason, count in told["dropped"].items()]
    for key in ("removed_characters", "normalized"):
        notes += [
            f"{html.text(what)} {count:,} {key.replace('_', ' ')}"
            for what, count in told.get(key, {}).items()
        ]
    return [
        html.text(name),
        f"{told['read']:,}",
        f"{told['used']:,}",
        f"{sum(told['dropped'].values()):,}",
        f"{tokens:,}",
        f"{size / max(tokens, 1):.2f}",
        ", ".join(
            f"{html.text(lang)} {c['tokens'] / max(tokens, 1):.0%}" for lang, c in index["by_lang"].items()
        ),
        ", ".join(notes) or "&ndash;",
    ]


def configuration(history: History) -> str:
    if history.config is None:
        return html.soft("Absent: see above.")
    note = html.soft(f"Hash of all that can change the weights: {config_hash(history.config)}")
    return note + html.pre(describe(history.config))

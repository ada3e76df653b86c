"""Metrics of a run: metrics.jsonl is the truth, the terminal panel and the plot are views of it.

One JSON object per line, in step order, each with "kind" and "step" (optimizer steps completed):
    chats   first in a run over chats: read, used, dropped (by reason), truncated, held_out, measured (of
            those), rows (ChatRows.describe: masked shares in all, by task and by language)
    step    phase, loss, aux_loss, lr, grad_norm, tokens, loss_tokens, anchor_tokens, skipped, router,
            router_languages and expert_overlap (router.py) of the step's tokens; anchor_kl (anchor_kl.py) in runs
            with the term: nats a token of the anchor's rows, null in a step without any
    eval    phase, bpb (bits per byte by source), router_load (expert counts of that step, by MoE layer),
            router_languages and expert_overlap of the held-out text, alarms (lines; router.py has the thresholds);
            for chats also chat_loss (nats per learnt token of held-out ones: "all", "task/<name>", "lang/<name>")
            and chat_router (the two keys of router health on those chats)
    alarm   phase, what (a line: a loss spike or a step that was not finite; spikes.py), rows (first, last),
            documents (by corpus: id, or # and hash of the text; for chats by source: file, line and id)
    sample  prompt, text, chat (whether text answers the prompt or goes on with it)
What depends on the clock is under "time" alone, so that a resumed run's file equals an uninterrupted one's
in everything else.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.live import Live
    from rich.panel import Panel

METRICS = "metrics.jsonl"
Record = dict[str, Any]

# ---------------------------------------------------------------- the file


class MetricsWriter:
    """Append-only writer. Opening at `step` cuts off every later record and a half-written last line; at 0, where a
    run begins anew, all of them: the account of its chats, of step 0, may be of others than it reads now."""

    def __init__(self, path: Path, step: int) -> None:
        earlier = _records(path) if step and path.exists() else ()
        kept = [entry for entry in earlier if entry[1]["step"] <= step]
        self.last_step: int = kept[-1][1]["step"] if kept else 0
        self.empty = not kept
        tmp = path.with_name(f".tmp-{path.name}")
        with tmp.open("wb") as file:
            file.writelines(line for line, _ in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        self._file: IO[bytes] = path.open("ab")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was written durable; called before a checkpoint that relies on it."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_metrics(run_dir: Path) -> list[Record]:
    """Every complete record of a run, in order. A last line cut by a crash is left out."""
    return list(iter_metrics(run_dir))


def iter_metrics(run_dir: Path) -> Iterator[Record]:
    """The same one by one: those before a damaged line come before its error."""
    path = run_dir / METRICS
    if not path.is_file():
        raise ValueError(f"metrics: run_dir must hold {METRICS}, got {run_dir}")
    return (record for _, record in _records(path))


def without_time(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "time"}


def _records(path: Path) -> Iterator[tuple[bytes, Record]]:
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"metrics: {path} line {number} must be JSON, got {line[:60]!r}") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(
                f"metrics: {path} line {number} must be an object with a step, got {line[:60]!r}"
            )
        yield line, record


# ---------------------------------------------------------------- the screen

BARS = " ▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def load_bars(counts: Sequence[int], width: int = 64) -> str:
    """One character per expert, full height at twice the even share; neighbours are summed beyond `width`."""
    per_char = -(-len(counts) // width)
    sums = [sum(counts[i : i + per_char]) for i in range(0, len(counts), per_char)]
    even = sum(sums) / len(sums)
    if even == 0:
        return BARS[0] * len(sums)
    top = len(BARS) - 1
    return "".join(BARS[0] if s == 0 else BARS[max(1, min(top, round(s / even * top / 2)))] for s in sums)


def printable(text: str, kept: str = "\n\t") -> str:
    """Text with its control characters made visible, but for `kept`: a model's output must not drive the terminal."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(c if c in kept or unicodedata.category(c) not in hidden else "\ufffd" for c in text)


def printable_name(name: str) -> str:
    """A source's or phase's name, which comes out of a file, on one line."""
    return printable(name, kept="")


def bpb_text(bpb: dict[str, float]) -> str:
    return "  ".join(f"{printable_name(source)} {value:.3f}" for source, value in bpb.items())


def sample_text(record: Record) -> str:
    """A sample as one text; the answer to a chat's prompt begins a line of its own."""
    text: str = record["prompt"] + ("\n" if record.get("chat") else "") + record["text"]
    return text


def alarm_text(record: Record) -> str:
    first, last = record["rows"]
    documents = sum(map(len, record["documents"].values()))
    return (
        f"ALARM step {record['step']}  {record['what']} (phase {printable_name(record['phase'])}, "
        f"rows {first}..{last}, {documents} documents: see {METRICS})"
    )


class Reporter(Protocol):
    """Where progress goes: `step` gets each step's record and the tokens per expert of each MoE layer."""

    def __enter__(self) -> object: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> object: ...
    def note(self, text: str) -> None: ...
    def step(self, record: Record, load: Sequence[Sequence[int]]) -> None: ...
    def event(self, record: Record) -> None: ...


class PlainReporter:
    """One line every `every` steps, and one per evaluation: for logs and pipes."""

    def __init__(self, total_steps: int, every: int) -> None:
        self.total_steps, self.every = total_steps, every

    def __enter__(self) -> PlainReporter:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def note(self, text: str) -> None:
        print(printable(text), flush=True)

    def step(self, record: Record, load: Sequence[Sequence[int]]) -> None:
        step, time = record["step"], record["time"]
        if step % self.every and step != self.total_steps and not record["skipped"]:
            return
        loss = "skipped, gradient not finite" if record["skipped"] else f"loss {record['loss']:.4f}"
        percent = 100 * step / self.total_steps
        self.note(
            f"step {step}/{self.total_steps} ({percent:.0f}%)  {printable_name(record['phase'])}  {loss}  "
            f"lr {record['lr']:.2e}  {time['tokens_per_s']:,.0f} tok/s  ETA {duration(time['eta_s'])}"
        )

    def event(self, record: Record) -> None:
        if record["kind"] == "eval":
            if record["bpb"]:
                self.note(f"step {record['step']}  bits per byte: {bpb_text(record['bpb'])}")
            if record.get("chat_loss"):
                self.note(f"step {record['step']}  chat loss: {bpb_text(record['chat_loss'])}")
            for line in record.get("alarms", ()):
                self.note(f"step {record['step']}  worth a look: {line}")
        elif record["kind"] == "alarm":
            self.note(alarm_text(record))
        elif record["kind"] == "sample":
            self.note(f"step {record['step']}  sample:\n{sample_text(record)}")


class LiveReporter:
    """A panel that redraws in place: loss, bits per byte by source, chat loss, rate, speed, phase, expert loads."""

    def __init__(self, total_steps: int, title: str) -> None:
        self.total_steps, self.title = total_steps, title
        self.losses: deque[float] = deque(maxlen=60)
        self.last: Record | None = None
        self.load: Sequence[Sequence[int]] = ()
        self.measured: dict[
            str, list[float]
        ] = {}  # bits per byte and chat losses, by the names they are shown under
        self.sample: Record | None = None
        self.live: Live | None = None

    def __enter__(self) -> LiveReporter:
        from rich.live import Live

        self.live = Live(refresh_per_second=4)
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, trace)

    def note(self, text: str) -> None:
        from rich.text import Text

        if self.live is not None:
            self.live.console.print(Text(printable(text)))

    def step(self, record: Record, load: Sequence[Sequence[int]]) -> None:
        self.last, self.load = record, load
        if not record["skipped"]:
            self.losses.append(record["loss"])
        self._draw()

    def event(self, record: Record) -> None:
        if record["kind"] == "eval":
            for what, values in (("bpb", record["bpb"]), ("chat loss", record.get("chat_loss", {}))):
                for name, value in values.items():
                    self.measured.setdefault(f"{what} {name}", []).append(value)
            for line in record.get("alarms", ()):
                self.note(f"step {record['step']}  worth a look: {line}")
        elif record["kind"] == "alarm":
            self.note(alarm_text(record))
        elif record["kind"] == "sample":
            self.sample = record
        self._draw()

    def _draw(self) -> None:
        if self.live is not None and self.last is not None:
            self.live.update(self._panel(self.last))

    def _panel(self, last: Record) -> Panel:
        from rich.console import Group, RenderableType
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        time = last["time"]
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"step {last['step']}/{self.total_steps}",
            Text(printable_name(last["phase"]), "bold"),
            f"ETA {duration(time['eta_s'])}",
            f"{time['tokens_per_s']:,.0f} tok/s",
            f"lr {last['lr']:.2e}",
            f"grad {last['grad_norm']:.2f}"
            if last["grad_norm"] is not None
            else Text("grad not finite", "red"),
        )
        body = Table.grid(padding=(0, 2))
        if self.losses:
            body.add_row("loss", f"{self.losses[-1]:.4f}", sparkline(self.losses))
        for name, measured in self.measured.items():
            body.add_row(Text(printable_name(name)), f"{measured[-1]:.3f}", sparkline(measured[-60:]))
        for layer, (stats, counts) in enumerate(zip(last["router"], self.load, strict=True)):
            body.add_row(
                f"experts {layer}",
                f"max {stats['max_over_ideal']:.1f}x",
                load_bars(counts),
                f"dead {stats['dead']:.0%}",
            )
        bar = Table.grid(expand=True)  # a bare bar ends without a line break
        bar.add_row(ProgressBar(self.total_steps, last["step"]))
        parts: list[RenderableType] = [head, bar, body]
        if self.sample is not None:  # Hebrew on a line of its own: the terminal orders right-to-left text
            parts += [
                Text(f"sample at step {self.sample['step']}:"),
                Text(printable(sample_text(self.sample))),
            ]
        return Panel(Group(*parts), title=Text(printable_name(self.title)))


def sparkline(values: Sequence[float] | deque[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(BARS) - 2) / (high - low) if high > low else 0.0
    return "".join(BARS[1 + round((value - low) * scale)] for value in values)


def make_reporter(total_steps: int, every: int, title: str) -> Reporter:
    """The live panel on a terminal, plain lines elsewhere."""
    return LiveReporter(total_steps, title) if sys.stdout.isatty() else PlainReporter(total_steps, every)

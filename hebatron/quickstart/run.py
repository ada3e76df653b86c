"""`hebatron quickstart`: from installed text to a trained, checked and exported model, stage by stage.

The output folder gets text/, tokenizer/, corpus/, held_out/, run/ (the training run), sft/ (the run over chats that
follows), hf/ (the export) and report.html. Nothing outside it is written, nothing is downloaded, and no folder is
ever emptied: a second quickstart takes a new folder, and --resume goes on in the old one.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from hebatron.curriculum.build import build_plan
from hebatron.data.corpus import Corpus
from hebatron.data.prepare import prepare
from hebatron.doctor import examine
from hebatron.files import replace_text
from hebatron.model import Hebatron
from hebatron.quickstart import chats
from hebatron.quickstart import corpus as texts
from hebatron.quickstart.checks import check_export, check_resume, check_speed, train_chats
from hebatron.quickstart.findings import (
    ChatCheck,
    ExportCheck,
    Findings,
    ResumeCheck,
    Sample,
    SpeedCheck,
    TokenizerRow,
)
from hebatron.quickstart.report import render
from hebatron.quickstart.settings import BASE, Settings, chat_config, published, run_config
from hebatron.report.figures import plot
from hebatron.report.history import LANGUAGE_NAMES
from hebatron.sizes import describe
from hebatron.tokenizer import Tokenizer, load_tokenizer, train_bpe
from hebatron.training.metrics import LiveReporter, PlainReporter, Record, Reporter, printable, read_metrics
from hebatron.training.run import open_model
from hebatron.training.runconfig import curriculum
from hebatron.training.sections import RunConfig
from hebatron.training.train import train
from hebatron_kernels import build_info

STAMP = "quickstart.json"  # marks a folder as ours and says what is in it
DEFAULT_OUT = Path("runs/quickstart")
LIBRARIES = ("transformers", "matplotlib")
LOGIT_TOLERANCE = 1e-3  # logits are of order 10; 1e-5 is what fp32 gives
CONTEXT = 1024  # tokens, for the model card's memory figures


@dataclass(frozen=True)
class PhaseRow:
    """One phase of the curriculum as it was planned."""

    name: str
    sources: str
    tokens: int
    steps: int
    seq_len: int
    anchor_share: float


@dataclass
class Journal:
    """Prints numbered headings and keeps how long each stage took."""

    stages: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        print(f"\n== {len(self.stages) + 1}. {title}", flush=True)
        began = time.monotonic()
        yield
        self.stages.append((title, time.monotonic() - began))


def quickstart(
    out: Path | None = None,
    *,
    seed: int = 0,
    resume: bool = False,
    settings: Settings | None = None,
    documents: Iterable[texts.Document] | None = None,
    chat_records: Iterable[chats.Record] | None = None,
) -> int:
    """Runs every stage. Returns 0, or 1 where a check failed, or 130 where a signal stopped the training.

    Args:
        out: a new or empty folder; None: runs/quickstart, or the first free one of runs/quickstart-2, -3, ...
        seed: of weights, order of text and samples.
        resume: go on in `out` (None: runs/quickstart), which must hold a quickstart of the same settings.
        settings, documents, chat_records: another size, other text and other chats than the published ones, which
            depend on the CPU's instruction set.
    """
    isa = build_info()["_cpu"].split()[0]
    settings = settings or published(isa)
    for library in LIBRARIES:
        _require(library)
    documents = texts.gather(seed) if documents is None else documents
    chat_records = chats.installed(seed) if chat_records is None else chat_records
    out = open_folder(out, seed, resume, settings)
    print(f"hebatron quickstart in {out}: offline, seed {seed}, under 5 minutes on 2 cores with {isa}")
    journal = Journal()
    with journal.stage("doctor"):
        diagnosis = examine()
        print(diagnosis.text())
    with journal.stage("text and tokenizer"):
        tokenizer, tokenizer_rows = prepare_text(settings, out, documents)
        chats.write(chat_records, out / "text" / "chats.jsonl")
    config = run_config(settings, out, seed)
    with journal.stage("model and plan"):
        card = describe(open_model(config, tokenizer).config, CONTEXT)
        phases, total_steps = plan_rows(config)
        print(f"{card}\n\n{_phase_table(phases)}")
    with journal.stage(f"training: {total_steps} steps"):
        final = train(config, reporter=_reporter(total_steps)).final
    if final is None:
        return _stopped(out, seed)
    plot(config.run_dir)
    resumed = show_text_run(journal, settings, out, seed)
    with journal.stage("chats: supervised fine-tuning on questions and translations"):
        chat_run = chat_config(settings, out, seed)
        told = train_chats(chat_run, _reporter)
        if told is None:
            return _stopped(out, seed)
        print(printable(_chat_text(told)))
    export, speed = show_model(journal, settings, out, tokenizer, chat_run.run_dir / "final")
    findings = Findings(
        run_dir=config.run_dir,
        diagnosis=diagnosis,
        command=_command(out, seed),
        seed=seed,
        stages=journal.stages,
        tokenizer=tokenizer_rows,
        vocab_size=tokenizer.vocab_size,
        model_card=card,
        resume=resumed,
        chats=told,
        export=export,
        speed=speed,
    )
    report = out / "report.html"
    replace_text(report, render(findings))
    minutes = sum(seconds for _, seconds in journal.stages) / 60
    print(f"\n{total_steps} + {told.steps} steps, {minutes:.1f} minutes. Report: {report.resolve()}")
    print(f"Talk to it: hebatron chat {export.folder}")
    failures = problems(findings)
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def show_text_run(journal: Journal, settings: Settings, out: Path, seed: int) -> ResumeCheck:
    """The stages after training on text: what the run left, shown and checked."""
    metrics = read_metrics(out / "run")
    with journal.stage("stop and resume"):
        resumed = check_resume(settings, out, seed)
        print(f"{resumed.steps} steps at once, and stopped after {resumed.stopped_at} and resumed")
        print(f"bit-exact: {'yes' if resumed.bit_exact else 'no'}  (sha256 of weights, optimizer and losses)")
    with journal.stage("samples, after the base and at the end"):
        for sample in _samples(metrics, settings.prompts):
            print(f"\nafter the base:\n{sample.prompt}{printable(sample.before)}")
            print(f"at the end:\n{sample.prompt}{printable(sample.after)}")
    with journal.stage("bits per byte of held-out text, after the base and at the end"):
        before, after = bits_before_after(metrics)
        for source, value in after.items():
            was, change = before[source], value - before[source]
            print(f"{source:<12}{texts.LANGUAGES.get(source, 'he'):<6}{was:7.3f}{value:8.3f}{change:+8.3f}")
    return resumed


def show_model(
    journal: Journal, settings: Settings, out: Path, tokenizer: Tokenizer, final: Path
) -> tuple[ExportCheck, SpeedCheck]:
    """The stages that look at the model both runs made."""
    model = Hebatron.from_pretrained(final)
    with journal.stage("export, reopened by transformers"):
        export = check_export(model, final, out, tokenizer.encode(settings.prompts[0] * 8))
        same = "same" if export.same_greedy_text else "other"
        print(f"{export.folder} opened by transformers {export.transformers_version}, unpatched:")
        print(f"largest logit difference {export.max_logit_difference:.2e}, {same} greedy text")
    with journal.stage("speed: mixture of experts against a dense model of equal total size"):
        speed = check_speed(model, settings)
        print(_speed_text(speed))
    return export, speed


def problems(findings: Findings) -> list[str]:
    """The checks that did not hold: each makes the exit code 1."""
    failures = list(findings.diagnosis.problems)
    if not findings.resume.bit_exact:
        failures.append("stop and resume must be bit-exact, got other weights, optimizer state or losses")
    difference = findings.export.max_logit_difference
    if not difference <= LOGIT_TOLERANCE:  # NaN fails as well
        failures.append(f"export: logits must be within {LOGIT_TOLERANCE} of transformers', got {difference}")
    if not findings.export.same_greedy_text:
        failures.append("export: transformers must write the same greedy text, got another")
    return failures


def _require(library: str) -> None:
    try:
        metadata.version(library)
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"quickstart: package {library} must be installed, got none; run: {texts.INSTALL_HINT}"
        ) from error


# ---------------------------------------------------------------- the folder


def open_folder(out: Path | None, seed: int, resume: bool, settings: Settings) -> Path:
    """The folder to work in, made and stamped, or with `resume` found and its stamp compared."""
    stamp = json.dumps({"seed": seed, "settings": asdict(settings)}, indent=1, ensure_ascii=False)
    if resume:
        folder = out or DEFAULT_OUT
        if not (folder / STAMP).is_file():
            raise ValueError(f"quickstart: --out must hold an earlier quickstart to resume, got {folder}")
        if (folder / STAMP).read_text(encoding="utf-8") != stamp:
            raise ValueError(f"quickstart: --seed and settings must be those of {folder / STAMP} to resume")
        return folder
    if out is None:
        numbered = (DEFAULT_OUT.with_name(f"{DEFAULT_OUT.name}-{n}") for n in itertools.count(2))
        out = next(folder for folder in itertools.chain([DEFAULT_OUT], numbered) if not folder.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"quickstart: --out must be a new or empty folder, got {out}; or add --resume")
    out.mkdir(parents=True, exist_ok=True)
    (out / STAMP).write_text(stamp, encoding="utf-8")
    return out


def _stopped(out: Path, seed: int) -> int:
    print(f"\nstopped; go on with: {_command(out, seed)} --resume")
    return 130


def _command(out: Path, seed: int) -> str:
    return f"hebatron quickstart --out {out}" + (f" --seed {seed}" if seed else "")


# ---------------------------------------------------------------- stages


def prepare_text(
    settings: Settings, out: Path, documents: Iterable[texts.Document]
) -> tuple[Tokenizer, list[TokenizerRow]]:
    """Writes text/, tokenizer/, corpus/ and held_out/; what an interrupted quickstart left whole is kept."""
    training, held_out = texts.split(documents)
    (out / "text").mkdir(exist_ok=True)
    for name, part in (("corpus", training), ("held_out", held_out)):
        texts.write_jsonl(part, out / "text" / f"{name}.jsonl")
    if not (out / "tokenizer" / "tokenizer_config.json").exists():  # written last
        train_bpe((document.text for document in training), settings.vocab_size).save(out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    for name in ("corpus", "held_out"):
        report = prepare([out / "text" / f"{name}.jsonl"], out / name, tokenizer)
        size = f"{report.documents:>7,} documents {report.tokens:>10,} tokens {report.bytes:>11,} bytes"
        print(f"{name:<10}{size}")
    rows = []
    print(f"\nbyte-level BPE of {tokenizer.vocab_size:,} entries, on held-out text (a byte model: 1.00)")
    for language, counts in report.by_lang.items():
        row = TokenizerRow(LANGUAGE_NAMES[language], counts["bytes"], counts["tokens"])
        print(f"{row.name:<12}{row.bytes_per_token:5.2f} bytes per token")
        rows.append(row)
    return tokenizer, rows


def plan_rows(config: RunConfig) -> tuple[list[PhaseRow], int]:
    """The phases as planned, and the number of steps of the whole run."""
    corpora = {entry.name: Corpus.open(entry.path, verify=False) for entry in config.data.corpora}
    plan = build_plan(curriculum(config), corpora)
    steps = Counter(step.phase for step in plan.steps(config.training.tokens_per_batch))
    rows = [
        PhaseRow(
            phase.name,
            ", ".join(f"{name.split('/')[-1]} {weight:g}" for name, weight in phase.sources.items()),
            plan.tokens_in(span),
            steps[phase.name],
            phase.seq_len,
            float(plan.row_is_anchor[span.start : span.stop].mean()),
        )
        for phase, span in plan.blocks
    ]
    return rows, steps.total()


def _phase_table(phases: list[PhaseRow]) -> str:
    lines = [f"{'phase':<12}{'steps':>6}{'tokens':>9}{'row':>6}{'anchor':>8}  sources and weights"]
    lines += [
        f"{p.name:<12}{p.steps:>6}{p.tokens:>9,}{p.seq_len:>6}{p.anchor_share:>8.0%}  {p.sources}"
        for p in phases
    ]
    return "\n".join(lines)


class _WithoutConfig:
    """A reporter that leaves the run's configuration out: the quickstart has shown what matters of it."""

    def note(self, text: str) -> None:
        if not text.startswith("run_dir = "):
            super().note(text)  # type: ignore[misc]


class _Plain(_WithoutConfig, PlainReporter):
    pass


class _Live(_WithoutConfig, LiveReporter):
    pass


def _reporter(total_steps: int) -> Reporter:
    return _Live(total_steps, "hebatron quickstart") if sys.stdout.isatty() else _Plain(total_steps, every=25)


def bits_before_after(metrics: list[Record]) -> tuple[dict[str, float], dict[str, float]]:
    """Bits per byte by source at the end of the base and of the run."""
    evaluations = [record for record in metrics if record["kind"] == "eval"]
    before = [record for record in evaluations if record["phase"] == BASE][-1]
    return before["bpb"], evaluations[-1]["bpb"]


def _samples(metrics: list[Record], prompts: Iterable[str]) -> list[Sample]:
    ends = {record["phase"]: record["step"] for record in metrics if record["kind"] == "step"}
    written = {
        (record["step"], record["prompt"]): record["text"] for record in metrics if record["kind"] == "sample"
    }
    first, last = ends[BASE], max(ends.values())
    return [Sample(prompt, written[first, prompt], written[last, prompt]) for prompt in prompts]


def _chat_text(told: ChatCheck) -> str:
    lines = [
        f"{told.used:,} chats, {told.held_out} of them held out; "
        f"{told.masked_shares['all']:.0%} of the tokens bear no loss",
        f"{'nats per learnt token, held out':<34}{'before':>8}{'after':>8}{'masked':>9}",
    ]
    for name, after in told.losses_after.items():
        before, masked = told.losses_before[name], told.masked_shares[name]
        lines.append(f"{name:<34}{before:8.3f}{after:8.3f}{masked:9.0%}")
    for sample in told.samples:
        lines += [f"\n{sample.prompt}", f"before:\n{sample.before}", f"after:\n{sample.after}"]
    return "\n".join(lines)


def _speed_text(speed: SpeedCheck) -> str:
    lines = [f"{'':<10}{'total':>12}{'active':>12}{'tokens/s':>10}   prefill {speed.batch} x {speed.length}"]
    for name, total, active, rate in (
        ("experts", speed.total_moe, speed.active_moe, speed.tokens_per_s_moe),
        ("dense", speed.total_dense, speed.active_dense, speed.tokens_per_s_dense),
    ):
        lines.append(f"{name:<10}{total:>12,}{active:>12,}{rate:>10,.0f}")
    lines.append(f"{speed.speed_ratio:.2f}x as fast with {speed.size_ratio:.2f}x fewer active parameters")
    return "\n".join(lines)

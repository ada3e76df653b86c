"""The training loop: plan, microbatches, one optimizer step, router bias, metrics, evaluation, checkpoint.

    result = train(load_run_config("run.toml"))

Everything a step does depends on its number, the weights and the optimizer state alone: the plan gives its rows,
the schedule its learning rate. So a run stopped anywhere and started again has the same bits as one that was not
(on one machine, with one number of threads). The run folder holds config.json, metrics.jsonl, tokenizer/,
checkpoints/ and, at the end, final/: the model in the hub's layout with its tokenizer.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from ..chat.chat_data import chat_loss
from ..curriculum.plan import Step, rank_rows
from ..evaluation.evaluate import bits_per_byte
from ..files import fsync
from ..hub import write_generation_config
from ..model import RouterStats
from ..router import Health, LanguageCounts, alarms, router_load
from .anchor_kl import AnchorTerm
from .checkpoint import remove_old, run_lock, save_checkpoint
from .lora import ADAPTER, adapter_files, coverage, merge_adapters, write_adapter
from .metrics import METRICS, MetricsWriter, Record, Reporter, iter_metrics, make_reporter
from .optim import clip_gradients, set_learning_rate, step_learning_rate
from .run import Run, headline, open_run, resume, save_tokenizer, write_config
from .runconfig import check_run_config, config_hash, describe
from .sections import RunConfig
from .spikes import LossWatch
from .trees import to_table


class Diverged(ValueError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class TrainResult:
    """What one call of `train` reached. final: the exported model, once all steps are done."""

    run_dir: Path
    step: int
    total_steps: int
    bits_per_byte: dict[str, float]  # of the last evaluation in this call
    final: Path | None
    chat_loss: dict[str, float] = field(default_factory=dict)  # of that evaluation, for chats

    @property
    def finished(self) -> bool:
        return self.step == self.total_steps


def train(
    config: RunConfig, stop_after: int | None = None, force: bool = False, reporter: Reporter | None = None
) -> TrainResult:
    """Train `config` from its newest intact checkpoint, or from the start.

    Args:
        stop_after: stop, with a checkpoint, once this many steps of the run are done (as a signal would).
        force: resume although the configuration or the plan differs from the checkpoint's.
        reporter: where progress goes; default: a live panel on a terminal, plain lines elsewhere.

    SIGINT and SIGTERM finish the step, save and return; a second one interrupts at once.
    Raises ValueError for bad input, a folder in use, a damaged or different run; Diverged (a ValueError) after
    `optimizer.max_bad_steps` non-finite steps in a row. No checkpoint is written while the last step was bad.
    """
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"train: stop_after must be >= 1, got {stop_after}")
    check_run_config(config)
    with run_lock(config.run_dir), stop_on_signals() as stopping, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        run = open_run(config)
        notices = resume(run, force)
        write_config(config)
        save_tokenizer(run)
        if reporter is None:
            reporter = make_reporter(run.total, config.training.log_every, f"hebatron train {config.run_dir}")
        with reporter, MetricsWriter(config.run_dir / METRICS, run.step) as metrics:
            if metrics.last_step < run.step:
                notices.append(
                    f"{METRICS} ends at step {metrics.last_step}: the steps after it are not in it"
                )
            told = [] if config.lora is None else coverage(run.model)
            told += [] if run.chats is None else run.chats.lines()
            for notice in [describe(config), headline(run), *told, *notices]:
                reporter.note(notice)
            if run.chats is not None and metrics.empty:
                metrics.write(run.chats.record())
            loop(run, metrics, reporter, stopping, run.total if stop_after is None else stop_after)
        final = finish(run) if run.step == run.total else None
    return TrainResult(config.run_dir, run.step, run.total, run.bpb, final, run.chat_loss)


def loop(
    run: Run, metrics: MetricsWriter, reporter: Reporter, stopping: threading.Event, stop_after: int
) -> None:
    """Steps until the plan ends, `stop_after` or a signal; then a checkpoint of where it got to."""
    settings = run.config.training
    last, began, began_at = min(run.total, stop_after), time.monotonic(), run.step
    saved_at, save_due = run.step, False
    watch = LossWatch(iter_metrics(run.config.run_dir))
    if run.step < last:
        remove_final(run)
    while run.step < last and not stopping.is_set():
        step_began = time.monotonic()
        record, counts = train_step(run)
        now = time.monotonic()
        record["time"] = {
            "unix": time.time(),
            "seconds": now - step_began,
            "tokens_per_s": record["tokens"] / (now - step_began),
            "eta_s": (now - began) / (run.step - began_at) * (run.total - run.step),
        }
        metrics.write(record)
        reporter.step(record, counts)
        alarm = watch.see(record, run.plan, run.steps[run.step - 1].rows)
        if alarm is not None:
            metrics.write(alarm)
            reporter.event(alarm)
        if run.bad_in_row >= run.config.optimizer.max_bad_steps:
            raise Diverged(run.fault)
        if is_eval_step(run):
            for event in evaluation_records(run, record, counts):
                metrics.write(event)
                reporter.event(event)
        save_due = save_due or run.step % settings.checkpoint_every == 0
        if save_due and run.bad_in_row == 0:
            save(run, metrics)
            saved_at, save_due = run.step, False
    if run.bad_in_row:
        reporter.note(
            f"step {run.step} was not finite: no checkpoint of it, resume goes back to the last one"
        )
    elif run.step > saved_at:
        save(run, metrics)


def train_step(run: Run) -> tuple[Record, list[list[int]]]:
    """One optimizer step. Returns its record and the tokens per expert of each MoE layer."""
    config, step = run.config, run.steps[run.step]
    settings, device = config.training, run.model.device
    lr = step_learning_rate(config, run.steps, run.step)
    set_learning_rate(run.optimizer, lr)
    run.optimizer.zero_grad(set_to_none=True)
    if run.model.draws_random_numbers:  # dropout of step and seed alone: a checkpoint has no GPU's generator
        torch.manual_seed((settings.seed + run.step) % 2**63)

    mine = rank_rows(step.rows, rank=0, world_size=1)  # one process today: docs/architecture.md, parallel
    batches = [run.plan.batch(rows) for rows in run.plan.microbatches(mine, settings.tokens_per_microbatch)]
    # Both sums are divided by what the whole step holds, never by a microbatch's share: k microbatches then give
    # the gradient of one, however the loss-bearing tokens fall into them.
    tokens = sum(batch.input_ids.numel() for batch in batches)
    loss_tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
    nll, routers, by_language = 0.0, RouterSums(), LanguageCounts()
    anchor = AnchorTerm(run.base, config.anchor_kl, batches)
    for batch in batches:
        output = run.model(
            batch.input_ids.to(device),
            cu_seqlens=batch.cu_seqlens.to(device),
            labels=batch.labels.to(device),
            loss_reduction="sum",
            embedding_noise=run.embedding_noise(batch),
        )
        weight = batch.input_ids.numel() / tokens
        loss = output.loss / loss_tokens + anchor.loss(run.model, batch, output.hidden_TD)
        for stats in output.aux:
            loss = loss + settings.router_aux_coefficient * weight * stats.loss
        loss.backward()
        nll += float(output.loss.detach())
        routers.add(output.aux, weight)
        by_language.add(output.aux, *run.plan.token_languages(batch.rows))
    grad_norm = clip_gradients(run.model, config.optimizer.grad_clip)

    skipped = not all(map(math.isfinite, (grad_norm, nll, anchor.nats)))
    if skipped:
        run.bad_in_row += 1
        run.fault = divergence(run, step, nll, grad_norm)
    else:
        run.bad_in_row = 0
        run.optimizer.step()
        if routers.counts and settings.router_bias_rate > 0 and config.lora is None:  # a frozen model's stays
            run.model.update_router_bias(routers.counts, settings.router_bias_rate)
    run.step += 1
    record: Record = {
        "kind": "step",
        "step": run.step,
        "phase": step.phase,
        "loss": None if skipped else nll / loss_tokens,
        "aux_loss": None if skipped else routers.mean_loss(),
        **anchor.record(skipped),
        "lr": lr,
        "grad_norm": None if skipped else grad_norm,
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "anchor_tokens": sum(int(batch.row_starts.diff()[batch.is_anchor].sum()) for batch in batches),
        "skipped": skipped,
        "router": [router_load(counts) for counts in routers.counts],
        **by_language.health(),
    }
    return record, [counts.tolist() for counts in routers.counts]


class RouterSums:
    """Router statistics of one step, summed over its microbatches, by MoE layer."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self.losses: list[float] = []

    def add(self, layers: list[RouterStats], weight: float) -> None:
        losses = [weight * float(stats.loss.detach()) for stats in layers]
        counts = [stats.counts.detach().cpu() for stats in layers]
        self.losses = [a + b for a, b in zip(self.losses or [0.0] * len(losses), losses, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)] if self.counts else counts

    def mean_loss(self) -> float:
        return sum(self.losses) / max(len(self.losses), 1)


def divergence(run: Run, step: Step, nll: float, grad_norm: float) -> str:
    """What was not finite and where, for whoever has to find out why."""
    bad = [
        name for name, p in run.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    return (
        f"train: loss and gradients must be finite, got loss {nll} and gradient norm {grad_norm} at step "
        f"{run.step + 1} (phase {step.phase}, rows {step.rows.start}..{step.rows.stop - 1}), bad step number "
        f"{run.bad_in_row} in a row; first parameters hit: {', '.join(bad[:5]) or 'none'}"
    )


# ---------------------------------------------------------------- evaluation and saving


def is_eval_step(run: Run) -> bool:
    """Every `eval_every` steps, and after each phase's last step: forgetting is measured at phase ends."""
    ends_phase = run.step == run.total or run.steps[run.step].phase != run.steps[run.step - 1].phase
    return ends_phase or run.step % run.config.training.eval_every == 0


def evaluation_records(run: Run, step: Record, counts: list[list[int]]) -> Iterator[Record]:
    """`step`: the record of the step just done; the routers are judged by it where no text is held out."""
    settings, began = run.config.training, time.monotonic()
    run.bpb, health = evaluate_held_out(run)
    run.chat_loss, chat_health = evaluate_chats(run)
    judged = [health] * bool(run.held_out) + [chat_health] * bool(run.chat_loss)
    chats = {} if run.chats is None else {"chat_loss": run.chat_loss, "chat_router": chat_health}
    yield {
        "kind": "eval",
        "step": run.step,
        "phase": run.steps[run.step - 1].phase,
        "bpb": run.bpb,
        **chats,
        "router_load": counts,
        **health,
        "alarms": [line for told in judged or [step] for line in alarms(told, run.languages_read)],
        "time": {"unix": time.time(), "seconds": time.monotonic() - began},
    }
    for prompt in settings.sample_prompts:
        text = {"prompt": prompt, "text": sample(run, prompt), "chat": run.chats is not None}
        yield {"kind": "sample", "step": run.step, **text}


def evaluate_held_out(run: Run) -> tuple[dict[str, float], Health]:
    """Bits per byte by source, and the routers' health on that text. A source name that two corpora share is
    written corpus/source."""
    settings, by_language = run.config, LanguageCounts()
    scores = [
        (name, source, value)
        for name, corpus in run.held_out
        for source, value in bits_per_byte(
            run.model,
            corpus,
            max_tokens=settings.data.held_out_tokens,
            batch_tokens=settings.training.tokens_per_microbatch,
            routing=by_language,
        ).items()
    ]
    sources = [source for _, source, _ in scores]
    bpb = {source if sources.count(source) == 1 else f"{name}/{source}": v for name, source, v in scores}
    if not all(map(math.isfinite, bpb.values())):
        raise Diverged(f"train: bits per byte must be finite, got {bpb} at step {run.step}")
    return bpb, by_language.health()


def evaluate_chats(run: Run) -> tuple[dict[str, float], Health]:
    """Nats per learnt token of the held-out chats by task and language, and the routers' health on them."""
    by_language = LanguageCounts()
    held_out = [] if run.chats is None else run.chats.held_out
    losses = chat_loss(run.model, held_out, run.config.training.tokens_per_microbatch, by_language)
    if not all(map(math.isfinite, losses.values())):
        raise Diverged(f"train: chat loss must be finite, got {losses} at step {run.step}")
    return losses, by_language.health()


def sample(run: Run, prompt: str) -> str:
    """What the model makes of `prompt` now; seeded, so the same weights write the same text."""
    settings = run.config.training
    prompt_ids = torch.tensor([run.prompt_ids(prompt)], device=run.model.device)
    ids = run.model.generate(
        prompt_ids,
        max_new_tokens=settings.sample_tokens,
        temperature=0.8,
        top_k=40,
        eos_token_id=sorted({run.tokenizer.eos_id, *(run.model.config.eos_token_ids if run.chats else ())}),
        seed=settings.seed,
    )
    return run.tokenizer.decode(ids[0, prompt_ids.shape[1] :].tolist())


def save(run: Run, metrics: MetricsWriter) -> None:
    """A checkpoint of the state after `run.step` steps, the records up to it made durable first."""
    metrics.sync()
    state = {
        "plan_hash": run.plan.hash,
        "config_hash": config_hash(run.config),
        "base": run.base and run.base.hash,
        "frozen": run.frozen,
        "frozen_path": run.frozen_path,
        "config": to_table(run.config, hashed_only=True),
        "model": run.model.config.to_hub(),
    }
    save_checkpoint(run.checkpoints, run.step, run.model, run.optimizer, state)
    remove_old(run.checkpoints, run.step, run.config.training.keep_last)


def remove_final(run: Run) -> None:
    """Training goes past the model that an earlier call exported: it must not be taken for this run's result."""
    final, doomed = run.config.run_dir / "final", run.config.run_dir / ".tmp-final"
    if doomed.exists():
        shutil.rmtree(doomed)
    if final.exists():
        os.rename(final, doomed)  # first: a half-deleted folder must not look like a model
        shutil.rmtree(doomed)


def finish(run: Run) -> Path:
    """Export the final model and its tokenizer to run_dir/final; one of an earlier call is kept as it is."""
    final, tmp = run.config.run_dir / "final", run.config.run_dir / ".tmp-final"
    if not final.exists():
        if tmp.exists():
            shutil.rmtree(tmp)
        adapter = None
        if run.config.lora is not None:
            adapter = adapter_files(run.model, str(run.config.model.path))
            merge_adapters(run.model)
        run.model.save_pretrained(tmp)
        if adapter is not None:
            write_adapter(tmp / ADAPTER, *adapter)
        run.tokenizer.save(tmp)
        write_generation_config(run.model.config, tmp)
        for path in (*tmp.rglob("*"), tmp):
            fsync(path)
        os.rename(tmp, final)
        fsync(final.parent)
    return final


# ---------------------------------------------------------------- signals


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the old handlers are back for the second."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
        yield stopping
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        stopping.set()
        restore()

    for number in old:
        signal.signal(number, on_signal)
    try:
        yield stopping
    finally:
        restore()

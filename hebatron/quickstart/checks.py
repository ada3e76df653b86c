"""What the quickstart measures after training: stop and resume, chats, export, speed against a dense model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hebatron.hub import export_hf
from hebatron.model import Hebatron
from hebatron.presets import quickstart_dense
from hebatron.quickstart.findings import ChatCheck, ExportCheck, ResumeCheck, Sample, SpeedCheck
from hebatron.quickstart.settings import Settings, resume_config
from hebatron.sizes import count_parameters
from hebatron.training.checkpoint import MODEL, OPTIMIZER, checkpoints
from hebatron.training.metrics import Record, Reporter, read_metrics, without_time
from hebatron.training.run import open_run
from hebatron.training.sections import RunConfig
from hebatron.training.train import evaluate_chats, evaluate_held_out, sample, train

GREEDY_TOKENS = 24


class SilentReporter:
    """Shows nothing: the check's runs are not the user's."""

    def __enter__(self) -> SilentReporter:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def note(self, text: str) -> None:
        return None

    def step(self, record: Record, load: Sequence[Sequence[int]]) -> None:
        return None

    def event(self, record: Record) -> None:
        return None


def check_resume(settings: Settings, out: Path, seed: int) -> ResumeCheck:
    """Trains one short run twice, without a stop and with one, and compares what they leave, bit by bit.

    The second run ends at the stop as if by a signal, and starts again in a new `train` call from its
    checkpoint. Compared are the bytes of weights and optimizer state and every metric but the clock's.
    """
    folder = out / "resume_check"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted quickstart in this same folder
    through = resume_config(settings, out, seed, "through")
    stopped = replace(through, run_dir=folder / "stopped")
    result = train(through, reporter=SilentReporter())
    train(stopped, stop_after=settings.resume_stop, reporter=SilentReporter())
    train(stopped, reporter=SilentReporter())
    digests = [_digest(config.run_dir) for config in (through, stopped)]
    shutil.rmtree(folder)
    return ResumeCheck(result.total_steps, settings.resume_stop, *digests)


def _digest(run_dir: Path) -> str:
    """sha256 of the newest checkpoint's tensors and of the metrics without their times."""
    digest = hashlib.sha256()
    newest = checkpoints(run_dir / "checkpoints")[0]
    for name in (MODEL, OPTIMIZER):
        digest.update((newest / name).read_bytes())
    for record in read_metrics(run_dir):
        digest.update(json.dumps(without_time(record), sort_keys=True).encode())
    return digest.hexdigest()


def train_chats(config: RunConfig, reporter: Callable[[int], Reporter]) -> ChatCheck | None:
    """Trains on the chats of `config` and compares with its start; None where a signal stopped the training.

    reporter: makes one for a number of steps.
    """
    start, prompts = open_run(config), config.training.sample_prompts
    losses_before, _ = evaluate_chats(start)
    bpb_before, _ = evaluate_held_out(start)
    before = [sample(start, prompt) for prompt in prompts]
    result = train(config, reporter=reporter(start.total))
    if not result.finished:
        return None
    records = read_metrics(config.run_dir)
    account = next(record for record in records if record["kind"] == "chats")
    last = [record for record in records if record["kind"] == "eval"][-1]
    written = {record["prompt"]: record["text"] for record in records if record["kind"] == "sample"}
    return ChatCheck(
        steps=result.total_steps,
        used=account["used"],
        held_out=account["held_out"],
        masked_shares={
            name: group["masked_share"]
            for name, group in account["rows"]["groups"].items()
            if not name.startswith("lang/")
        },
        losses_before={name: loss for name, loss in losses_before.items() if not name.startswith("lang/")},
        losses_after={name: loss for name, loss in last["chat_loss"].items() if not name.startswith("lang/")},
        bpb_before=bpb_before,
        bpb_after=last["bpb"],
        samples=[Sample(prompt, text, written[prompt]) for prompt, text in zip(prompts, before, strict=True)],
    )


def check_export(model: Hebatron, tokenizer_folder: Path, out: Path, ids: list[int]) -> ExportCheck:
    """Exports the model, opens the folder with transformers as it is and compares logits and greedy text."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: a local folder needs no network
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = out / "hf"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted quickstart in this same folder
    export_hf(model, tokenizer_folder, folder)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.eval()
    prompt = torch.tensor([ids])
    with torch.no_grad():
        logits = model(prompt).logits
        difference = (logits - theirs(prompt).logits).abs().max().item()
        mine = model.generate(prompt, max_new_tokens=GREEDY_TOKENS, eos_token_id=())
        theirs.generation_config.eos_token_id = None  # both write on: the comparison wants every token
        other = theirs.generate(prompt, max_new_tokens=GREEDY_TOKENS, do_sample=False, pad_token_id=0)
    return ExportCheck(folder, transformers.__version__, difference, torch.equal(mine, other))


def check_speed(model: Hebatron, settings: Settings) -> SpeedCheck:
    """Prefill of one batch through the trained model and a dense one of equal total size, turn by turn."""
    batch, length = settings.prefill
    dense = Hebatron(quickstart_dense(model.config.vocab_size), model.compute_dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=generator)
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(settings.speed_repeats + 1):
        for times, which in zip(seconds, (model, dense), strict=True):
            elapsed = _timed(which.eval(), ids)
            if turn:  # the first turn warms caches and threads
                times.append(elapsed)
    sizes = [count_parameters(which.config) for which in (model, dense)]
    return SpeedCheck(
        batch,
        length,
        settings.speed_repeats,
        sizes[0].total,
        sizes[1].total,
        sizes[0].active_with_head,
        sizes[1].active_with_head,
        batch * length / statistics.median(seconds[0]),
        batch * length / statistics.median(seconds[1]),
    )


def _timed(model: Callable[..., object], ids: Tensor) -> float:
    with torch.no_grad():
        began = time.perf_counter()
        model(ids, logits_to_keep=1)
        return time.perf_counter() - began

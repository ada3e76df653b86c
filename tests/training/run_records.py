"""Records of metrics.jsonl made by hand, and run folders of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hebatron.router import router_load
from hebatron.training.metrics import METRICS, MetricsWriter


def step(number: int, phase: str = "base", skipped: bool = False) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "phase": phase,
        "loss": None if skipped else 5.0 / number,
        "aux_loss": 1.0,
        "lr": 1e-3,
        "grad_norm": None if skipped else 0.5,
        "tokens": 64,
        "loss_tokens": 64,
        "anchor_tokens": 0,
        "skipped": skipped,
        "router": [router_load(torch.tensor([3, 1, 0, 4]))],
        "time": {"unix": 0.0, "seconds": 0.1, "tokens_per_s": 640.0, "eta_s": 75.0},
    }


def evaluation(number: int, phase: str = "base", **bpb: float) -> dict[str, Any]:
    return {
        "kind": "eval",
        "step": number,
        "phase": phase,
        "bpb": bpb or {"he": 2.0, "en": 1.5},
        "router_load": [[3, 1, 0, 4]],
    }


EVAL = evaluation(2)
SAMPLE = {"kind": "sample", "step": 2, "prompt": "שלום", "text": " עולם [b]"}


def write(folder: Path, records: Sequence[dict[str, Any]], at: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    with MetricsWriter(folder / METRICS, at) as writer:
        for record in records:
            writer.write(record)
        writer.sync()
    return folder

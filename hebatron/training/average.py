"""The mean of a run's last checkpoints: it often does better than the last one alone, most of all before the decay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..files import fsync
from ..hub import write_generation_config
from ..tokenizer import load_tokenizer
from .checkpoint import checkpoints, model_tensors
from .run import TOKENIZER, open_checkpoint

AVERAGED = "averaged"  # in the run folder


def average_checkpoints(run_dir: Path, last: int) -> Path:
    """Write the mean of the newest `last` checkpoints to run_dir/averaged, with the tokenizer, and return it.

    The mean runs in fp32, oldest first: mean += (weights - mean) / k. It needs two models' memory, however many
    checkpoints there are. The routers' selection biases are averaged like weights.

    Raises ValueError for fewer checkpoints than asked for (training.keep_last says how many stay), CheckpointError
    for a damaged one: a mean that leaves one out would not be the one asked for.
    """
    if last < 1:
        raise ValueError(f"average: last must be at least 1, got {last}")
    folders = checkpoints(run_dir / "checkpoints")
    if len(folders) < last:
        raise ValueError(
            f"average: last must be at most the {len(folders)} checkpoints in {run_dir}, got {last}; "
            "training.keep_last says how many are kept"
        )
    mean: dict[str, Tensor] = {}
    for k, folder in enumerate(reversed(folders[:last]), 1):
        model = open_checkpoint(folder, device="cpu")
        for name, tensor in model_tensors(model).items():
            if k == 1:
                mean[name] = tensor.detach().clone()
            else:
                mean[name] += (tensor.detach() - mean[name]) / k
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            tensor.copy_(mean[name])
    final, tmp, doomed = (run_dir / name for name in (AVERAGED, f".tmp-{AVERAGED}", f".tmp-old-{AVERAGED}"))
    for left in (tmp, doomed):
        if left.exists():
            shutil.rmtree(left)
    model.save_pretrained(tmp)
    load_tokenizer(run_dir / TOKENIZER).save(tmp)
    write_generation_config(model.config, tmp)
    for path in (*tmp.iterdir(), tmp):
        fsync(path)
    if final.exists():
        os.rename(final, doomed)  # an earlier mean is there until the new one is whole, and never half of it
    os.rename(tmp, final)
    fsync(run_dir)
    if doomed.exists():
        shutil.rmtree(doomed)
    return final

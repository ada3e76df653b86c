"""A model of transformers, accelerated and not: prefill, decoding and a training step on the same parameters.

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_accelerate.py [--only TEXT ...] [--out FILE.json]

The shape is `scaled_570m` with random weights, which both rivals share. transformers computes with whichever of its
experts implementations is fastest in that case, and its Mamba layers in its torch form, for there are no kernels of
others on a CPU. Correctness first.

prefill   a prompt's last logits on bf16 weights; operations counted by bench/floors.py
decode    8 tokens, one after another, on transformers' own cache; against reading the active weights from DRAM
train     forward, backward, clipping and fused AdamW of fp32 weights under bf16 autocast, one sequence: what
          TRL's bf16=True does
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of every kernel it has not

import floors
import torch
from common import Case, run, seconds
from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM

from hebatron import ModelConfig, accelerate, presets

CONFIG = presets.scaled_570m()
STEPS = 8  # of a decode call
Calls = dict[str, Callable[[], object]]


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """transformers' model with the right limit of the step, and an accelerated one of the same tensors."""
    hub = {name: value for name, value in config.to_hub().items() if name != "model_type"}
    model = NemotronHForCausalLM(NemotronHConfig(**hub)).to(dtype).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = config.time_step_limit
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    return model, accelerate(twin)


def fastest(model: Any, names: tuple[str, ...], call: Callable[[], object]) -> str:
    """Leaves `model` with that implementation of its experts."""
    times = {}
    for name in names:
        model.set_experts_implementation(name)
        call()
        times[name] = seconds(call)
    best = min(times, key=lambda name: times[name])
    model.set_experts_implementation(best)
    return f"transformers {best}"


def prefill(tokens: int) -> Calls:
    model, twin = make_model(CONFIG, torch.bfloat16)
    ids = torch.randint(CONFIG.vocab_size, (1, tokens))

    def call(which: Any, length: int = tokens) -> Callable[[], object]:
        return torch.inference_mode()(lambda: which(ids[:, :length], use_cache=True, logits_to_keep=1))

    name = fastest(
        model, ("eager", "grouped_mm"), call(model, 512)
    )  # batched_mm takes weights for every token
    return {"accelerated": call(twin), name: call(model)}


def decode(context: int) -> Calls:
    model, twin = make_model(CONFIG, torch.bfloat16)
    filled = DynamicCache(config=model.config)
    with torch.inference_mode():
        twin(torch.randint(CONFIG.vocab_size, (1, context)), cache=filled, use_cache=True)
    token = torch.zeros(1, 1, dtype=torch.int64)

    def call(which: Any) -> Callable[[], object]:
        cache = copy.deepcopy(filled)

        @torch.inference_mode()
        def steps() -> None:
            for _ in range(STEPS):
                which(token, cache=cache, use_cache=True)

        return steps

    name = fastest(model, ("eager", "grouped_mm", "batched_mm"), call(model))
    return {"accelerated": call(twin), name: call(model)}


def train(tokens: int) -> Calls:
    model, twin = make_model(CONFIG)
    ids = torch.randint(CONFIG.vocab_size, (1, tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def call(which: Any) -> Callable[[], object]:
        which.train()

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss = which(ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(which.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    # eager's backward writes zeros of a whole expert tensor for every expert: over 100 s a step
    model.set_experts_implementation("grouped_mm")
    return {"accelerated": call(twin), "transformers grouped_mm": call(model)}


def cases() -> list[Case]:
    found = []
    for n in (512, 2048):
        ops = floors.forward(CONFIG, floors.Work(1, n))
        calls = lambda n=n: prefill(n)  # noqa: E731
        found.append(Case(f"prefill {n}", calls, floors.operations(ops), limit="bfloat16", tokens=n))
    ops = floors.forward(CONFIG, floors.Work(1, 1, 512))
    read = STEPS * floors.streamed(ops)
    found.append(Case("decode 512", lambda: decode(512), bytes=read, limit="read", tokens=STEPS))
    ops = floors.training(CONFIG, 512)
    found.append(Case("train 512", lambda: train(512), floors.operations(ops), limit="bfloat16", tokens=512))
    return found


def check() -> None:
    model, twin = make_model(presets.tiny())
    ids = torch.randint(64, (2, 50))
    with torch.inference_mode():
        wanted, got = model(ids).logits, twin(ids).logits
    if not (got - wanted).abs().max() <= 1e-5 * wanted.abs().max():
        raise ValueError(f"bench_accelerate: logits must be equal, got {(got - wanted).abs().max()} apart")


if __name__ == "__main__":
    run(__doc__, cases, check)

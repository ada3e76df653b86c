"""Whole models in processes of their own, each asked by lines of text: the rivals of bench/bench_model.py.

A process each, because two OpenMP runtimes and two models' allocations disturb each other, and because the peak memory
is then the rival's alone. Times are taken inside, so the pipe costs nothing. What each understands:

    logits ID...             the last token's logits
    prefill TOKENS           seconds of one prompt of random tokens, the last token's logits included
    open SEQUENCES CONTEXT   a cache for `decode`, filled
    decode STEPS             seconds of so many steps of one token a sequence
    train TOKENS             seconds of a step: forward, backward, clipping, fused AdamW (kinds `training...`)
    resident | peak          bytes of this process now | the most since the last `peak`
    profile LINE             the line, under torch's profiler: a table by operator on stderr (not llama.cpp's)

Run by hand: `python bench/rivals.py native build/bench/scaled_570m`, then type lines.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT

LLAMA = ROOT / "third_party/peers/llama_rival"
# `torch`: our torch form on bf16 weights. `training` has fp32 master weights and says which backend after the tokens.
KINDS = ("native", "torch", "transformers", "training", "training-transformers")
IDLE_S = 0.01  # before each answer: idle OpenMP threads spin for some milliseconds, not while the next rival is timed


def _on_all_cores() -> None:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


class Process:
    """One rival; `ask` sends a line and returns the numbers of the answer."""

    def __init__(self, command: list[str]) -> None:
        # With OMP_PROC_BIND this thread is bound to a core, and a child would inherit that core alone.
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_on_all_cores
        )
        self.command = command

    def wait(self) -> Process:
        answer = self._read()
        if answer != "ready":
            raise ValueError(f"{self.command}: must say ready, got {answer!r}")
        return self

    def ask(self, line: str) -> list[float]:
        assert self.child.stdin is not None
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        return [float(word) for word in self._read().split()]

    def seconds(self, line: str) -> float:
        return self.ask(line)[0]

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()

    def _read(self) -> str:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)}: ended with code {self.child.wait()}")
        return line.strip()


def gguf_file(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}-{kind}.gguf")


def start(kind: str, source: Path | str) -> Process:
    """`kind` of KINDS over a checkpoint's folder or a name for `model_config`; `llama-bf16`, `llama-q8_0` over the GGUF
    file beside the folder."""
    if kind.startswith("llama-"):
        gguf = gguf_file(Path(source), kind.removeprefix("llama-"))
        return Process([str(LLAMA), str(gguf), str(torch.get_num_threads())])
    return Process([sys.executable, str(Path(__file__)), kind, str(source)])


def model_config(name: str) -> Any:
    """A preset, or `PRESET:total`, `PRESET:active`: the dense model of as many parameters."""
    from hebatron.presets import PRESETS, dense_like

    preset, _, share = name.partition(":")
    return dense_like(PRESETS[preset](), share) if share else PRESETS[preset]()


class Ours:
    """hebatron. `native` is frozen for inference; `training` keeps fp32 masters and computes in bf16."""

    def __init__(self, kind: str, source: str) -> None:
        import hebatron_kernels as hk
        from hebatron import Hebatron

        self.use = hk.use_backend
        weights = torch.bfloat16 if kind == "torch" else torch.float32
        if Path(source).is_dir():
            self.model = Hebatron.from_pretrained(source, dtype=weights)
        else:
            self.model = Hebatron(model_config(source)).to(weights)
        self.model.compute_dtype = torch.bfloat16
        self.backend = kind
        self.entries = self.model.config.vocab_size
        if kind == "native":
            self.model.freeze_for_inference()
        if kind == "training":
            from hebatron.training.optim import build_optimizer
            from hebatron.training.sections import OptimizerConfig

            self.optimizer = build_optimizer(self.model, OptimizerConfig(learning_rate=1e-5))
        else:
            self.model.eval().requires_grad_(False)
        self.cache: Any = None

    def last_logits(self, ids_BL: torch.Tensor, cache: Any = None) -> torch.Tensor:
        with torch.inference_mode(), self.use(self.backend):
            logits = self.model(ids_BL, cache=cache, logits_to_keep=1).logits
        return logits[:, -1]

    def open(self, sequences: int, context: int) -> None:
        self.sequences = sequences
        # room for the steps of a case: ten rounds of 16
        self.cache = self.model.new_cache(1, min(context + 256, self.model.config.max_position_embeddings))
        self.last_logits(torch.randint(self.entries, (1, context)), self.cache)
        self.cache.reorder([0] * sequences)

    def step(self, ids_BL: torch.Tensor) -> None:
        self.last_logits(ids_BL, self.cache)

    def train(self, ids_BL: torch.Tensor, backend: str) -> None:
        from hebatron.training.optim import clip_gradients

        with self.use(backend):
            loss = self.model(ids_BL, labels=ids_BL.roll(-1, 1)).loss
            loss.backward()
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Transformers:
    """transformers' NemotronH in bf16, weights included, with its fastest implementation of the experts."""

    IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")

    def __init__(self, kind: str, folder: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.entries = self.model.config.vocab_size
        self.cache: Any = None
        if kind.startswith("training"):
            self.model.train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
            self._pick(32)
        else:
            self.model.eval().requires_grad_(False)
            self._pick(256)

    def _pick(self, tokens: int) -> None:
        """batched_mm copies an expert's weights for every token it serves: only few tokens are asked of it."""
        ids_BL = torch.randint(self.entries, (1, tokens))
        taken = {}
        for name in self.IMPLEMENTATIONS:
            if name == "batched_mm" and tokens > 64:
                continue
            self.model.set_experts_implementation(name)
            self.last_logits(ids_BL)
            begin = time.perf_counter()
            self.last_logits(ids_BL)
            taken[name] = time.perf_counter() - begin
        best = min(taken, key=lambda name: taken[name])
        self.model.set_experts_implementation(best)
        print(f"transformers: {taken} seconds for {tokens} tokens, {best} taken", file=sys.stderr, flush=True)

    def last_logits(self, ids_BL: torch.Tensor, cache: Any = None) -> torch.Tensor:
        with torch.inference_mode():
            out = self.model(ids_BL, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        return out.logits[:, -1].float()

    def open(self, sequences: int, context: int) -> None:
        """Only the first 512 tokens are computed; attention's keys are repeated up to the context: as many to read."""
        self.sequences = sequences
        first = min(context, 512)
        with torch.inference_mode():
            ids_BL = torch.randint(self.entries, (sequences, first))
            self.cache = self.model(ids_BL, use_cache=True, logits_to_keep=1).past_key_values
            for layer in self.cache.layers:
                if getattr(layer, "keys", None) is not None and layer.keys.dim() == 4:
                    times = (1, 1, -(-context // first), 1)
                    layer.keys = layer.keys.repeat(times)[:, :, :context]
                    layer.values = layer.values.repeat(times)[:, :, :context]

    def step(self, ids_BL: torch.Tensor) -> None:
        self.last_logits(ids_BL, self.cache)

    def train(self, ids_BL: torch.Tensor) -> None:
        self.model(ids_BL, labels=ids_BL).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def status_bytes(name: str) -> int:
    """A line of /proc/self/status, there in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def answer(model: Ours | Transformers, verb: str, words: list[str]) -> list[float]:
    if verb == "logits":
        return model.last_logits(torch.tensor([[int(word) for word in words]]))[0].tolist()
    if verb == "resident":
        return [status_bytes("VmRSS")]
    if verb == "peak":
        peak = status_bytes("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
        return [peak]
    if verb == "open":
        model.open(int(words[0]), int(words[1]))
        return [0.0]
    if verb == "decode":
        steps = torch.randint(model.entries, (int(words[0]), model.sequences, 1))
        begin = time.perf_counter()
        for ids_BL in steps:
            model.step(ids_BL)
        return [time.perf_counter() - begin]
    if verb == "profile":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            taken = answer(model, words[0], words[1:])
        table = profile.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=48
        )
        print(f"{' '.join(words)}: {taken[0]:.3f} s\n{table}", file=sys.stderr, flush=True)
        return taken
    ids_BL = torch.randint(model.entries, (1, int(words[0])))
    begin = time.perf_counter()
    if verb == "prefill":
        model.last_logits(ids_BL)
    elif verb == "train":
        model.train(ids_BL, *words[1:])
    else:
        raise ValueError(f"rivals: a line must be one of this file's head, got {verb!r}")
    return [time.perf_counter() - begin]


def main() -> None:
    kind, source = sys.argv[1:]
    if kind not in KINDS:
        raise ValueError(f"rivals: KIND must be one of {', '.join(KINDS)}, got {kind}")
    torch.manual_seed(0)
    make = Transformers if kind.endswith("transformers") else Ours
    model = make(kind, source)
    print("ready", flush=True)
    for line in sys.stdin:
        verb, *words = line.split()
        numbers = answer(model, verb, words)
        time.sleep(IDLE_S)
        print(*numbers, flush=True)


if __name__ == "__main__":
    main()

"""The whole models that gpu_model.py times, under one set of methods: ours with its experts, and the dense ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from dense import Dense
from floors import Transformer
from gpu_model_cases import ROOM_TOKENS, Shape
from torch import Tensor

import hebatron_kernels as hk
from hebatron import Hebatron
from hebatron.cache import NOTHING, Cache, CacheStep
from hebatron.config import ModelConfig
from hebatron.decoder import Decoder
from hebatron.model import Router

BF16 = torch.bfloat16
Step = Callable[[Tensor, Tensor], Tensor]  # (ids_Q, lengths_Q) to logits


def build(config: ModelConfig, device: torch.device, seed: int = 0) -> Hebatron:
    """In bf16 (fp32 where the model keeps it): shapes on meta, then each tensor once on the device, drawn there."""
    model = Hebatron(config, device="meta").to(BF16)
    if device.type == "meta":
        return model
    model = model.to_empty(device=device)
    model.initialise(seed)
    # Tokens stay apart: at the 0.02 of training they would not, nor would they choose different experts.
    with torch.no_grad():
        model.backbone.embeddings.weight.div_(config.initializer_range)
        for name, weight in model.named_parameters():
            if name.endswith(("down_proj", "down_proj.weight", "o_proj.weight")):
                weight.mul_(0.1)
    return model.eval().requires_grad_(False)


class Experts:
    """The model of experts as the benchmark drives it; DenseSubject has the same methods."""

    def __init__(self, model: Hebatron) -> None:
        self.model, self.device = model, model.device

    def prefill(self, ids_T: Tensor, chunk: int) -> Tensor:
        """(1, V), the last logits of one sequence in fp32; its caches are filled and dropped."""
        return self._prefill(ids_T[None], chunk, 0)[0]

    def _prefill(self, ids_QT: Tensor, chunk: int, room_tokens: int) -> tuple[Tensor, Cache]:
        rows, tokens = ids_QT.shape
        cache = self.cache(rows, tokens + room_tokens)
        for part_QT in ids_QT.split(chunk, 1):
            out = self.model(part_QT, cache=cache, logits_to_keep=1)
        return out.logits[:, -1], cache

    def cache(self, rows: int, tokens: int) -> Cache:
        """Without a bucket's padding: it would run rows that count for nothing, and the dense models have none."""
        where = (self.model.compute_dtype, self.device)
        return Cache(self.model.config, rows, tokens, *where, pad_rows=False)

    def step(self, cache: Cache) -> Step:
        def decode(ids_Q: Tensor, lengths_Q: Tensor) -> Tensor:
            new, table = [1] * len(ids_Q), cache.block_table
            step = CacheStep(cache, new, cache.mamba, True, lengths_Q, table, *[NOTHING] * 4)
            return self.model.next_logits(ids_Q, step)

        return decode

    def fill(self, rows: int, context: int) -> Step:
        """A decoding step behind caches of `context` random keys, with room for ROOM_TOKENS steps."""
        return self.step(filled(self.cache(rows, context + ROOM_TOKENS)))

    def decoder(self, rows: int, context: int) -> Callable[[Tensor], Tensor]:
        """What `generate` decodes with, behind as much; (rows,) ids to (rows, V) logits."""
        cache = filled(self.model.new_cache(rows, context + ROOM_TOKENS))
        cache.lengths = [context] * rows
        if self.device.type == "cuda":
            return Decoder(self.model, cache)
        return Decoder(self.model, cache, lambda device: lambda run: run)  # a dry run: launched at every call

    def follow(self, ids_QT: Tensor, chunk: int) -> tuple[Tensor, Step]:
        """The last logits of sequences of equal length, and the step that goes on from there."""
        logits_QV, cache = self._prefill(ids_QT, chunk, ROOM_TOKENS)
        return logits_QV, self.step(cache)

    def all_logits(self, ids_T: Tensor, last: int) -> Tensor:
        """(last, V), what follows each of the last tokens, by torch, in fp64 where the weights are."""
        with torch.no_grad(), hk.use_backend("torch"):
            logits: Tensor = self.model(ids_T[None], logits_to_keep=last).logits[0]
        return logits

    def to(self, device: torch.device, dtype: torch.dtype) -> Experts:
        return Experts(copy.deepcopy(self.model).to(device, dtype))


def filled(cache: Cache) -> Cache:
    for state in cache.mamba.values():
        state.conv.normal_()
        state.ssm.normal_(0.0, 0.1)
    for pages in cache.pages.values():
        pages.normal_()
    return cache


class DenseSubject:
    def __init__(self, model: Dense, longest: int) -> None:
        self.model, self.device, self.longest = model, model.device, longest
        model.positions(longest)

    def prefill(self, ids_T: Tensor, chunk: int) -> Tensor:
        return self.model.prefill(ids_T, self.model.pages(1, len(ids_T)))

    def fill(self, rows: int, context: int) -> Step:
        pages = self.model.pages(rows, context + ROOM_TOKENS)
        for layer in pages.layers:
            layer.normal_()
        return lambda ids_Q, lengths_Q: self.model.decode(ids_Q, lengths_Q, pages)

    def follow(self, ids_QT: Tensor, chunk: int) -> tuple[Tensor, Step]:
        pages = self.model.pages(len(ids_QT), ids_QT.shape[1] + ROOM_TOKENS)
        logits = [self.model.prefill(ids_T, pages, row) for row, ids_T in enumerate(ids_QT)]
        return torch.cat(logits), lambda ids_Q, lengths_Q: self.model.decode(ids_Q, lengths_Q, pages)

    def all_logits(self, ids_T: Tensor, last: int) -> Tensor:
        with torch.no_grad(), hk.use_backend("torch"):
            return self.model.prefill(ids_T, last=last)

    def to(self, device: torch.device, dtype: torch.dtype) -> DenseSubject:
        return DenseSubject(self.model.to(device, dtype), self.longest)


Subject = Experts | DenseSubject


def make(shape: Shape, device: torch.device, longest: int) -> Subject:
    if isinstance(shape, Transformer):
        return DenseSubject(Dense(shape, device), longest)
    return Experts(build(shape, device))


class FixedStep:
    """A step as fixed launches: ids, lengths and the place in the drawn ids lie on the device and move on at each."""

    def __init__(self, step: Step, ids_SQ: Tensor, context: int, backend: str) -> None:
        self.step, self.ids_SQ, self.backend = step, ids_SQ, backend
        self.lengths_Q = torch.full(ids_SQ.shape[1:], context, dtype=torch.int32, device=ids_SQ.device)
        self.at = torch.zeros(1, dtype=torch.int64, device=ids_SQ.device)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Logits, and what greedy decoding would choose: part of a step, used or not."""
        with torch.no_grad(), hk.use_backend(self.backend):
            ids_Q = self.ids_SQ.index_select(0, self.at)[0]
            logits_QV = self.step(ids_Q, self.lengths_Q)
            self.lengths_Q.add_(1)
            self.at.add_(1).remainder_(len(self.ids_SQ))
            return logits_QV, logits_QV.argmax(1)


@contextmanager
def chosen_experts(subject: Subject) -> Iterator[Callable[[], list[int]]]:
    """A function that says how many experts each layer's router has chosen since."""
    routers = (
        [m for m in subject.model.modules() if isinstance(m, Router)] if isinstance(subject, Experts) else []
    )
    counts: list[Tensor] = []
    hooks = [router.register_forward_hook(lambda _m, _a, out: counts.append(out[3])) for router in routers]
    try:
        yield lambda: [int((counts_E > 0).sum()) for counts_E in counts]
    finally:
        for hook in hooks:
            hook.remove()

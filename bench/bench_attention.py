"""Attention at the model's head shape (32 query heads over 2, 128 wide): the C++ kernels against the torch form (SDPA).

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_attention.py [--only TEXT ...] [--out FILE.json]

Prefill is held against the peak of products (causal: half of the square counts), decode against reading from DRAM, both
measured between the rivals in the same run. Correctness is checked before timing. `long` in place of the options
runs 65,536 tokens once, forward and backward, and prints the peak memory.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch
from common import Case, run
from torch import Tensor
from torch.nn import functional as F

import hebatron_kernels as hk
from hebatron_kernels import testing

HEADS, KV_HEADS, HEAD_DIM = 32, 2, 128
# tokens, dtype, whether backward as well
PREFILL = [
    (512, torch.bfloat16, False),
    (4096, torch.bfloat16, False),
    (16384, torch.bfloat16, False),
    (4096, torch.float32, False),
    (512, torch.bfloat16, True),
    (4096, torch.bfloat16, True),
    (4096, torch.float32, True),
]
# sequences, tokens in the cache
DECODE = [(1, 512), (1, 8192), (8, 2048)]


def make(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(tokens, heads, HEAD_DIM).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def prefill(tokens: int, dtype: torch.dtype, backward: bool) -> Case:
    """The forward, or the backward alone: its graph is made once and kept."""
    limit = str(dtype).removeprefix("torch.")
    name = f"attention_prefill {limit} T={tokens} {'backward' if backward else 'forward'}"

    def forward_calls() -> dict[str, Callable[[], object]]:
        qkv = make(tokens, dtype)
        sdpa = [x.transpose(0, 1)[None].contiguous() for x in qkv]
        return {
            "native": lambda: hk.attention_prefill(*qkv, backend="native"),
            "torch form": lambda: hk.attention_prefill(*qkv, backend="torch"),
            "SDPA": lambda: F.scaled_dot_product_attention(*sdpa, is_causal=True, enable_gqa=True),
        }

    def backward_calls() -> dict[str, Callable[[], object]]:
        leaves = [x.requires_grad_() for x in make(tokens, dtype)]
        upstream = torch.randn(tokens, HEADS, HEAD_DIM).to(dtype)

        def timed(backend: str) -> Callable[[], object]:
            out = hk.attention_prefill(*leaves, backend=backend)
            return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)

        return {"native": timed("native"), "torch form": timed("torch")}

    pairs = tokens * (tokens + 1) // 2
    moved = 2 * tokens * (HEADS + KV_HEADS) * HEAD_DIM * dtype.itemsize
    if backward:
        return Case(name, backward_calls, 10 * HEADS * HEAD_DIM * pairs, 2 * moved, limit)
    return Case(name, forward_calls, 4 * HEADS * HEAD_DIM * pairs, moved, limit)


def decode(sequences: int, tokens: int) -> Case:
    block_size, blocks = 64, tokens // 64 + 1

    def calls() -> dict[str, Callable[[], object]]:
        args = [x.view(sequences, -1, HEAD_DIM) for x in make(sequences, torch.bfloat16)]
        cache = torch.randn(2, sequences * blocks, block_size, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
        table = torch.randperm(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
        lengths = torch.full((sequences,), tokens, dtype=torch.int32)
        return {
            name: lambda b=backend: hk.attention_decode(*args, cache, table, lengths, backend=b)
            for name, backend in (("native", "native"), ("torch form", "torch"))
        }

    size = 2 * sequences * (tokens + 1) * KV_HEADS * HEAD_DIM * 2
    operations = 4 * sequences * (tokens + 1) * HEADS * HEAD_DIM
    return Case(f"attention_decode bfloat16 {sequences} x {tokens}", calls, operations, size, "read")


def long(tokens: int = 65536) -> None:
    qkv = [x.requires_grad_() for x in make(tokens, torch.bfloat16)]
    upstream = torch.randn(tokens, HEADS, HEAD_DIM).bfloat16()
    begin = time.perf_counter()
    out = hk.attention_prefill(*qkv, backend="native")
    middle = time.perf_counter()
    grads = torch.autograd.grad(out, qkv, upstream)
    end = time.perf_counter()
    assert all(x.isfinite().all() for x in (out, *grads))
    work = 2 * HEADS * HEAD_DIM * tokens * (tokens + 1)
    for name, taken, operations in (
        ("forward", middle - begin, work),
        ("backward", end - middle, 2.5 * work),
    ):
        print(f"{tokens} tokens {name}: {taken:.1f} s, {operations / taken / 1e9:.0f} GFLOP/s")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def cases() -> list[Case]:
    return [*(prefill(*row) for row in PREFILL), *(decode(*row) for row in DECODE)]


def check() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        small = [torch.randn(90, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
        testing.check_oracle(
            hk.attention_prefill, [*small, *[None] * 2, True, None, None], dtype, "native", factor=3
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["long"]:
        long()
    else:
        run(__doc__, cases, check)

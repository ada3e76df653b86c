"""The scan at the model's heads (64 of 64, state 128, 8 groups) and the quickstart's (6 of 64, state 64, 1 group): C++
against the torch form, chunked matrix products under autograd.

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_ssd.py [--rounds 9] [--out FILE.json]

Held against the peak of products of the dtype, measured between the rivals in the same run; the operations counted are
those of chunks of 64 tokens, half of a chunk's square. The forward runs without gradients; the backward is timed alone,
its graph made once and kept. Correctness is checked before timing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import accumulate

import torch
from common import Case, interleaved, save, show
from torch import Tensor

import hebatron_kernels as hk
from hebatron_kernels import testing

CHUNK = 64
MODEL = (64, 64, 8, 128)  # heads, head dim, groups, state
QUICKSTART = (6, 64, 1, 64)
DOCUMENTS = [500, 3, 1200, 64, 65, 700, 1, 900, 663]  # 4,096 tokens
# shape, tokens, dtype, whether in documents
CASES = [
    (MODEL, 1024, torch.bfloat16, False),
    (MODEL, 4096, torch.bfloat16, False),
    (MODEL, 4096, torch.bfloat16, True),
    (MODEL, 4096, torch.float32, False),
    (QUICKSTART, 1024, torch.float32, False),
]


def make(shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, documents: bool = False) -> list:
    heads, head_dim, groups, state = shape
    ends = torch.tensor([0, *accumulate(DOCUMENTS)], dtype=torch.int32) if documents else None
    return [
        torch.randn(tokens, heads, head_dim).to(dtype),
        (torch.randn(tokens, heads) - 3).to(dtype),
        -8 * torch.rand(heads),
        (0.3 * torch.randn(tokens, groups, state)).to(dtype),
        (0.3 * torch.randn(tokens, groups, state)).to(dtype),
        torch.ones(heads),
        0.1 * torch.randn(heads),
        (0.0, math.inf),
        ends,
        None,
    ]


def operations(shape: tuple[int, int, int, int], tokens: int, backward: bool) -> int:
    heads, head_dim, groups, state = shape
    through_states, inside, scores = head_dim * state, CHUNK * head_dim, CHUNK * state
    if not backward:
        return tokens * (heads * (4 * through_states + inside) + groups * scores)
    return tokens * (heads * (10 * through_states + 2 * inside) + groups * 3 * scores)


def cases(shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, documents: bool) -> list[Case]:
    args = make(shape, tokens, dtype, documents)
    limit = str(dtype).removeprefix("torch.")
    name = f"{limit} T={tokens} {shape[0]}x{shape[1]} state {shape[3]}{' in documents' if documents else ''}"
    leaves = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    ]
    wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    upstream = torch.randn(tokens, *shape[:2]).to(dtype)

    def forward(backend: str) -> Callable[[], object]:
        return lambda: hk.ssd_scan(*args, backend=backend)

    def backward(backend: str) -> Callable[[], object]:
        y, _ = hk.ssd_scan(*leaves, backend=backend)
        return lambda: torch.autograd.grad(y, wanted, upstream, retain_graph=True)

    rivals = {"native": "native", "torch form": "torch"}
    return [
        Case(
            f"{name} {way}",
            operations(shape, tokens, way == "backward"),
            {n: timed(b) for n, b in rivals.items()},
            limit,
        )
        for way, timed in (("forward", forward), ("backward", backward))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for shape, tokens, dtype, documents in CASES:
        small = (4, *shape[1:2], 1, shape[3])
        check = [
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in make(small, 80, dtype)
        ]
        testing.check_oracle(hk.ssd_scan, check, dtype, "native")
        for case in cases(shape, tokens, dtype, documents):
            if options.only in case.name:
                results += interleaved([case], rounds=options.rounds)
                show(results[-1:])
    if options.out:
        save(options.out, results)


if __name__ == "__main__":
    main()

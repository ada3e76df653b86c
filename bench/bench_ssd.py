"""The scan at the model's heads (64 of 64, state 128, 8 groups) and the quickstart's (6 of 64, state 64, 1 group): C++
against the torch form, chunked matrix products under autograd.

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_ssd.py [--only TEXT ...] [--out FILE.json]

Held against the peak of products of the dtype, measured between the rivals in the same run; the operations counted are
those of chunks of 64 tokens, half of a chunk's square. The forward runs without gradients; the backward is timed alone,
its graph made once and kept. Correctness is checked before timing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from common import Case, run
from torch import Tensor

import hebatron_kernels as hk
from hebatron_kernels import testing

CHUNK = 64
MODEL = (64, 64, 8, 128)  # heads, head dim, groups, state
QUICKSTART = (6, 64, 1, 64)
BACKENDS = {"native": "native", "torch form": "torch"}
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


def case(
    shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, documents: bool, way: str
) -> Case:
    heads, head_dim, groups, state = shape
    limit = str(dtype).removeprefix("torch.")

    def forward() -> dict[str, Callable[[], object]]:
        args = make(shape, tokens, dtype, documents)
        return {name: lambda b=b: hk.ssd_scan(*args, backend=b) for name, b in BACKENDS.items()}

    def backward() -> dict[str, Callable[[], object]]:
        leaves = [
            a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in make(shape, tokens, dtype, documents)
        ]
        wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        upstream = torch.randn(tokens, *shape[:2]).to(dtype)

        def timed(backend: str) -> Callable[[], object]:
            y, _ = hk.ssd_scan(*leaves, backend=backend)
            return lambda: torch.autograd.grad(y, wanted, upstream, retain_graph=True)

        return {name: timed(backend) for name, backend in BACKENDS.items()}

    name = f"ssd_scan {limit} T={tokens} {heads}x{head_dim} state {state}{' in documents' if documents else ''} {way}"
    work = operations(shape, tokens, way == "backward")
    moved = (
        2 * tokens * (heads * head_dim + groups * state) * dtype.itemsize * (2 if way == "backward" else 1)
    )
    return Case(name, forward if way == "forward" else backward, work, moved, limit)


def cases() -> list[Case]:
    return [case(*row, way) for row in CASES for way in ("forward", "backward")]


def check() -> None:
    for shape, _, dtype, _ in CASES:
        small = (4, *shape[1:2], 1, shape[3])
        args = [
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in make(small, 80, dtype)
        ]
        testing.check_oracle(hk.ssd_scan, args, dtype, "native")


if __name__ == "__main__":
    run(__doc__, cases, check)

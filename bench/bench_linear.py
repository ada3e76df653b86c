"""The dense projections, weights packed ahead as in a frozen model, and under training: C++ against F.linear (oneDNN).

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_linear.py [--only TEXT ...] [--out FILE.json]

Held against the peak of products, or at one row against reading the weights from DRAM: there each call takes another of
enough weights that none is in a cache. Correctness is checked before timing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from common import Case, run
from torch import Tensor
from torch.nn import functional as F

import hebatron_kernels as hk
from hebatron_kernels import testing

BF16 = torch.bfloat16
# name, inputs, outputs: Mamba-2's way in and the shared expert of the scaled model, the real model's way in
SHAPES = [("scaled in_proj", 768, 3698), ("scaled up_proj", 768, 1088), ("real in_proj", 2688, 10304)]
ROWS = (1, 512, 2048)
BYTES_OF_WEIGHTS = 2**28  # turned over at one row: eight times a last-level cache of 32 MB
CALLS = 16  # at one row, that a measurement is not all call


def weights(inputs: int, outputs: int, rows: int) -> list[Tensor]:
    count = 1 if rows > 1 else max(CALLS, BYTES_OF_WEIGHTS // (2 * inputs * outputs))
    return [torch.empty(outputs, inputs, dtype=BF16).normal_(std=inputs**-0.5) for _ in range(count)]


def packed(name: str, inputs: int, outputs: int, rows: int) -> Case:
    times = CALLS if rows == 1 else 1

    def calls() -> dict[str, Callable[[], object]]:
        x = torch.randn(rows, inputs).to(BF16)
        plain = weights(inputs, outputs, rows)
        ours, theirs = cycle([hk.linear_pack(w) for w in plain]), cycle(plain)

        def native() -> None:
            for _ in range(times):
                hk.linear_packed(x, next(ours), outputs, backend="native")

        def torch_form() -> None:
            for _ in range(times):
                F.linear(x, next(theirs))

        return {"native": native, "torch form": torch_form}

    operations, size = 2 * rows * inputs * outputs, 2 * inputs * outputs
    title = f"linear packed bfloat16 {name} {rows} rows"
    return Case(title, calls, times * operations, times * size, "read" if rows == 1 else "bfloat16")


def training(name: str, inputs: int, outputs: int, rows: int) -> Case:
    def calls() -> dict[str, Callable[[], object]]:
        x = torch.randn(rows, inputs).to(BF16).requires_grad_()
        weight = weights(inputs, outputs, 2)[0].float().requires_grad_()
        upstream = torch.randn(rows, outputs).to(BF16)

        def both(backend: str) -> object:
            return torch.autograd.grad(hk.linear(x, weight, backend=backend), (x, weight), upstream)

        return {"native": lambda: both("native"), "torch form": lambda: both("torch")}

    operations, size = 6 * rows * inputs * outputs, 12 * inputs * outputs
    return Case(f"linear bfloat16 {name} {rows} rows forward+backward", calls, operations, size, "bfloat16")


def cases() -> list[Case]:
    return [
        *(packed(*shape, rows) for shape in SHAPES for rows in ROWS),
        *(training(*shape, 512) for shape in SHAPES),
    ]


def check() -> None:
    x, weight = torch.randn(70, 100), torch.randn(130, 100)
    for dtype in (BF16, torch.float32):
        testing.check_oracle(hk.linear, [x.double(), weight.double()], dtype, "native")
    got = hk.linear_packed(x.to(BF16), hk.linear_pack(weight.to(BF16)), 130)
    assert torch.equal(got, hk.linear(x.to(BF16), weight.to(BF16), backend="native"))


if __name__ == "__main__":
    run(__doc__, cases, check)

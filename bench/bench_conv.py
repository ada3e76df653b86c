"""causal_conv1d with its silu, and the update in place, at the model's 6,144 channels: C++ against the torch form.

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_conv.py [--only TEXT ...] [--out FILE.json]

The limit is DRAM: the bytes that must move once over the rate of a copy, measured between the rivals in the same run.
Correctness is checked before timing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Case, run
from torch import Tensor

import hebatron_kernels as hk
from hebatron_kernels import testing

CHANNELS, TAPS = 6144, 4
BACKENDS = {"native": "native", "torch form": "torch"}
TOKENS = (512, 4096)
SEQUENCES = (1, 64)  # of an update


def make(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias."""
    return [x.to(dtype) for x in (torch.randn(tokens, CHANNELS), *torch.randn(5, CHANNELS).split([4, 1]))]


def scan(tokens: int, dtype: torch.dtype, grad: bool) -> Case:
    def calls() -> dict[str, Callable[[], object]]:
        x, weight, bias = make(tokens, dtype)
        leaves = [
            x.requires_grad_(grad),
            weight.T.contiguous().requires_grad_(grad),
            bias[0].requires_grad_(grad),
        ]
        upstream = torch.randn(tokens, CHANNELS).to(dtype)

        def forward(backend: str) -> Tensor:
            return hk.causal_conv1d(*leaves, "silu", backend=backend)[0]

        def both(backend: str) -> object:
            return torch.autograd.grad(forward(backend), leaves, upstream)

        return {name: lambda b=b: (both if grad else forward)(b) for name, b in BACKENDS.items()}

    tensors = 5 if grad else 2  # x, y; in the backward x again, the gradient of y and that of x
    name = f"causal_conv1d {str(dtype).removeprefix('torch.')} {tokens}x{CHANNELS}"
    name += " forward+backward" if grad else " forward"
    operations = 2 * TAPS * tokens * CHANNELS * (3 if grad else 1)
    return Case(name, calls, operations, tensors * tokens * CHANNELS * dtype.itemsize)


def update(sequences: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def calls() -> dict[str, Callable[[], object]]:
        x, weight, bias = make(sequences, dtype)
        state = torch.randn(sequences, CHANNELS, TAPS - 1).to(dtype)
        args = (x, state, weight.T.contiguous(), bias[0], "silu")
        return {name: lambda b=b: hk.causal_conv1d_update(*args, backend=b) for name, b in BACKENDS.items()}

    name = f"causal_conv1d_update {str(dtype).removeprefix('torch.')} {sequences}x{CHANNELS}"
    values = CHANNELS * (sequences * (2 + 2 * (TAPS - 1)) + TAPS + 1)
    return Case(name, calls, 2 * TAPS * sequences * CHANNELS, values * dtype.itemsize)


def cases() -> list[Case]:
    scans = [
        scan(tokens, dtype, grad)
        for tokens in TOKENS
        for dtype in (torch.bfloat16, torch.float32)
        for grad in (False, True)
    ]
    return [*scans, *(update(n) for n in SEQUENCES)]


def check() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        args = [torch.randn(70, 48), torch.randn(48, TAPS), torch.randn(48)]
        testing.check_oracle(
            hk.causal_conv1d, [*[a.double() for a in args], "silu", None, None], dtype, "native"
        )


if __name__ == "__main__":
    run(__doc__, cases, check)

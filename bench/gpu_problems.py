"""What the parts of the GPU timing table (gpu_problems_*.py) share: the sizes, a problem and its rivals.

T tokens, E experts, K chosen, N = T*K routed rows, D width, F expert width. Each problem is made when its turn comes
and freed after it. `bytes_moved` counts each input and each output once; only experts with rows are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import GROUPED_GEMM, Forms
from gpu_device import Call
from torch import Tensor

from hebatron_kernels import _triton

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Nano 30B-A3B, and how much of it to time."""

    width: int = 2688
    expert_width: int = 1856
    experts: int = 128
    top_k: int = 6
    tokens: tuple[int, ...] = (4096, 16384, 64, 1, 1024, 8)  # the most wanted first
    tokens_once: int = 65536
    inner: int = 4096  # Mamba-2: 64 heads of 64, its gated norm in 8 groups
    channels: int = 6144  # of its convolution
    attention: tuple[int, ...] = (4096, 65536)
    attention_backward: tuple[int, ...] = (8192, 65536)
    decode: tuple[tuple[int, int], ...] = tuple((b, c) for c in (65536, 8192) for b in (1, 8, 32))
    projections: tuple[tuple[str, int, int], ...] = (("in_proj", 2688, 10304), ("lm_head", 2688, 131072))
    projection_tokens: tuple[int, ...] = (64, 4096)
    copy_bytes: int = 4 << 30
    matmul_size: int = 8192


TINY = Sizes(
    width=64,
    expert_width=48,
    experts=4,
    top_k=2,
    tokens=(8, 1),
    tokens_once=16,
    inner=64,
    channels=64,
    attention=(32,),
    attention_backward=(32,),
    decode=((1, 64),),
    projections=(("in_proj", 64, 96),),
    projection_tokens=(4,),
    copy_bytes=1 << 20,
    matmul_size=64,
)


@dataclass
class Problem:
    kernel: str
    case: str
    bytes_moved: float
    flops: float
    rivals: dict[str, Call]
    reference: str = ""  # the rival whose result the others must give
    other_results: set[str] = field(default_factory=set)  # rivals that do less than the whole operator
    forms: Forms = field(default_factory=lambda: GROUPED_GEMM)  # what the rivals named by implementation are
    sizes: tuple[str, int, int, int, int] | None = None  # use, rows, experts, k, n: of the table of tiles


Maker = Callable[[], Problem]


def by_backend(
    device: torch.device, call: Callable[..., object], triton: Tensor | None = None
) -> dict[str, Call]:
    """The forms of an operator that a device has; of Triton where a tensor like this one can go there."""
    backends = {"native": "ours", "torch": "torch form"} if device.type == "cuda" else {"torch": "torch form"}
    if device.type == "cuda" and triton is not None and _triton.refusal(triton) is None:
        backends["triton"] = "triton"
    return {name: partial(call, backend=backend) for backend, name in backends.items()}


def gradients(op: Callable[..., object], args: Sequence[object], backend: str) -> list[Tensor]:
    """Forward and backward; the upstream gradients are ones, of stride 0 until the operator makes them whole."""
    floats = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
    leaves = [a.detach().requires_grad_() if f else a for a, f in zip(args, floats)]
    out: Any = op(*leaves, backend=backend)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    wanted = [a for a, f in zip(leaves, floats) if f]
    return list(torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs]))

"""The expert layer: the C++ kernels against the torch form (grouped_mm, which on a CPU is no slower than a loop).

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_moe.py [--only TEXT ...] [--out FILE.json]

`grouped_gemm` is the product alone at the model's expert shape (2,688 x 1,856), weights packed within the call.
`moe_mlp packed` is moe_mlp_packed, gather, relu^2, routing weights and sum included, against moe_mlp of the torch form
on bf16 weights. ggml and zentorch stand beside both where they are here; bench/moe_peers.py says what each computes.
The others are moe_mlp forward, and with its backward, on fp32 weights; the torch form casts them as the model did. Each
is held against the peak of products, or against reading the weights from DRAM where few rows use them; both
limits are measured between the rivals. Correctness is checked before timing.
"""

from __future__ import annotations

from collections.abc import Callable

import moe_peers
import torch
from common import Case, run
from torch import Tensor

import hebatron_kernels as hk
from hebatron_kernels import testing

BF16, F32 = torch.bfloat16, torch.float32
BACKENDS = {"native": "native", "torch form": "torch"}
REAL = (2688, 1856)
# experts, rows of each, whether reading the weights is the limit
ROWS = [(8, 96, False), (32, 24, False), (64, 6, True), (64, 1, True)]
# name, tokens, experts, top_k, width, expert width, dtype: what quickstart trains; the scaled model's layer
TRAINING = [
    ("quickstart", 1024, 16, 2, 192, 192, F32),
    ("quickstart", 1024, 16, 2, 192, 192, BF16),
    ("scaled", 512, 128, 6, 768, 544, BF16),
    ("scaled", 2048, 128, 6, 768, 544, BF16),
]


def layer(
    tokens: int, experts: int, top_k: int, width: int, expert_width: int, weight_dtype: torch.dtype
) -> list[Tensor]:
    """x, ids (every expert as often), weights, up, down."""
    ids = (torch.arange(tokens * top_k) % experts).view(tokens, top_k)
    up = torch.empty(experts, expert_width, width, dtype=weight_dtype).normal_(std=width**-0.5)
    down = torch.empty(experts, width, expert_width, dtype=weight_dtype).normal_(std=expert_width**-0.5)
    return [torch.randn(tokens, width), ids, torch.rand(tokens, top_k), up, down]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def products(experts: int, rows: int, reads: bool) -> Case:
    width, outputs = REAL

    def calls() -> dict[str, Callable[[], object]]:
        a = torch.randn(experts * rows, width).to(BF16)
        b = torch.empty(experts, outputs, width, dtype=BF16).normal_(std=width**-0.5).transpose(1, 2)
        ends = (torch.arange(experts) + 1).mul(rows).int()
        found: dict[str, Callable[[], object]] = {
            name: lambda k=k: hk.grouped_gemm(a, b, ends, backend=k) for name, k in BACKENDS.items()
        }
        ids = torch.arange(experts).repeat_interleave(rows)[:, None]
        return found | moe_peers.products(a, ids, b.transpose(1, 2))

    weights = experts * width * outputs
    name = f"grouped_gemm bfloat16 {experts} experts, {rows} rows each"
    return Case(name, calls, 2 * rows * weights, 2 * weights, "read" if reads else "bfloat16")


def inference(experts: int, rows: int, reads: bool) -> Case:
    top_k = 6 if experts * rows % 6 == 0 else 4

    def calls() -> dict[str, Callable[[], object]]:
        x, ids, weights, up, down = layer(experts * rows // top_k, experts, top_k, *REAL, BF16)
        x = x.to(BF16)
        ahead = [x, ids, weights, hk.moe_pack(up), hk.moe_pack(down), experts, REAL[1]]
        found: dict[str, Callable[[], object]] = {
            "native": lambda: hk.moe_mlp_packed(*ahead),
            "native, not packed ahead": lambda: hk.moe_mlp(x, ids, weights, up, down, backend="native"),
            "torch form": lambda: hk.moe_mlp(x, ids, weights, up, down, backend="torch"),
        }
        return found | moe_peers.layers(x, ids, up, down, weights)

    weights = 2 * experts * REAL[0] * REAL[1]
    name = f"moe_mlp packed bfloat16 {experts} experts, {rows} rows each"
    return Case(name, calls, 2 * rows * weights, 2 * weights, "read" if reads else "bfloat16")


def training(
    name: str, tokens: int, experts: int, top_k: int, width: int, expert_width: int, dtype: torch.dtype
) -> list[Case]:
    def forward() -> dict[str, Callable[[], object]]:
        x, *others = layer(tokens, experts, top_k, width, expert_width, F32)
        args = [x.to(dtype), *others]
        return {name: lambda b=b: hk.moe_mlp(*args, backend=b) for name, b in BACKENDS.items()}

    def both() -> dict[str, Callable[[], object]]:
        x, *others = layer(tokens, experts, top_k, width, expert_width, F32)
        leaves = [a.requires_grad_() if a.is_floating_point() else a for a in (x.to(dtype), *others)]
        wanted = [a for a in leaves if a.requires_grad]
        upstream = torch.randn_like(leaves[0])
        return {
            name: lambda b=b: torch.autograd.grad(hk.moe_mlp(*leaves, backend=b), wanted, upstream)
            for name, b in BACKENDS.items()
        }

    work = 4 * tokens * top_k * width * expert_width
    weights = 8 * experts * width * expert_width
    text, limit = f"moe_mlp {name} {name_of(dtype)} T={tokens}", name_of(dtype)
    return [
        Case(f"{text} {kind}", make, n * work, n * weights, limit)
        for kind, n, make in (("forward", 1, forward), ("forward+backward", 3, both))
    ]


def route(tokens: int) -> Case:
    def calls() -> dict[str, Callable[[], object]]:
        logits, bias = torch.randn(tokens, 128), torch.randn(128) / 5
        return {
            name: lambda b=b: hk.moe_route(logits, bias, 6, scale=2.5, backend=b)
            for name, b in BACKENDS.items()
        }

    return Case(f"moe_route T={tokens} 128 experts", calls, 128 * tokens, 512 * tokens)


def check() -> None:
    for dtype in (F32, BF16):
        x, ids, weights, up, down = layer(40, 8, 3, 48, 72, torch.float64)
        testing.check_oracle(hk.moe_mlp, [x.double(), ids, weights.double(), up, down], dtype, "native")
        args = [a.to(dtype) if a.is_floating_point() else a for a in (x, ids, weights, up, down)]
        packed = hk.moe_mlp_packed(*args[:3], hk.moe_pack(args[3]), hk.moe_pack(args[4]), 8, 72)
        assert torch.equal(packed, hk.moe_mlp(*args, backend="native"))
    moe_peers.check()


def cases() -> list[Case]:
    found = [make(*row) for make in (products, inference) for row in ROWS]
    found += [case for row in TRAINING for case in training(*row)]
    return [*found, *(route(tokens) for tokens in (1, 2048))]


if __name__ == "__main__":
    run(__doc__, cases, check, absent=moe_peers.absent())

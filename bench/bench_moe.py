"""The expert layer: the C++ kernels against the torch form (grouped_mm, which on a CPU is no slower than a loop).

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_moe.py [--what KIND ...] [--out FILE.json]

`products` is grouped_gemm alone at the model's expert shape (2,688 x 1,856), weights packed within the call.
`inference` is moe_mlp_packed, gather, relu^2, routing weights and sum included, against moe_mlp of the torch form on
bf16 weights. `training` is moe_mlp forward, and with its backward, on fp32 weights; the torch form casts them as the
model did. Each is held against the peak of products, or against reading the weights from DRAM where few rows use them;
both limits are measured between the rivals. Correctness is checked before timing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import Case, interleaved, save, show
from torch import Tensor

import hebatron_kernels as hk
from hebatron_kernels import testing

BF16, F32 = torch.bfloat16, torch.float32
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
    a = torch.randn(experts * rows, width).to(BF16)
    b = torch.empty(experts, outputs, width, dtype=BF16).normal_(std=width**-0.5).transpose(1, 2)
    ends = (torch.arange(experts) + 1).mul(rows).int()
    calls: dict[str, Callable[[], object]] = {
        "native": lambda: hk.grouped_gemm(a, b, ends, backend="native"),
        "torch form": lambda: hk.grouped_gemm(a, b, ends, backend="torch"),
    }
    work = b.numel() * 2 if reads else 2 * a.numel() * outputs
    name = f"grouped_gemm bfloat16 {experts} experts, {rows} rows each"
    return Case(name, work, calls, "read" if reads else "bfloat16")


def inference(experts: int, rows: int, reads: bool) -> Case:
    top_k = 6 if experts * rows % 6 == 0 else 4
    x, ids, weights, up, down = layer(experts * rows // top_k, experts, top_k, *REAL, BF16)
    x = x.to(BF16)
    ahead = [x, ids, weights, hk.moe_pack(up), hk.moe_pack(down), experts, REAL[1]]
    calls: dict[str, Callable[[], object]] = {
        "native": lambda: hk.moe_mlp_packed(*ahead),
        "native, not packed ahead": lambda: hk.moe_mlp(x, ids, weights, up, down, backend="native"),
        "torch form": lambda: hk.moe_mlp(x, ids, weights, up, down, backend="torch"),
    }
    work = 4 * up.numel() if reads else 4 * experts * rows * REAL[0] * REAL[1]
    name = f"moe_mlp bfloat16 {experts} experts, {rows} rows each, forward"
    return Case(name, work, calls, "read" if reads else "bfloat16")


def training(
    name: str, tokens: int, experts: int, top_k: int, width: int, expert_width: int, dtype: torch.dtype
) -> list[Case]:
    x, ids, weights, up, down = layer(tokens, experts, top_k, width, expert_width, F32)
    args = [x.to(dtype), ids, weights, up, down]
    leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    wanted = [a for a in leaves if a.requires_grad]
    upstream = torch.randn_like(args[0])

    def forward(backend: str) -> Callable[[], object]:
        return lambda: hk.moe_mlp(*args, backend=backend)

    def both(backend: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(hk.moe_mlp(*leaves, backend=backend), wanted, upstream)

    work = 4 * tokens * top_k * width * expert_width
    text = f"moe_mlp {name} {name_of(dtype)} T={tokens}"
    backends = {"native": "native", "torch form": "torch"}
    return [
        Case(f"{text} {kind}", n * work, {k: make(b) for k, b in backends.items()}, name_of(dtype))
        for kind, n, make in (("forward", 1, forward), ("forward+backward", 3, both))
    ]


def route(tokens: int) -> Case:
    logits, bias = torch.randn(tokens, 128), torch.randn(128) / 5
    calls = {
        name: lambda b=backend: hk.moe_route(logits, bias, 6, scale=2.5, backend=b)
        for name, backend in (("native", "native"), ("torch form", "torch"))
    }
    return Case(f"moe_route T={tokens} 128 experts", logits.numel() * 4, calls)


def check() -> None:
    for dtype in (F32, BF16):
        x, ids, weights, up, down = layer(40, 8, 3, 48, 72, torch.float64)
        testing.check_oracle(hk.moe_mlp, [x.double(), ids, weights.double(), up, down], dtype, "native")
        args = [a.to(dtype) if a.is_floating_point() else a for a in (x, ids, weights, up, down)]
        packed = hk.moe_mlp_packed(*args[:3], hk.moe_pack(args[3]), hk.moe_pack(args[4]), 8, 72)
        assert torch.equal(packed, hk.moe_mlp(*args, backend="native"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ["products", "inference", "training", "route"]
    parser.add_argument("--what", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--rows", type=int, nargs="+", help="only these numbers of rows of an expert")
    parser.add_argument("--names", nargs="+", help="only these layers of `training`")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    check()
    makers: list[Callable[[], list[Case]]] = []
    for make in (products, inference):
        if make.__name__ in options.what:
            chosen = [r for r in ROWS if not options.rows or r[1] in options.rows]
            makers += [lambda make=make, r=r: [make(*r)] for r in chosen]
    if "training" in options.what:
        shapes = [t for t in TRAINING if not options.names or t[0] in options.names]
        makers += [lambda t=t: training(*t) for t in shapes]
    if "route" in options.what:
        makers += [lambda n=n: [route(n)] for n in (1, 2048)]
    results = []
    for maker in makers:  # one at a time: 64 experts of the real shape are 1.3 GB
        found = interleaved(maker(), buffer_bytes=2**28, rounds=options.rounds)
        show(found)
        results += found
    if options.out:
        save(options.out, results)


if __name__ == "__main__":
    main()

"""The expert layer's part of the GPU timing table: what is around its products, and the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from gpu_problems import BF16, Maker, Problem, Sizes, by_backend, gradients
from gpu_problems_gemm import stored
from torch import Tensor

import hebatron_kernels as hk

MOST_OF_DECODE = 128  # tokens that one launch serves when nothing is kept for a backward


def layers(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    """What is around the products."""
    for tokens in (sizes.tokens_once, *sizes.tokens):
        for fused in (True, False):
            name = f"moe_combine {tokens}{' fused' if fused else ''}"
            yield name, partial(combination, sizes, device, tokens, fused)
        yield f"moe_route {tokens}", partial(routing, sizes, device, tokens)
        yield f"moe_permute {tokens}", partial(permutation, sizes, device, tokens)


def mlps(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    weights: dict[str, Tensor] = {}
    for tokens in sizes.tokens:
        for backward in (False, True):
            name = f"moe_mlp {tokens}{' backward' if backward else ''}"
            yield name, partial(mlp, sizes, device, weights, tokens, backward)


def chosen(sizes: Sizes, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids_TK = torch.multinomial(torch.ones(tokens, sizes.experts), sizes.top_k).to(device)
    return ids_TK, torch.rand(tokens, sizes.top_k, device=device) + 0.1


def routing(sizes: Sizes, device: torch.device, tokens: int) -> Problem:
    logits = torch.randn(tokens, sizes.experts, device=device)
    call = partial(hk.moe_route, logits, torch.zeros(sizes.experts, device=device), sizes.top_k, scale=2.5)
    bytes_moved = 4.0 * logits.numel() + 12.0 * tokens * sizes.top_k
    return Problem("moe_route", f"{tokens}", bytes_moved, 0.0, by_backend(device, call), "torch form")


def permutation(sizes: Sizes, device: torch.device, tokens: int) -> Problem:
    ids_TK, _ = chosen(sizes, tokens, device)
    x = torch.randn(tokens, sizes.width, device=device, dtype=BF16)
    call = partial(hk.moe_permute, x, ids_TK, sizes.experts)
    bytes_moved = 2.0 * x.numel() * (1 + sizes.top_k) + 16.0 * ids_TK.numel()
    return Problem("moe_permute", f"{tokens}", bytes_moved, 0.0, by_backend(device, call), "torch form")


def combination(sizes: Sizes, device: torch.device, tokens: int, fused: bool) -> Problem:
    """fused: with the shared expert, the residual and the next norm."""
    ids_TK, weights_TK = chosen(sizes, tokens, device)
    order_N = torch.argsort(ids_TK.flatten(), stable=True)
    rows = torch.randn(order_N.numel(), sizes.width, device=device, dtype=BF16)
    shared, residual = torch.randn(2, tokens, sizes.width, device=device, dtype=BF16)
    norm = 1 + 0.1 * torch.randn(sizes.width, device=device)
    call = partial(hk.moe_combine, rows, order_N, weights_TK, tokens)
    if fused:
        call = partial(hk.moe_combine_norm, rows, order_N, weights_TK, norm, 1e-5, shared, residual)
    tensors = sizes.top_k + (4 if fused else 1)
    bytes_moved = 2.0 * tensors * shared.numel() + 12.0 * order_N.numel()
    case = f"{tokens}{' with shared, residual, norm' if fused else ''}"
    return Problem("moe_combine", case, bytes_moved, 0.0, by_backend(device, call), "torch form")


def mlp(
    sizes: Sizes, device: torch.device, weights: dict[str, Tensor], tokens: int, backward: bool
) -> Problem:
    ids_TK, weights_TK = chosen(sizes, tokens, device)
    x = torch.randn(tokens, sizes.width, device=device, dtype=BF16)
    both = [stored(sizes, device, weights, step) for step in ("up", "down")]
    args = (x, ids_TK, weights_TK, *both)
    call = partial(gradients, hk.moe_mlp, args) if backward else partial(hk.moe_mlp, *args)
    used = ids_TK.unique().numel() * 2 * sizes.width * sizes.expert_width
    bytes_moved = 2.0 * (used + 2 * x.numel()) + (
        2.0 * (both[0].numel() * 2 + 2 * x.numel()) if backward else 0
    )
    flops = (3 if backward else 1) * 4.0 * ids_TK.numel() * sizes.width * sizes.expert_width
    case = f"{tokens} uniform" + (" forward and backward" if backward else "")
    kernel = "moe_decode" if tokens <= MOST_OF_DECODE and not backward else "moe"
    return Problem(kernel, case, bytes_moved, flops, by_backend(device, call, x), "torch form")

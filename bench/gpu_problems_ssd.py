"""The state-space scan's part of the GPU timing table: Nano's 64 heads of 64, state 128, 8 groups.

A scan's bytes are its inputs and results once each; the states between segments, on top of them, are ours to keep few.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from gpu_problems import Maker, Problem, Sizes, by_backend, gradients

import hebatron_kernels as hk

BF16 = torch.bfloat16
HEADS, HEAD_DIM, GROUPS, STATE = 64, 64, 8, 128
CHUNK = 64


def scans(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    heads = max(1, sizes.inner // HEAD_DIM)
    for sequences in (64, 1):
        yield f"ssd_update {sequences}", partial(update, device, heads, sequences)
    for tokens, sequences in ((sizes.tokens_once, 1), (sizes.tokens[0], 1), (sizes.tokens[0] * 8, 8)):
        for backward in (False, True):
            name = f"ssd_scan {tokens} in {sequences}{' backward' if backward else ''}"
            yield name, partial(scan, device, heads, tokens, sequences, backward)


def inputs(device: torch.device, heads: int, rows: int) -> list[torch.Tensor]:
    """x, dt, A, B, C, D, dt_bias as the model has them."""
    groups = min(GROUPS, heads)
    x = torch.randn(rows, heads, HEAD_DIM, device=device, dtype=BF16)
    B, C = torch.randn(2, rows, groups, STATE, device=device, dtype=BF16)
    dt = torch.randn(rows, heads, device=device, dtype=BF16)
    A = -torch.linspace(1, 16, heads, device=device)
    D, bias = torch.ones(heads, device=device), torch.linspace(-6, -2, heads, device=device)
    return [x, dt, A, B, C, D, bias]


def update(device: torch.device, heads: int, sequences: int) -> Problem:
    args = inputs(device, heads, sequences)
    state = torch.zeros(sequences, heads, HEAD_DIM, STATE, device=device)
    rivals = by_backend(device, partial(hk.ssd_update, state, *args))
    small = sum(a.numel() * a.element_size() for a in args)
    # each call moves the state on, so that two rivals give different tokens
    return Problem(
        "ssd_update",
        f"{sequences} sequences",
        8.0 * state.numel() + small,
        0.0,
        rivals,
        other_results=set(rivals),
    )


def scan(device: torch.device, heads: int, tokens: int, sequences: int, backward: bool) -> Problem:
    args = inputs(device, heads, tokens)
    cu_seqlens = torch.arange(sequences + 1, device=device, dtype=torch.int32) * (tokens // sequences)
    args = (*args, (0.0, float("inf")), cu_seqlens)
    call = partial(gradients, hk.ssd_scan, args) if backward else partial(hk.ssd_scan, *args)
    x, dt, _, B, C = args[:5]
    rows = x.numel() + dt.numel() + B.numel() + C.numel()
    bytes_moved = 2.0 * (rows + x.numel()) + 4.0 * sequences * heads * HEAD_DIM * STATE
    # of a token and head: C h, the state's update, half of the chunk's pairs twice, one time for all heads of a group
    shared = min(GROUPS, heads) / heads
    flops = tokens * heads * (4.0 * HEAD_DIM * STATE + CHUNK * (STATE * shared + HEAD_DIM))
    if (
        backward
    ):  # inputs and the gradient of y again, the gradients; five products with states, five among pairs
        bytes_moved += 2.0 * (2 * rows + x.numel())
        flops += tokens * heads * (10.0 * HEAD_DIM * STATE + CHUNK * (3 * STATE * shared + 2 * HEAD_DIM))
    case = f"{tokens} tokens in {sequences}" + (" forward and backward" if backward else "")
    kernel = "ssd_scan_bwd" if backward else "ssd_scan"
    return Problem(kernel, case, bytes_moved, flops, by_backend(device, call, x), "torch form")

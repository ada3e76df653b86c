"""Operators under activation checkpointing: recomputed in the backward pass, the same gradients to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hebatron_kernels import (
    attention_prefill,
    causal_conv1d,
    linear_cross_entropy,
    moe_mlp,
    moe_route,
    rms_norm,
    ssd_scan,
)

CU = torch.tensor([0, 5, 5, 40], dtype=torch.int32)


def routed(x: Tensor, up: Tensor) -> Tensor:
    weights, ids, _ = moe_route(x[:, :8], torch.zeros(8), 2)
    return moe_mlp(x, ids, weights, up, up.transpose(1, 2).contiguous())


OPERATORS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w), [(40, 8), (8,)]),
    "causal_conv1d": (lambda x, w, b: causal_conv1d(x, w, b, "silu", CU)[0], [(40, 8), (8, 4), (8,)]),
    "ssd_scan": (
        lambda x, dt, B, C: ssd_scan(x, dt, -torch.ones(2), B, C, None, None, cu_seqlens=CU, chunk_size=8)[0],
        [(40, 2, 4), (40, 2), (40, 1, 8), (40, 1, 8)],
    ),
    "attention_prefill": (
        lambda q, k, v: attention_prefill(q, k, v, CU, CU),
        [(40, 4, 8), (40, 2, 8), (40, 2, 8)],
    ),
    "moe": (routed, [(40, 8), (8, 16, 8)]),
    "linear_cross_entropy": (
        lambda x, w: linear_cross_entropy(x, w, torch.arange(40) % 16),
        [(40, 8), (16, 8)],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_under_checkpointing_has_the_same_gradients(name: str) -> None:
    operator, shapes = OPERATORS[name]
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]
    wanted = torch.autograd.grad(operator(*inputs).square().sum(), inputs)
    got = torch.autograd.grad(checkpoint(operator, *inputs, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

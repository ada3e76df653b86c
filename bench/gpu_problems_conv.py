"""The convolution in the GPU timing table: whole sequences forward and backward, and one token of many sequences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from gpu_problems import BF16, Maker, Problem, Sizes, by_backend, gradients
from torch.nn import functional as F

import hebatron_kernels as hk

TAPS = 4


def convolutions(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    for tokens in (sizes.tokens_once, sizes.tokens[0]):
        for backward in (False, True):
            name = f"conv {tokens}{' backward' if backward else ''}"
            yield name, partial(convolution, sizes, device, tokens, backward)
    for sequences in (1, 64):
        yield f"conv update {sequences}", partial(update, sizes, device, sequences)


def convolution(sizes: Sizes, device: torch.device, tokens: int, backward: bool) -> Problem:
    """Of the middle of a projection, as the model takes it; four documents packed."""
    channels = sizes.channels
    wide = torch.randn(tokens, sizes.inner + channels, device=device, dtype=BF16)
    weight = torch.randn(channels, TAPS, device=device, dtype=BF16)
    bias = torch.randn(channels, device=device, dtype=BF16)
    ends = (torch.arange(5, device=device) * tokens // 4).int()
    args = (wide[:, sizes.inner :], weight, bias, "silu", ends)
    op = hk.causal_conv1d
    call = partial(gradients, op, args) if backward else partial(op, *args)
    rivals = by_backend(device, call)
    if not backward:
        rivals["F.conv1d and silu, one document"] = partial(torch_convolution, *args[:3])
    case = f"{tokens}x{channels}" + (" forward and backward" if backward else "")
    tensors = 5 if backward else 2
    bytes_moved = 2.0 * tensors * tokens * channels
    others = {name for name in rivals if name.startswith("F.")}
    return Problem("conv", case, bytes_moved, 0.0, rivals, "torch form", others)


def torch_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    padded = F.pad(x.T[None], (TAPS - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))[0].T


def update(sizes: Sizes, device: torch.device, sequences: int) -> Problem:
    """The past inputs are x itself: the state is the same after every call, and so is the result."""
    channels = sizes.channels
    x = torch.randn(sequences, channels, device=device, dtype=BF16)
    weight = torch.randn(channels, TAPS, device=device, dtype=BF16)
    bias = torch.randn(channels, device=device, dtype=BF16)
    state = x[:, :, None].expand(-1, -1, TAPS - 1).contiguous()
    call = partial(hk.causal_conv1d_update, x, state, weight, bias, "silu")
    bytes_moved = 2.0 * sequences * channels * (2 + 2 * (TAPS - 1)) + 4.0 * channels * (TAPS + 1)
    return Problem(
        "conv", f"update {sequences}x{channels}", bytes_moved, 0.0, by_backend(device, call), "torch form"
    )

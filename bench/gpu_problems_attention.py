"""Attention's part of the GPU timing table beside SDPA, and torch's own bar of the dense projections."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from gpu_device import Call
from gpu_problems import BF16, Maker, Problem, Sizes, by_backend, gradients
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hebatron_kernels as hk


def attentions(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    for backward, counts in ((False, sizes.attention), (True, sizes.attention_backward)):
        for tokens in counts:
            name = f"attention {tokens}{' backward' if backward else ''}"
            yield name, partial(attention, device, tokens, backward)


def decodes(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    for batch, context in sizes.decode:
        yield f"decode {batch}x{context}", partial(decode, device, batch, context)


def projections(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    for name, inner, outer in sizes.projections:
        for tokens in sizes.projection_tokens:
            yield f"{name} {tokens}", partial(projection, device, name, tokens, inner, outer)


def attention(device: torch.device, tokens: int, backward: bool) -> Problem:
    """One sequence, 32 query heads over 2 of 128, causal; SDPA's kernels by name on the same tensors."""
    q = torch.randn(tokens, 32, 128, device=device, dtype=BF16)
    k, v = torch.randn(2, tokens, 2, 128, device=device, dtype=BF16)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    op = hk.attention_prefill
    rivals = by_backend(device, partial(gradients, op, (q, k, v)) if backward else partial(op, q, k, v))
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION") if device.type == "cuda" else ("MATH",)
    for name in names:
        bar = partial(gradients, sdpa, (q, k, v), name) if backward else partial(sdpa, q, k, v, name)
        rivals[f"SDPA {name}"] = bar
    # o, grad_o, grad_q and q again; k, v and theirs
    tensors = (4 * q.numel() + 4 * k.numel()) if backward else 0
    bytes_moved = 2.0 * (2 * q.numel() + k.numel() + v.numel() + tensors)
    flops = (3.5 if backward else 1) * 2.0 * 32 * tokens**2 * 128
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    forward = "attention_sm90" if hopper else "attention"
    kernel, case = ("attention_bwd", " forward and backward") if backward else (forward, "")
    return Problem(kernel, f"causal {tokens}{case}", bytes_moved, flops, rivals, "torch form")


def decode(device: torch.device, batch: int, context: int) -> Problem:
    """32 query heads over 2 of 128, pages of 64 tokens in any order; SDPA reads contiguous keys of the same values."""
    q = torch.randn(batch, 32, 128, device=device, dtype=BF16)
    k_new, v_new = torch.randn(2, batch, 2, 128, device=device, dtype=BF16)
    pages = context // 64
    cache = torch.randn(2, batch * pages, 64, 2, 128, device=device, dtype=BF16)
    table = torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages).to(device)
    lengths = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
    call = partial(hk.attention_decode, q, k_new, v_new, cache, table, lengths)
    rivals = by_backend(device, call)
    k, v = cache[:, table.long()].flatten(2, 3).transpose(2, 3).contiguous()
    k[:, :, -1], v[:, :, -1] = k_new, v_new

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    rivals["SDPA, contiguous keys"] = sdpa
    bytes_moved = 2.0 * (2 * k.numel() + 2 * q.numel())
    flops = 4.0 * batch * 32 * context * 128
    return Problem("attention_decode", f"{batch}x{context}", bytes_moved, flops, rivals, "torch form")


def projection(device: torch.device, name: str, tokens: int, inner: int, outer: int) -> Problem:
    x = torch.randn(tokens, inner, device=device, dtype=BF16)
    w = torch.randn(outer, inner, device=device, dtype=BF16) * 0.02
    bytes_moved = 2.0 * (x.numel() + w.numel() + tokens * outer)
    rivals: dict[str, Call] = {"F.linear": lambda: F.linear(x, w)}
    return Problem("baseline", f"{name} {tokens}", bytes_moved, 2.0 * tokens * inner * outer, rivals)

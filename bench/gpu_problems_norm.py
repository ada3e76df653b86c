"""The norms' part of the GPU timing table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from gpu_problems import BF16, Maker, Problem, Sizes, by_backend, gradients
from torch.nn import functional as F

import hebatron_kernels as hk

NORM_FORMS = {"plain": 2, "residual": 4, "gated": 3}  # tensors moved by the forward
# and by the backward: inputs, incoming gradients, gradients
NORM_BACKWARD = {"plain": 3, "residual": 6, "gated": 5}


def norms(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    for tokens in (sizes.tokens_once, *sizes.tokens):
        for form in NORM_FORMS:
            yield f"norm {form} {tokens}", partial(norm, sizes, device, form, tokens, False)
    for form in NORM_FORMS:
        yield f"norm {form} backward", partial(norm, sizes, device, form, sizes.tokens[0], True)


def norm(sizes: Sizes, device: torch.device, form: str, tokens: int, backward: bool) -> Problem:
    width = sizes.inner if form == "gated" else sizes.width
    x, other = torch.randn(2, tokens, width, device=device).to(BF16)
    weight = 1 + 0.1 * torch.randn(width, device=device)
    residual, gate = (other if form == name else None for name in ("residual", "gated"))
    group = width // 8 if form == "gated" else None
    args = (x, weight, 1e-5, residual, gate, group)
    call = partial(gradients, hk.rms_norm, args) if backward else partial(hk.rms_norm, *args)
    rivals = by_backend(device, call)
    if form == "plain" and not backward:
        rivals["F.rms_norm"] = lambda: F.rms_norm(x, (width,), weight.to(BF16), 1e-5)
    tensors = NORM_FORMS[form] + (NORM_BACKWARD[form] if backward else 0)
    case = f"{form} {tokens}x{width}" + (" forward and backward" if backward else "")
    return Problem("norm", case, 2.0 * tensors * x.numel() + 4.0 * width, 0.0, rivals, "torch form")

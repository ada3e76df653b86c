"""The loss in the GPU timing table: the head's product with it, forward alone and with the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_problems import BF16, Maker, Problem, Sizes, by_backend
from torch import Tensor
from torch.nn import functional as F

import hebatron_kernels as hk


def losses(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    for backward in (False, True):
        name = f"loss {sizes.tokens[0]}{' backward' if backward else ''}"
        yield name, partial(loss, sizes, device, sizes.tokens[0], backward)


def loss(sizes: Sizes, device: torch.device, tokens: int, backward: bool) -> Problem:
    name, width, entries = sizes.projections[-1]
    x = torch.randn(tokens, width, device=device, dtype=BF16)
    weight = torch.randn(entries, width, device=device, dtype=BF16) * 0.02
    targets = torch.randint(entries, (tokens,), device=device)

    def ours(backend: str) -> Any:
        return run(partial(hk.linear_cross_entropy, backend=backend))

    def run(op: Callable[..., Tensor]) -> Any:
        if not backward:
            return op(x, weight, targets)
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        return torch.autograd.grad(op(*leaves, targets), leaves)

    rivals = by_backend(device, ours)
    whole = "F.linear, F.cross_entropy: bf16 logits whole"
    rivals[whole] = lambda: run(lambda x, w, t: F.cross_entropy(F.linear(x, w), t).float())
    others = {whole}
    products = 3 if backward else 1  # the fourth, which makes the logits again, is ours to pay for
    case = f"{name} {tokens}x{width}x{entries}" + (" forward and backward" if backward else "")
    bytes_moved = 2.0 * (x.numel() + weight.numel()) * (2 if backward else 1)
    flops = products * 2.0 * tokens * width * entries
    return Problem("loss", case, bytes_moved, flops, rivals, "torch form", others)

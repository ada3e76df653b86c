"""linear_cross_entropy as torch operations on chunks of tokens: the (T, V) logits never exist together.

T tokens, D width, V vocabulary entries, C tokens of one chunk.

mean and sum have one upstream number, so their gradients are made in the forward, while a chunk's logits are at
hand, and only scaled in the backward: three products of size T D V instead of the four of a backward that makes the
logits again (T 2,048, D 192, V 4,096, fp32, one core: 156 ms against 212, and 186 with all the logits). The price is
a V x D gradient that lives in fp32 from the forward to the backward. none has an upstream number per token and
recomputes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of one chunk: 2^20 fp32 are 4 MB and stay in the cache; below 256 rows the products starve.
CHUNK_LOGITS, CHUNK_MIN_TOKENS = 2**20, 256


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    kept_T = targets_T != ignore_index
    safe_T = targets_T.where(kept_T, 0)
    if reduction == "none":
        return _EachLoss.apply(x_TD, weight_VD, safe_T, kept_T)
    grad = torch.is_grad_enabled()
    loss = _SummedLoss.apply(
        x_TD, weight_VD, safe_T, kept_T, grad and x_TD.requires_grad, grad and weight_VD.requires_grad
    )
    return loss / kept_T.sum() if reduction == "mean" else loss


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        safe_T: Tensor,
        kept_T: Tensor,
        grad_x: bool,
        grad_weight: bool,
    ) -> Tensor:
        upstream_T = kept_T.to(_compute(x_TD)) if grad_x or grad_weight else None
        losses_T, grad_x_TD, grad_weight_VD = _chunks(
            x_TD, weight_VD, safe_T, kept_T, upstream_T, grad_x, grad_weight
        )
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.dtype = weight_VD.dtype
        return losses_T.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_x_TD is None else grad_x_TD * upstream,
            None if grad_weight_VD is None else (grad_weight_VD * upstream).to(ctx.dtype),
            *(None,) * 4,
        )


class _EachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, safe_T: Tensor, kept_T: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_VD, safe_T, kept_T)
        return _chunks(x_TD, weight_VD, safe_T, kept_T, None, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_VD, safe_T, kept_T = ctx.saved_tensors
        upstream_T = upstream_T.where(kept_T, 0)
        _, grad_x_TD, grad_weight_VD = _chunks(
            x_TD, weight_VD, safe_T, kept_T, upstream_T, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        )
        return grad_x_TD, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype), None, None


def _compute(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(
    x_TD: Tensor,
    weight_VD: Tensor,
    safe_T: Tensor,
    kept_T: Tensor,
    upstream_T: Tensor | None,
    grad_x: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of each token and, with upstream_T, the gradients asked for (that of the weight in fp32 or fp64)."""
    compute = _compute(x_TD)
    wide_VD = weight_VD.to(compute) if x_TD.device.type == "cpu" else weight_VD
    losses_T = torch.zeros_like(safe_T, dtype=compute)
    grad_x_TD = torch.zeros_like(x_TD) if grad_x else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=compute) if grad_weight else None
    rows = max(CHUNK_MIN_TOKENS, CHUNK_LOGITS // weight_VD.shape[0])
    for begin in range(0, x_TD.shape[0], rows):
        chunk = slice(begin, begin + rows)
        # an ignored row may hold anything, NaN too: zeros in its place leave the sums and gradients alone
        ignored_C1 = ~kept_T[chunk, None]
        x_CD, safe_C1 = x_TD[chunk].masked_fill(ignored_C1, 0), safe_T[chunk, None]
        log_p_CV = torch.log_softmax(_logits(x_CD, wide_VD, compute), 1)
        losses_T[chunk] = -log_p_CV.gather(1, safe_C1)[:, 0].where(kept_T[chunk], 0)
        if upstream_T is None:
            continue
        grad_CV = log_p_CV.exp_().scatter_add_(1, safe_C1, log_p_CV.new_full(safe_C1.shape, -1.0))
        grad_CV = grad_CV.mul_(upstream_T[chunk, None]).to(x_TD.dtype)
        if grad_x_TD is not None:
            grad_x_TD[chunk] = grad_CV @ weight_VD
        if grad_weight_VD is not None:
            grad_weight_VD += grad_CV.T @ x_CD
    return losses_T, grad_x_TD, grad_weight_VD


def _logits(x_CD: Tensor, weight_VD: Tensor, compute: torch.dtype) -> Tensor:
    """fp32 logits: a bf16 logit of 20 would be off by up to 0.06, and the loss with it."""
    if x_CD.dtype == compute or x_CD.device.type == "cpu":
        return x_CD.to(compute) @ weight_VD.T
    return torch.mm(
        x_CD, weight_VD.T, out_dtype=compute
    )  # not on the CPU, which gets a widened weight instead

"""The loss in C++ (csrc/cpu/loss.cpp): forward and backward, fp32 and bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native


def supports_linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, reduction: str
) -> str | None:
    return _native.refusal(x_TD, weight_VD)


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    return linear_cross_entropy_keep(x_TD, weight_VD, targets_T, ignore_index, reduction)[0]


def linear_cross_entropy_keep(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """The loss, and each token's logsumexp (0 where ignored)."""
    losses_T, lse_T = (torch.empty(len(targets_T), dtype=torch.float32) for _ in range(2))
    inputs = _inputs(x_TD, weight_VD, targets_T, ignore_index)
    _native.call("linear_cross_entropy_fwd", **inputs, losses=losses_T, lse=lse_T)
    if reduction == "none":
        return losses_T, lse_T
    loss = losses_T.sum()
    return (loss / (targets_T != ignore_index).sum() if reduction == "mean" else loss), lse_T


def linear_cross_entropy_keep_bwd(
    grads: list[Tensor],
    kept: list[Tensor],
    wanted: list[bool],
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
    reduction: str,
) -> list[Tensor]:
    upstream = grads[0] / (targets_T != ignore_index).sum() if reduction == "mean" else grads[0]
    found = [_native.empty(x.shape, x.dtype) for x in (x_TD, weight_VD)]
    _native.call(
        "linear_cross_entropy_bwd",
        **_inputs(x_TD, weight_VD, targets_T, ignore_index),
        lse=kept[0],
        upstream=upstream.expand(targets_T.shape).contiguous(),
        grad_x=found[0],
        grad_weight=found[1],
    )
    return [g if want else g.new_empty(0) for g, want in zip(found, wanted)]


def _inputs(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int) -> dict[str, Any]:
    return {
        "tokens": x_TD.shape[0],
        "entries": weight_VD.shape[0],
        "width": x_TD.shape[1],
        "ignore_index": ignore_index,
        "dtype": _native.dtype_name(x_TD),
        "workers": torch.get_num_threads(),
        "x": x_TD,
        "x_stride": x_TD.stride(0),
        "weight": weight_VD,
        "weight_stride": weight_VD.stride(0),
        "targets": targets_T,
        "targets_stride": targets_T.stride(0),
    }

"""The loss in C++ (csrc/cpu/loss.cpp: forward and backward, fp32 and bf16) and, on CUDA, between torch's products: rows
of logits in csrc/cuda/loss.cu.

T tokens, D width, V vocabulary entries, C tokens of a chunk, S entries of a slab. On CUDA the forward takes chunks of
tokens, whose rows of logits are read once, and the backward slabs of the vocabulary: the gradient of a slab's weights
is whole after one product, where chunks of tokens would add up V x D of them in fp32 (1.4 GB for 131,072 x 2,688).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._dispatch import without_autocast
from .._products import add_product, product

# fp32 logits that exist at once on CUDA, 512 MB: 1,024 rows of 131,072, for which the weights are read in 0.24 ms and
# multiplied in 0.9. Never fewer tokens or entries than keep a product busy.
CHUNK_LOGITS, CHUNK_TOKENS, SLAB_ENTRIES = 2**27, 256, 1024
# fp32 logits that the CPU's forward keeps for the backward, 34 MB. Beyond, they are made again: a fourth product.
KEPT_LOGITS = 2**23


def supports_linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, reduction: str
) -> str | None:
    return _native.refusal(x_TD, weight_VD, cuda=True)


def kernels_linear_cross_entropy(*args: object) -> list[str]:
    return ["loss"]


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    return _forward(x_TD, weight_VD, targets_T, ignore_index, reduction, None)[0]


def linear_cross_entropy_keep(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, each token's logsumexp (0 where ignored), and the logits of those that count, or none of them."""
    shape = kept_logits(x_TD, weight_VD)
    if _native.on_cuda(x_TD):  # none on a GPU; the emulator's tensors are the CPU's and so are its shapes
        z_TV = x_TD.new_zeros(shape, dtype=torch.float32)
    else:
        z_TV = _native.empty(shape, torch.float32)
    return *_forward(x_TD, weight_VD, targets_T, ignore_index, reduction, z_TV), z_TV


def kept_logits(x_TD: Tensor, weight_VD: Tensor) -> tuple[int, int]:
    """(T, the stride of a row): whole panels of entries and no power of two; (0, 0) where logits are made again."""
    tokens, entries = x_TD.shape[0], weight_VD.shape[0]
    if x_TD.is_cuda or tokens * entries > KEPT_LOGITS:
        return 0, 0
    return tokens, (entries + 63) // 64 * 64 + 64


def _forward(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, reduction: str, z_TV: Tensor | None
) -> tuple[Tensor, Tensor]:
    losses_T, lse_T = (x_TD.new_empty(len(targets_T), dtype=torch.float32) for _ in range(2))
    if _native.on_cuda(x_TD):
        without_autocast(_losses, (losses_T, lse_T, x_TD, weight_VD, targets_T, ignore_index))
    else:
        inputs = _inputs(x_TD, weight_VD, targets_T, ignore_index, z_TV)
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
    upstream_T = upstream.expand(targets_T.shape).contiguous()
    if _native.on_cuda(x_TD):
        return without_autocast(
            _gradients, (x_TD, weight_VD, targets_T, ignore_index, kept[0], upstream_T, wanted)
        )
    found = [_native.empty(x.shape, x.dtype) for x in (x_TD, weight_VD)]
    _native.call(
        "linear_cross_entropy_bwd",
        **_inputs(x_TD, weight_VD, targets_T, ignore_index, kept[1]),
        lse=kept[0],
        upstream=upstream_T,
        grad_x=found[0],
        grad_weight=found[1],
    )
    return [g if want else g.new_empty(0) for g, want in zip(found, wanted)]


def _inputs(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, z_TV: Tensor | None
) -> dict[str, Any]:
    z_TV = z_TV if z_TV is not None and z_TV.numel() else None
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
        "z": z_TV,
        "z_stride": 0 if z_TV is None else z_TV.stride(0),
    }


def _losses(
    losses_T: Tensor,
    lse_T: Tensor,
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
) -> None:
    rows = max(CHUNK_TOKENS, CHUNK_LOGITS // len(weight_VD))
    for begin in range(0, len(x_TD), rows):
        chunk = slice(begin, begin + rows)
        logits_CV = product(x_TD[chunk], weight_VD.T)
        _native.call(
            "cross_entropy_fwd",
            rows=len(logits_CV),
            entries=len(weight_VD),
            ignore_index=ignore_index,
            logits=logits_CV,
            logits_stride=len(weight_VD),
            targets=targets_T[chunk],
            targets_stride=targets_T.stride(0),
            losses=losses_T[chunk],
            lse=lse_T[chunk],
        )


def _gradients(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
    lse_T: Tensor,
    upstream_T: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    # an ignored row may hold NaN, and 0 times NaN would reach the weights
    x_TD = x_TD.masked_fill((targets_T == ignore_index)[:, None], 0)
    grad_x_TD = x_TD.new_zeros(x_TD.shape if wanted[0] else (0,), dtype=torch.float32)
    grad_weight_VD = weight_VD.new_empty(weight_VD.shape if wanted[1] else (0,))
    entries = max(SLAB_ENTRIES, CHUNK_LOGITS // max(len(x_TD), 1) // 8 * 8)
    for first in range(0, len(weight_VD), entries):
        slab = slice(first, first + entries)
        weight_SD = weight_VD[slab]
        logits_TS = product(x_TD, weight_SD.T)
        _native.call(
            "cross_entropy_bwd",
            rows=len(x_TD),
            entries=len(weight_SD),
            first=first,
            ignore_index=ignore_index,
            dtype=_native.dtype_name(x_TD),
            logits=logits_TS,
            logits_stride=len(weight_SD),
            targets=targets_T,
            targets_stride=targets_T.stride(0),
            lse=lse_T,
            upstream=upstream_T,
        )
        grad_TS = logits_TS.view(x_TD.dtype)[:, : len(weight_SD)]  # bf16: the first half of every row
        if wanted[1]:
            torch.mm(grad_TS.T, x_TD, out=grad_weight_VD[slab])
        if wanted[0]:
            add_product(grad_x_TD, grad_TS, weight_SD)
    return [grad_x_TD.to(x_TD.dtype), grad_weight_VD]

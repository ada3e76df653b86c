"""The rows of the expert layer in CUDA (csrc/cuda/moe_permute.cu, moe_combine.cu: forward and backward, fp32 and bf16).

T tokens, K experts chosen by each, N = T*K routed rows, E experts, D width. position_TK is the row of each slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native

MOST_EXPERTS = 512
MOST_COLUMNS = 8192


def supports_moe_permute(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> str | None:
    if not _native.on_cuda(x_TD):
        return "no CPU kernel is written for this operator"
    if num_experts > MOST_EXPERTS:
        return f"the CUDA kernel takes at most {MOST_EXPERTS} experts, got {num_experts}"
    return _native.refusal(x_TD, cuda=True) or _too_wide(x_TD)


def kernels_moe_permute(*args: object) -> list[str]:
    return ["moe_permute", "moe_combine"]  # the latter is its backward


def _too_wide(rows: Tensor) -> str | None:
    """A block has a whole row in its registers: of the sum, which is the permutation's backward too."""
    if rows.shape[1] <= MOST_COLUMNS:
        return None
    return f"the CUDA kernel takes rows of at most {MOST_COLUMNS:,} columns, got {rows.shape[1]:,}"


def moe_permute(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return moe_permute_keep(x_TD, ids_TK, num_experts)[:3]


def moe_permute_keep(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results, and the row of each slot."""
    (tokens, width), top_k = x_TD.shape, ids_TK.shape[1]
    rows_ND = x_TD.new_empty(tokens * top_k, width)
    order_N = ids_TK.new_empty(tokens * top_k, dtype=torch.int64)
    position_TK = ids_TK.new_empty(tokens, top_k, dtype=torch.int32)
    offsets_E = ids_TK.new_empty(num_experts, dtype=torch.int32)
    _native.call(
        "moe_permute_fwd",
        tokens=tokens,
        top_k=top_k,
        experts=num_experts,
        width=width,
        dtype=_native.dtype_name(x_TD),
        x=x_TD,
        x_stride=x_TD.stride(0) if tokens > 1 else width,
        ids=ids_TK.long().contiguous(),
        rows=rows_ND,
        order=order_N,
        position=position_TK,
        offsets=offsets_E,
    )
    return rows_ND, order_N, offsets_E, position_TK


def moe_permute_keep_bwd(
    grads: list[Tensor],
    kept: list[Tensor],
    wanted: list[bool],
    x_TD: Tensor,
    ids_TK: Tensor,
    num_experts: int,
) -> list[Tensor]:
    if not wanted[0]:
        return [x_TD.new_empty(0)]
    grad_x_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    _combine(grads[0], None, kept[0], None, grad_x_TD)
    return [grad_x_TD]


def supports_moe_combine(
    rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor, num_tokens: int, *others: Any
) -> str | None:
    if not _native.on_cuda(rows_ND):
        return "no CPU kernel is written for this operator"
    return _native.refusal(rows_ND, cuda=True) or _too_wide(rows_ND)


def kernels_moe_combine(*args: object) -> list[str]:
    return ["moe_combine"]


def moe_combine(rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor, num_tokens: int) -> Tensor:
    y_TD = rows_ND.new_empty(num_tokens, rows_ND.shape[1])
    _combine(rows_ND, order_N, None, weights_TK, y_TD)
    return y_TD


def moe_combine_bwd(
    grads: list[Tensor], rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor, num_tokens: int
) -> list[Tensor]:
    return _combine_bwd(grads[0], rows_ND, order_N, weights_TK)


def _combine_bwd(grad_y_TD: Tensor, rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor) -> list[Tensor]:
    grad_rows_ND = torch.empty_like(rows_ND, memory_format=torch.contiguous_format)
    grad_weights_TK = torch.empty(weights_TK.shape, dtype=torch.float32, device=rows_ND.device)
    _native.call(
        "moe_combine_bwd",
        **_numbers(rows_ND, order_N, None, weights_TK, grad_y_TD.shape[0]),
        grad_y=grad_y_TD,
        grad_rows=grad_rows_ND,
        grad_weights=grad_weights_TK,
    )
    return [grad_rows_ND, grad_weights_TK.to(weights_TK.dtype)]


def supports_moe_combine_norm(
    rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor, norm_D: Tensor, eps: float, *added: Tensor | None
) -> str | None:
    reason = supports_moe_combine(rows_ND, order_N, weights_TK, weights_TK.shape[0])
    return reason or _native.refusal(rows_ND, norm_D, *added, cuda=True)


def kernels_moe_combine_norm(*args: object) -> list[str]:
    return ["moe_combine", "norm"]  # the latter in its backward


def moe_combine_norm(
    rows_ND: Tensor,
    order_N: Tensor,
    weights_TK: Tensor,
    norm_D: Tensor,
    eps: float = 1e-5,
    shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y_TD = rows_ND.new_empty(weights_TK.shape[0], rows_ND.shape[1])
    sum_TD = torch.empty_like(y_TD)
    others: dict[str, Any] = {"eps": eps, "norm": norm_D.contiguous(), "normalized": y_TD}
    _combine(rows_ND, order_N, None, weights_TK, sum_TD, shared_TD, residual_TD, **others)
    return y_TD, sum_TD


moe_combine_norm_keep = moe_combine_norm  # the sum is what the norm's backward reads


def moe_combine_norm_keep_bwd(
    grads: list[Tensor],
    kept: list[Tensor],
    wanted: list[bool],
    rows_ND: Tensor,
    order_N: Tensor,
    weights_TK: Tensor,
    norm_D: Tensor,
    eps: float,
    shared_TD: Tensor | None,
    residual_TD: Tensor | None,
) -> list[Tensor]:
    sum_TD = kept[1]
    tokens, width = sum_TD.shape
    grad_sum_TD = torch.empty_like(sum_TD)
    grad_norm_D = torch.empty(width, dtype=torch.float32, device=sum_TD.device)
    _native.call(
        "rms_norm_bwd",
        rows=tokens,
        width=width,
        group=width,
        eps=eps,
        dtype=_native.dtype_name(sum_TD),
        weight_dtype=_native.dtype_name(norm_D),
        x=sum_TD,
        x_stride=width,
        residual=None,
        residual_stride=0,
        gate=None,
        gate_stride=0,
        weight=norm_D.contiguous(),
        grad_y=grads[0],
        grad_sum=grads[1],
        grad_input=grad_sum_TD,
        grad_gate=None,
        grad_weight=grad_norm_D,
    )
    found = _combine_bwd(grad_sum_TD, rows_ND, order_N, weights_TK)
    found.append(grad_norm_D.to(norm_D.dtype))
    found += [grad_sum_TD.clone() for added in (shared_TD, residual_TD) if added is not None]
    return [gradient if want else gradient.new_empty(0) for gradient, want in zip(found, wanted)]


def _combine(
    rows_ND: Tensor,
    order_N: Tensor | None,
    position_TK: Tensor | None,
    weights_TK: Tensor | None,
    y_TD: Tensor,
    shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
    eps: float = 0.0,
    norm: Tensor | None = None,
    normalized: Tensor | None = None,
) -> None:
    _native.call(
        "moe_combine_fwd",
        **_numbers(rows_ND, order_N, position_TK, weights_TK, y_TD.shape[0]),
        eps=eps,
        norm_dtype="float32" if norm is None else _native.dtype_name(norm),
        shared=shared_TD,
        shared_stride=0 if shared_TD is None else shared_TD.stride(0),
        residual=residual_TD,
        residual_stride=0 if residual_TD is None else residual_TD.stride(0),
        norm=norm,
        y=y_TD,
        normalized=normalized,
    )


def _numbers(
    rows_ND: Tensor,
    order_N: Tensor | None,
    position_TK: Tensor | None,
    weights_TK: Tensor | None,
    tokens: int,
) -> dict[str, Any]:
    count, width = rows_ND.shape
    return {
        "tokens": tokens,
        "top_k": count // tokens if tokens else 1,
        "width": width,
        "dtype": _native.dtype_name(rows_ND),
        "rows": rows_ND,
        "rows_stride": rows_ND.stride(0) if count > 1 else width,
        "order": None if order_N is None else order_N.contiguous(),
        "position": position_TK,
        "weights": None if weights_TK is None else weights_TK.float().contiguous(),
    }

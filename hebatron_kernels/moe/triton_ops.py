"""The experts in Triton, for every GPU from compute capability 8.0 on: forward and all gradients, fp32 and bf16.

grouped_gemm: N rows, R rows of a, E experts, K inner width, M outputs. moe_mlp, from the same products: T tokens, K
experts chosen by each, N = T*K routed rows, D width, F expert width; sorting and sums over a token's rows are torch's.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from .. import _triton
from .torch_ops import by_slot, positions, sort_by_expert, sum_rows, sum_uses, tokens_of


def _kernels() -> ModuleType:
    from . import triton_kernels  # at the first call: it imports Triton

    return triton_kernels


def supports_grouped_gemm(
    a_RK: Tensor,
    b_EKM: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None,
    scale_N: Tensor | None,
    activation: str | None,
    implementation: str | None,
) -> str | None:
    if implementation is not None:
        return f"has no implementation {implementation}, only the CUDA kernels have several"
    return _triton.refusal(a_RK)


def unproven_grouped_gemm(a_RK: Tensor, *others: object) -> str | None:
    return _triton.unproven("moe", a_RK.get_device())


def grouped_gemm(
    a_RK: Tensor,
    b_EKM: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None = None,
    scale_N: Tensor | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> Tensor:
    return _kernels().product(a_RK, b_EKM, offsets_E, rows_N, scale_N, activation)


def grouped_gemm_bwd(
    grads: list[Tensor],
    a_RK: Tensor,
    b_EKM: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None,
    scale_N: Tensor | None,
    activation: str | None,
    implementation: str | None,
) -> list[Tensor]:
    """Nothing is kept from the forward: with an activation or a scale the product is made again."""
    kernels = _kernels()
    grad_NM = grads[0]
    grad_scale: Tensor | None = None
    if activation is not None or scale_N is not None:
        grad_NM, grad_scale = kernels.product_grad(
            grad_NM, a_RK, b_EKM, offsets_E, rows_N, scale_N, activation
        )
    grad_a = kernels.product(grad_NM, b_EKM.transpose(1, 2), offsets_E)
    if rows_N is not None:
        grad_a = sum_uses(grad_a, rows_N, a_RK.shape[0])
    grad_b = kernels.weight_grad(a_RK, grad_NM, offsets_E, rows_N)
    return [grad_a, grad_b] + ([] if grad_scale is None else [grad_scale])


def supports_moe_mlp(x_TD: Tensor, *others: Tensor) -> str | None:
    return _triton.refusal(x_TD)


def unproven_moe_mlp(x_TD: Tensor, *others: object) -> str | None:
    return _triton.unproven("moe", x_TD.get_device())


class _Rows(NamedTuple):
    """The routed rows, sorted by expert."""

    order_N: Tensor
    offsets_E: Tensor
    tokens_N: Tensor
    weights_N: Tensor
    positions_TK: Tensor


def _rows(ids_TK: Tensor, weights_TK: Tensor, experts: int) -> _Rows:
    order_N, offsets_E = sort_by_expert(ids_TK, experts)
    top_k = ids_TK.shape[1]
    weights_N = weights_TK.reshape(-1).index_select(0, order_N).float()
    return _Rows(order_N, offsets_E, tokens_of(order_N, top_k).int(), weights_N, positions(order_N, top_k))


def moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    return moe_mlp_keep(x_TD, ids_TK, weights_TK, up_EFD, down_EDF)[0]


def moe_mlp_keep(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """y, and of the sorted rows (N, F) the activation times the weight: with the weight there and not on the output,
    the second product's rows are only added, and what is kept is the operand of down's gradient."""
    product, rows = _kernels().product, _rows(ids_TK, weights_TK, up_EFD.shape[0])
    up_EDF, down_EFD = (w.to(x_TD.dtype).transpose(1, 2) for w in (up_EFD, down_EDF))
    active_NF = product(x_TD, up_EDF, rows.offsets_E, rows.tokens_N, rows.weights_N, "relu2")
    return sum_rows(product(active_NF, down_EFD, rows.offsets_E), rows.positions_TK), active_NF


def moe_mlp_keep_bwd(
    grads: list[Tensor],
    kept: list[Tensor],
    wanted: list[bool],
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
) -> list[Tensor]:
    """Through the activation by making up's product again: a weight of 0 leaves nothing of it in what is kept."""
    kernels, rows = _kernels(), _rows(ids_TK, weights_TK, up_EFD.shape[0])
    (grad_TD,), (active_NF,), ends_E = grads, kept, rows.offsets_E
    found = [x_TD.new_empty(0) for _ in wanted]
    if any(wanted[:3]):
        up_EFx, down_EDx = (w.to(x_TD.dtype) for w in (up_EFD, down_EDF))
        grad_NF = kernels.product(grad_TD, down_EDx, ends_E, rows.tokens_N)
        grad_NF, grad_weights_N = kernels.product_grad(
            grad_NF, x_TD, up_EFx.transpose(1, 2), ends_E, rows.tokens_N, rows.weights_N, "relu2"
        )
        if wanted[0]:
            found[0] = sum_rows(kernels.product(grad_NF, up_EFx, ends_E), rows.positions_TK)
        if wanted[1]:
            found[1] = by_slot(grad_weights_N, rows.order_N, ids_TK.shape[1]).to(weights_TK.dtype)
        if wanted[2]:
            x_ND = x_TD.index_select(0, rows.tokens_N)
            found[2] = kernels.weight_grad(grad_NF, x_ND, ends_E, dtype=up_EFD.dtype)
    if wanted[3]:
        found[3] = kernels.weight_grad(grad_TD, active_NF, ends_E, rows.tokens_N, down_EDF.dtype)
    return found

"""grouped_gemm in Triton, for every GPU from compute capability 8.0 on: forward and all gradients, fp32 and bf16.

N rows, R rows of a, E experts, K inner width, M outputs.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from .. import _triton
from .torch_ops import sum_uses


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

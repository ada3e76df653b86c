"""grouped_gemm and its gradients in C++ (csrc/cpu/gemm.cpp, gemm_wgrad.cpp: fp32 and bf16) and CUDA
(csrc/cuda/grouped_gemm.cu, bf16).

N rows, R rows of a, E experts, K summed over, M outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .native import (
    IMPLEMENTATIONS,
    _step,
    _stored_by_output,
    grouped_gemm,
    kernels_grouped_gemm,
    parse_implementation,
    supports_grouped_gemm,
)
from .torch_ops import past_end, sum_uses

__all__ = [
    "fake_gradients",
    "grouped_gemm",
    "grouped_gemm_keep",
    "grouped_gemm_keep_bwd",
    "grouped_gemm_wgrad",
    "kernels_grouped_gemm",
    "supports_grouped_gemm",
]


def grouped_gemm_wgrad(
    a_RK: Tensor,
    b_NM: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transposed: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """out[e] = sum over the rows n of expert e of a[rows[n]]^T b[n]: (E, K, M), or (E, M, K) with `transposed`."""
    name, tile_m, tile_n = parse_implementation(implementation)
    experts, inner, outputs = offsets_E.shape[0], a_RK.shape[1], b_NM.shape[1]
    shape = (experts, outputs, inner) if transposed else (experts, inner, outputs)
    dtype = out_dtype or a_RK.dtype
    out = torch.empty(shape, dtype=dtype, device=a_RK.device) if a_RK.is_cuda else _native.empty(shape, dtype)
    _native.call(
        "grouped_gemm_wgrad",
        rows=b_NM.shape[0],
        a_rows=a_RK.shape[0],
        experts=experts,
        m=inner,
        n=outputs,
        workers=torch.get_num_threads(),
        dtype=_native.dtype_name(a_RK),
        out_dtype=_native.dtype_name(out),
        a=a_RK,
        a_stride=_step(a_RK),
        rows_of_a=None if rows_N is None else rows_N.contiguous(),
        b=b_NM,
        b_stride=_step(b_NM),
        offsets=offsets_E.contiguous(),
        out=out,
        transposed=int(transposed),
        implementation=0 if name is None else IMPLEMENTATIONS[name],
        tile_m=tile_m,
        tile_n=tile_n,
    )
    return out


def grouped_gemm_keep(
    a_RK: Tensor,
    b_EKM: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None,
    scale_N: Tensor | None,
    activation: str | None,
    implementation: str | None,
) -> tuple[Tensor]:
    """Keeps nothing: this form is told which gradients are wanted, and they compute the product again if need be."""
    return (grouped_gemm(a_RK, b_EKM, offsets_E, rows_N, scale_N, activation, implementation),)


def grouped_gemm_keep_bwd(
    grads: list[Tensor],
    kept: list[Tensor],
    wanted: list[bool],
    a_RK: Tensor,
    b_EKM: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None,
    scale_N: Tensor | None,
    activation: str | None,
    implementation: str | None,
) -> list[Tensor]:
    # by name only the family: the tiles and operands of the forward are not those of its gradients
    family = "sm80" if implementation is not None and implementation.startswith("sm80") else None
    grad_NM, found = grads[0], []
    grad_scale_N: Tensor | None = None
    if scale_N is not None or activation is not None:
        product_NM = grouped_gemm(a_RK, b_EKM, offsets_E, rows_N, None, None, implementation)
        grad_NM, grad_scale_N = _through_epilogue(grad_NM, product_NM, offsets_E, scale_N, activation)
    if grad_NM.data_ptr() % 16:  # the kernels move 16 bytes at a time
        grad_NM = grad_NM.clone()
    if wanted[0]:
        grad_a = grouped_gemm(grad_NM, b_EKM.transpose(1, 2), offsets_E, None, None, None, family)
        found.append(grad_a if rows_N is None else sum_uses(grad_a, rows_N, a_RK.shape[0]))
    else:
        found.append(a_RK.new_empty(0))
    if wanted[1]:
        # in the layout of b, so that weights stored (E, M, K) get their gradient without a copy
        by_output = _stored_by_output(b_EKM)
        grad_b = grouped_gemm_wgrad(a_RK, grad_NM, offsets_E, rows_N, b_EKM.dtype, by_output, family)
        found.append(grad_b.transpose(1, 2) if by_output else grad_b)
    else:
        found.append(b_EKM.new_empty(0))
    if scale_N is not None:
        assert grad_scale_N is not None
        found.append(grad_scale_N.to(scale_N.dtype) if wanted[2] else scale_N.new_empty(0))
    return found


def _through_epilogue(
    grad_NM: Tensor,
    product_NM: Tensor,
    offsets_E: Tensor,
    scale_N: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the product and of scale, in fp32, from that of act(product) * scale; those of the rows past the
    last end are 0 for scale and unused for the product."""
    grad, active = grad_NM.float(), product_NM.float()
    slope: Tensor | None = None
    if activation == "relu2":
        relu = active.relu_()
        slope, active = 2.0 * relu, relu * relu
    grad_scale_N = None
    if scale_N is not None:
        dots_N = (grad * active).sum(1)
        grad_scale_N = dots_N.masked_fill_(past_end(grad_NM, offsets_E).squeeze(1), 0.0)
        grad = grad * scale_N.float().unsqueeze(1)
    if slope is not None:
        grad = grad * slope
    return grad.to(grad_NM.dtype), grad_scale_N


def fake_gradients(
    a: Tensor, b: Tensor, offsets: Tensor, rows: object, scale: Tensor | None, *_: object
) -> list[Tensor]:
    """As grouped_gemm_keep_bwd gives them: that of b lies as b does."""
    empty = torch.empty_like(b, memory_format=torch.contiguous_format)
    if _stored_by_output(b):
        empty = torch.empty_like(b.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    given = [torch.empty_like(a, memory_format=torch.contiguous_format), empty]
    return given + ([] if scale is None else [torch.empty_like(scale, memory_format=torch.contiguous_format)])

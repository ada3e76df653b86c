"""linear in C++ (csrc/cpu/linear.cpp): the forward and both gradients are its one product. fp32 and bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native


def supports_linear(x_TD: Tensor, weight_MD: Tensor) -> str | None:
    if _native.on_cuda(x_TD):
        return "no CUDA kernel is written for this operator"
    if weight_MD.dtype not in (x_TD.dtype, torch.float32):
        return f"multiplies weights of float32 or the dtype of x, got {weight_MD.dtype} and {x_TD.dtype}"
    return _native.refusal(x_TD, weight_MD)


def linear(x_TD: Tensor, weight_MD: Tensor) -> Tensor:
    return _product(x_TD, weight_MD, True, x_TD.dtype)


def linear_keep(x_TD: Tensor, weight_MD: Tensor) -> tuple[Tensor]:
    return (linear(x_TD, weight_MD),)


def linear_keep_bwd(
    grads: list[Tensor], kept: list[Tensor], wanted: list[bool], x_TD: Tensor, weight_MD: Tensor
) -> list[Tensor]:
    grad_TM = grads[0]
    found = [x_TD.new_empty(0), weight_MD.new_empty(0)]
    if wanted[0]:
        found[0] = _product(grad_TM, weight_MD, False, x_TD.dtype)
    if wanted[1]:
        if x_TD.shape[0]:
            found[1] = _product(grad_TM.T.contiguous(), x_TD, False, weight_MD.dtype)
        else:
            found[1] = torch.zeros(weight_MD.shape, dtype=weight_MD.dtype)
    return found


def _product(a_RK: Tensor, b: Tensor, k_major: bool, out_dtype: torch.dtype) -> Tensor:
    """a b with b (K, M), or stored (M, K) where k_major."""
    outputs = b.shape[0] if k_major else b.shape[1]
    out_RM = _native.empty((a_RK.shape[0], outputs), out_dtype)
    _call(a_RK, b, b.stride(0), outputs, int(k_major), 0, out_RM)
    return out_RM


def supports_linear_packed(x_TD: Tensor, *others: object) -> str | None:
    if _native.on_cuda(x_TD):
        return "no CUDA kernel is written for this operator"
    return _native.refusal(x_TD)


def linear_packed(x_TD: Tensor, packed: Tensor, outputs: int) -> Tensor:
    out_TM = _native.empty((x_TD.shape[0], outputs), x_TD.dtype)
    _call(x_TD, packed, 0, outputs, 1, 1, out_TM)
    return out_TM


def _call(a: Tensor, b: Tensor, b_stride: int, outputs: int, k_major: int, packed: int, out: Tensor) -> None:
    _native.call(
        "linear_fwd",
        rows=a.shape[0],
        n=outputs,
        k=a.shape[1],
        workers=torch.get_num_threads(),
        dtype=_native.dtype_name(a),
        weight_dtype=_native.dtype_name(b),
        out_dtype=_native.dtype_name(out),
        a=a,
        a_stride=a.stride(0),
        b=b,
        b_stride=b_stride,
        b_k_major=k_major,
        packed=packed,
        out=out,
    )

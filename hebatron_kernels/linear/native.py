"""linear in C++ (csrc/cpu/linear.cpp): the forward and both gradients are its one product. fp32 and bf16.

On CUDA the products are cuBLASLt's, through torch: nothing of our own is written for them, and nothing is to be won.
So the automatic choice leaves them in the torch form, which the compiler sees through; by name they are here, with the
gradient of an fp32 weight in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .._dispatch import without_autocast
from .._products import product


def supports_linear(x_TD: Tensor, weight_MD: Tensor) -> str | None:
    if weight_MD.dtype not in (x_TD.dtype, torch.float32):
        return f"multiplies weights of float32 or the dtype of x, got {weight_MD.dtype} and {x_TD.dtype}"
    return _native.refusal(x_TD, weight_MD, cuda=True)


def linear(x_TD: Tensor, weight_MD: Tensor) -> Tensor:
    if _native.on_cuda(x_TD):
        return without_autocast(F.linear, (x_TD, weight_MD.to(x_TD.dtype)))
    return _product(x_TD, weight_MD, True, x_TD.dtype)


def linear_keep(x_TD: Tensor, weight_MD: Tensor) -> tuple[Tensor]:
    return (linear(x_TD, weight_MD),)


def linear_keep_bwd(
    grads: list[Tensor], kept: list[Tensor], wanted: list[bool], x_TD: Tensor, weight_MD: Tensor
) -> list[Tensor]:
    grad_TM = grads[0]
    if _native.on_cuda(x_TD):
        return without_autocast(_torch_gradients, (grad_TM, wanted, x_TD, weight_MD))
    found = [x_TD.new_empty(0), weight_MD.new_empty(0)]
    if wanted[0]:
        found[0] = _product(grad_TM, weight_MD, False, x_TD.dtype)
    if wanted[1]:
        if x_TD.shape[0]:
            found[1] = _product(grad_TM.T.contiguous(), x_TD, False, weight_MD.dtype)
        else:
            found[1] = torch.zeros(weight_MD.shape, dtype=weight_MD.dtype)
    return found


def _torch_gradients(grad_TM: Tensor, wanted: list[bool], x_TD: Tensor, weight_MD: Tensor) -> list[Tensor]:
    found = [x_TD.new_empty(0), weight_MD.new_empty(0)]
    if wanted[0]:
        found[0] = grad_TM @ weight_MD.to(x_TD.dtype)
    if wanted[1]:
        same = weight_MD.dtype == x_TD.dtype
        found[1] = grad_TM.T @ x_TD if same else product(grad_TM.T, x_TD)
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

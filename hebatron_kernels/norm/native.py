"""rms_norm in C++ (csrc/cpu/norm.cpp) and CUDA (csrc/cuda/norm.cu): forward and backward, fp32 and bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native


def supports_rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    gate_TD: Tensor | None,
    group_size: int | None,
) -> str | None:
    width = x_TD.shape[1]
    group = width if group_size is None else group_size
    if _native.on_cuda(x_TD) and (group > 8192 or width // group > 65535):
        return f"the CUDA kernel takes groups of at most 8,192 columns and 65,535 of them, got {group} of {width}"
    return _native.refusal(x_TD, weight_D, residual_TD, gate_TD, cuda=True)


def kernels_rms_norm(*args: object) -> list[str]:
    return ["norm"]


def _inputs(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    gate_TD: Tensor | None,
    group_size: int | None,
) -> dict[str, Any]:
    rows, width = x_TD.shape
    return {
        "rows": rows,
        "width": width,
        "group": width if group_size is None else group_size,
        "eps": eps,
        "dtype": _native.dtype_name(x_TD),
        "weight_dtype": _native.dtype_name(weight_D),
        "x": x_TD,
        "x_stride": x_TD.stride(0),
        "residual": residual_TD,
        "residual_stride": 0 if residual_TD is None else residual_TD.stride(0),
        "gate": gate_TD,
        "gate_stride": 0 if gate_TD is None else gate_TD.stride(0),
        "weight": weight_D,
    }


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float = 1e-5,
    residual_TD: Tensor | None = None,
    gate_TD: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    sum_TD = None if residual_TD is None else torch.empty_like(y_TD)
    inputs = _inputs(x_TD, weight_D, eps, residual_TD, gate_TD, group_size)
    _native.call("rms_norm_fwd", **inputs, y=y_TD, sum=sum_TD)
    return y_TD, sum_TD


def rms_norm_bwd(
    grads: list[Tensor],
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    gate_TD: Tensor | None,
    group_size: int | None,
) -> list[Tensor]:
    grad_input_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    grad_gate_TD = None if gate_TD is None else torch.empty_like(grad_input_TD)
    grad_weight_D = torch.empty(weight_D.shape, dtype=torch.float32, device=x_TD.device)
    _native.call(
        "rms_norm_bwd",
        **_inputs(x_TD, weight_D, eps, residual_TD, gate_TD, group_size),
        grad_y=grads[0],
        grad_sum=None if residual_TD is None else grads[1],
        grad_input=grad_input_TD,
        grad_gate=grad_gate_TD,
        grad_weight=grad_weight_D,
    )
    found = [grad_input_TD, grad_weight_D.to(weight_D.dtype)]
    if residual_TD is not None:
        found.append(grad_input_TD.clone())
    if grad_gate_TD is not None:
        found.append(grad_gate_TD)
    return found

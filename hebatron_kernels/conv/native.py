"""The causal convolution in C++ (csrc/cpu/conv.cpp) and CUDA (csrc/cuda/conv.cu): forward, backward and one-token
update, fp32 and bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native

MAX_TAPS, MAX_TAPS_CUDA = 16, 8


def supports_causal_conv1d(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> str | None:
    return _refusal(x_TC, weight_CW, bias_C, initial_state)


def kernels_causal_conv1d(*args: object) -> list[str]:
    return ["conv"]


def supports_causal_conv1d_update(
    x_QC: Tensor,
    conv_state_QCK: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
) -> str | None:
    return _refusal(x_QC, weight_CW, bias_C, conv_state_QCK)


kernels_causal_conv1d_update = kernels_causal_conv1d


def _refusal(x: Tensor, weight_CW: Tensor, *others: Tensor | None) -> str | None:
    most = MAX_TAPS_CUDA if _native.on_cuda(x) else MAX_TAPS
    if weight_CW.shape[1] > most:
        return f"takes at most {most} taps, got {weight_CW.shape[1]}"
    return _native.refusal(x, weight_CW, *others, cuda=True)


def causal_conv1d(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    numbers = _inputs(x_TC, weight_CW, bias_C, activation, cu_seqlens, initial_state)
    y_TC = x_TC.new_empty(x_TC.shape)
    last_QKC = _new_past(x_TC, numbers)
    _native.call("causal_conv1d_fwd", **numbers, y=y_TC, last=last_QKC)
    return y_TC, last_QKC.transpose(1, 2).contiguous()


def causal_conv1d_bwd(
    grads: list[Tensor],
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> list[Tensor]:
    numbers = _inputs(x_TC, weight_CW, bias_C, activation, cu_seqlens, initial_state)
    grad_x_TC = x_TC.new_empty(x_TC.shape)
    needed = initial_state is not None or not _native.on_cuda(x_TC)
    grad_past_QKC = _new_past(x_TC, numbers) if needed else None
    grad_weight_WC = torch.empty_like(numbers["weight"])
    grad_bias_C = grad_weight_WC.new_empty(x_TC.shape[1])
    _native.call(
        "causal_conv1d_bwd",
        **numbers,
        grad_y=grads[0],
        grad_last=grads[1].transpose(1, 2).contiguous(),
        grad_x=grad_x_TC,
        grad_past=grad_past_QKC,
        grad_weight=grad_weight_WC,
        grad_bias=grad_bias_C,
    )
    found = [grad_x_TC, grad_weight_WC.t().to(weight_CW.dtype).contiguous()]
    if bias_C is not None:
        found.append(grad_bias_C.to(bias_C.dtype))
    if initial_state is not None and grad_past_QKC is not None:
        found.append(grad_past_QKC.transpose(1, 2).contiguous())
    return found


def _inputs(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> dict[str, Any]:
    """The arguments of forward and backward. On CUDA what is not given stays so: making it would wait for the host."""
    tokens, channels = x_TC.shape
    taps = weight_CW.shape[1]
    sequences = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    past_QKC = None if initial_state is None else initial_state.transpose(1, 2).contiguous()
    if not _native.on_cuda(x_TC):
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32) if cu_seqlens is None else cu_seqlens
        past_QKC = x_TC.new_zeros(sequences, taps - 1, channels) if past_QKC is None else past_QKC
    return {
        "tokens": tokens,
        "channels": channels,
        "taps": taps,
        "sequences": sequences,
        "silu": int(activation == "silu"),
        "dtype": _native.dtype_name(x_TC),
        "x": x_TC,
        "x_stride": x_TC.stride(0),
        "past": past_QKC,
        "weight": weight_CW.t().float().contiguous(),
        "bias": None if bias_C is None else bias_C.float().contiguous(),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
    }


def _new_past(x_TC: Tensor, numbers: dict[str, Any]) -> Tensor:
    """(Q, K, C), the inputs before or at the end of every sequence."""
    return x_TC.new_empty(numbers["sequences"], numbers["taps"] - 1, x_TC.shape[1])


def causal_conv1d_update(
    x_QC: Tensor,
    conv_state_QCK: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
) -> Tensor:
    weight = weight_CW.float().contiguous()
    bias = None if bias_C is None else bias_C.float().contiguous()
    y_QC = x_QC.new_empty(x_QC.shape)
    _native.call(
        "causal_conv1d_update",
        sequences=x_QC.shape[0],
        channels=x_QC.shape[1],
        taps=weight_CW.shape[1],
        silu=int(activation == "silu"),
        dtype=_native.dtype_name(x_QC),
        x=x_QC,
        x_stride=x_QC.stride(0),
        state=conv_state_QCK,
        weight=weight,
        bias=bias,
        y=y_QC,
    )
    _native.wrote(conv_state_QCK)
    return y_QC

"""The causal convolution in C++ (csrc/cpu/conv.cpp): forward, backward and one-token update, fp32 and bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native

MAX_TAPS = 16


def supports_causal_conv1d(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> str | None:
    return _refusal(x_TC, weight_CW, bias_C, initial_state)


def supports_causal_conv1d_update(
    x_QC: Tensor,
    conv_state_QCK: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
) -> str | None:
    return _refusal(x_QC, weight_CW, bias_C, conv_state_QCK)


def _refusal(x: Tensor, weight_CW: Tensor, *others: Tensor | None) -> str | None:
    if weight_CW.shape[1] > MAX_TAPS:
        return f"takes at most {MAX_TAPS} taps, got {weight_CW.shape[1]}"
    return _native.refusal(x, weight_CW, *others)


def causal_conv1d(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    kept, numbers = _inputs(x_TC, weight_CW, bias_C, activation, cu_seqlens, initial_state)
    y_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype)
    last_QKC = torch.empty_like(kept["past"])
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
    kept, numbers = _inputs(x_TC, weight_CW, bias_C, activation, cu_seqlens, initial_state)
    grad_last_QKC = grads[1].transpose(1, 2).contiguous()
    grad_x_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype)
    grad_past_QKC = torch.empty_like(kept["past"])
    grad_weight_WC, grad_bias_C = (
        torch.empty_like(kept["weight"]),
        torch.empty(x_TC.shape[1], dtype=torch.float32),
    )
    _native.call(
        "causal_conv1d_bwd",
        **numbers,
        grad_y=grads[0],
        grad_last=grad_last_QKC,
        grad_x=grad_x_TC,
        grad_past=grad_past_QKC,
        grad_weight=grad_weight_WC,
        grad_bias=grad_bias_C,
    )
    found = [grad_x_TC, grad_weight_WC.t().to(weight_CW.dtype).contiguous()]
    if bias_C is not None:
        found.append(grad_bias_C.to(bias_C.dtype))
    if initial_state is not None:
        found.append(grad_past_QKC.transpose(1, 2).contiguous())
    return found


def _inputs(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors made for the call, to be kept while it runs, and its arguments."""
    tokens, channels = x_TC.shape
    taps = weight_CW.shape[1]
    kept = {"weight": weight_CW.t().float().contiguous()}
    if bias_C is not None:
        kept["bias"] = bias_C.float().contiguous()
    kept["cu_seqlens"] = (
        torch.tensor([0, tokens], dtype=torch.int32) if cu_seqlens is None else cu_seqlens.contiguous()
    )
    sequences = kept["cu_seqlens"].numel() - 1
    if initial_state is None:
        kept["past"] = x_TC.new_zeros(sequences, taps - 1, channels)
    else:
        kept["past"] = initial_state.transpose(1, 2).contiguous()
    return kept, {
        "tokens": tokens,
        "channels": channels,
        "taps": taps,
        "sequences": sequences,
        "silu": int(activation == "silu"),
        "dtype": _native.dtype_name(x_TC),
        "x": x_TC,
        "x_stride": x_TC.stride(0),
        "past": kept["past"],
        "weight": kept["weight"],
        "bias": kept.get("bias"),
        "cu_seqlens": kept["cu_seqlens"],
    }


def causal_conv1d_update(
    x_QC: Tensor,
    conv_state_QCK: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
) -> Tensor:
    weight = weight_CW.float().contiguous()
    bias = None if bias_C is None else bias_C.float().contiguous()
    y_QC = torch.empty(x_QC.shape, dtype=x_QC.dtype)
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

"""The scan's one-token update in C++ (csrc/cpu/ssd.cpp), fp32 and bf16."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _native


def supports_ssd_update(
    state_QHPS: Tensor,
    x_QHP: Tensor,
    dt_QH: Tensor,
    A_H: Tensor,
    B_QGS: Tensor,
    C_QGS: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_limit: tuple[float, float],
) -> str | None:
    return _native.refusal(x_QHP, state_QHPS, dt_QH, A_H, B_QGS, C_QGS, D_H, dt_bias_H)


def ssd_update(
    state_QHPS: Tensor,
    x_QHP: Tensor,
    dt_QH: Tensor,
    A_H: Tensor,
    B_QGS: Tensor,
    C_QGS: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    # flatten is a view of a projection's slice, and copies what is laid out otherwise
    x, B, C = x_QHP.flatten(1), B_QGS.flatten(1), C_QGS.flatten(1)
    dt, A, D, dt_bias = (None if v is None else v.float().contiguous() for v in (dt_QH, A_H, D_H, dt_bias_H))
    y_QHP = torch.empty(x_QHP.shape, dtype=x_QHP.dtype)
    _native.call(
        "ssd_update",
        sequences=x_QHP.shape[0],
        heads=x_QHP.shape[1],
        head_dim=x_QHP.shape[2],
        groups=B_QGS.shape[1],
        state_dim=B_QGS.shape[2],
        dt_min=dt_limit[0],
        dt_max=dt_limit[1],
        dtype=_native.dtype_name(x_QHP),
        state=state_QHPS,
        x=x,
        x_stride=x.stride(0),
        dt=dt,
        A=A,
        B=B,
        B_stride=B.stride(0),
        C=C,
        C_stride=C.stride(0),
        D=D,
        dt_bias=dt_bias,
        y=y_QHP,
    )
    _native.wrote(state_QHPS)
    return y_QHP

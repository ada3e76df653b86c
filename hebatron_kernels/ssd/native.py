"""The scan in C++ (csrc/cpu/ssd_scan.cpp, ssd_scan_bwd.cpp, ssd_update.cpp) and in CUDA (the same in csrc/cuda): fp32
and bf16."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from .. import _native

LONGEST_CHUNK = 64
MOST_STATE = 128  # of the CUDA kernels


def supports_ssd_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGS: Tensor,
    C_TGS: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_limit: tuple[float, float],
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> str | None:
    floats = (x_THP, dt_TH, A_H, B_TGS, C_TGS, D_H, dt_bias_H, initial_state)
    reason = _native.refusal(*floats, cuda=True)
    if reason is not None or not _native.on_cuda(x_THP):
        return reason
    head_dim, state_dim = x_THP.shape[2], B_TGS.shape[2]
    if head_dim % 8:
        return f"the CUDA kernels need the head dim to be a multiple of 8, got {head_dim}"
    if state_dim % 8 or state_dim > MOST_STATE:
        return f"the CUDA kernels need the state to be a multiple of 8 up to {MOST_STATE}, got {state_dim}"
    return _native.unaligned(x_THP=_rows(x_THP), B_TGS=_rows(B_TGS), C_TGS=_rows(C_TGS))


def kernels_ssd_scan(*args: object) -> list[str]:
    wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    return ["ssd_scan", "ssd_scan_bwd"] if wanted else ["ssd_scan"]


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """In its dtype, or this one, where it is."""
    return (
        like.new_empty(shape, dtype=dtype or like.dtype)
        if like.is_cuda
        else _native.empty(shape, dtype or like.dtype)
    )


def ssd_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGS: Tensor,
    C_TGS: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor]:
    inputs = _scan_inputs(
        x_THP, dt_TH, A_H, B_TGS, C_TGS, D_H, dt_bias_H, dt_limit, cu_seqlens, initial_state, chunk_size
    )
    y_THP = _empty(x_THP, *x_THP.shape)
    shape = (inputs["sequences"], *x_THP.shape[1:], B_TGS.shape[2])
    last_QHPS = torch.empty(shape, dtype=torch.float32, device=x_THP.device)
    _native.call("ssd_scan_fwd", **inputs, y=y_THP, last=last_QHPS)
    return y_THP, last_QHPS


def ssd_scan_bwd(grads: list[Tensor], *args: Any) -> list[Tensor]:
    x_THP, dt_TH, A_H, B_TGS, _, D_H, dt_bias_H, _, _, initial_state, _ = args
    inputs = _scan_inputs(*args)
    heads = x_THP.shape[1]
    fp32 = {"dtype": torch.float32, "device": x_THP.device}
    grad_x_THP = _empty(x_THP, *x_THP.shape)
    grad_dt_TH = torch.empty(dt_TH.shape, **fp32)
    grad_B_TGS, grad_C_TGS = (_empty(B_TGS, *B_TGS.shape) for _ in range(2))
    grad_A_H, grad_D_H, grad_dt_bias_H = (torch.empty(heads, **fp32) for _ in range(3))
    grad_initial = None if initial_state is None else torch.empty(initial_state.shape, **fp32)
    _native.call(
        "ssd_scan_bwd",
        **inputs,
        grad_y=_native.aligned(grads[0]),
        grad_last=_native.aligned(grads[1]),
        grad_x=grad_x_THP,
        grad_dt=grad_dt_TH,
        grad_A=grad_A_H,
        grad_B=grad_B_TGS,
        grad_C=grad_C_TGS,
        grad_D=grad_D_H,
        grad_dt_bias=grad_dt_bias_H,
        grad_initial=grad_initial,
    )
    found = [grad_x_THP, grad_dt_TH.to(dt_TH.dtype), grad_A_H.to(A_H.dtype), grad_B_TGS, grad_C_TGS]
    for value, gradient in ((D_H, grad_D_H), (dt_bias_H, grad_dt_bias_H), (initial_state, grad_initial)):
        if value is not None and gradient is not None:
            found.append(gradient.to(value.dtype))
    return found


def _rows(x: Tensor) -> Tensor:
    """Rows of the last two dimensions side by side: a view of a projection's slice, and a copy of what is laid out
    otherwise. Of a last dimension of one flatten makes a view whatever the strides."""
    rows = x.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _step(rows: Tensor) -> int:
    """From row to row; 0 where there is but one, whose stride torch leaves open."""
    return rows.stride(0) if rows.shape[0] > 1 else 0


def _scan_inputs(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGS: Tensor,
    C_TGS: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_limit: tuple[float, float],
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> dict[str, Any]:
    tokens, heads, head_dim = x_THP.shape
    groups, state_dim = B_TGS.shape[1:]
    x, B, C = _rows(x_THP), _rows(B_TGS), _rows(C_TGS)
    dt, A, D, dt_bias, initial = (
        None if v is None else v.float().contiguous() for v in (dt_TH, A_H, D_H, dt_bias_H, initial_state)
    )
    if cu_seqlens is None and not _native.on_cuda(x_THP):  # there null is one sequence, and takes no launch
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
    return {
        "tokens": tokens,
        "sequences": check.sequences(cu_seqlens),
        "heads": heads,
        "head_dim": head_dim,
        "groups": groups,
        "state_dim": state_dim,
        "chunk": min(chunk_size, LONGEST_CHUNK),
        "workers": torch.get_num_threads(),
        "dt_min": dt_limit[0],
        "dt_max": dt_limit[1],
        "dtype": _native.dtype_name(x_THP),
        "x": x,
        "x_stride": _step(x),
        "dt": dt,
        "A": A,
        "B": B,
        "B_stride": _step(B),
        "C": C,
        "C_stride": _step(C),
        "D": D,
        "dt_bias": dt_bias,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "initial": None if initial is None else _native.aligned(initial),
    }


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
    heads, head_dim = x_QHP.shape[1:]
    if _native.on_cuda(x_QHP) and (heads > 65535 or max(head_dim, B_QGS.shape[2]) >= 2**20):
        sizes = tuple(state_QHPS.shape)
        return f"the CUDA kernel takes at most 65,535 heads of fewer than 2^20 rows and columns, got {sizes}"
    return _native.refusal(x_QHP, state_QHPS, dt_QH, A_H, B_QGS, C_QGS, D_H, dt_bias_H, cuda=True)


def kernels_ssd_update(*args: object) -> list[str]:
    return ["ssd_update"]


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
    x, B, C = _rows(x_QHP), _rows(B_QGS), _rows(C_QGS)
    dt, A, D, dt_bias = (None if v is None else v.float().contiguous() for v in (dt_QH, A_H, D_H, dt_bias_H))
    y_QHP = torch.empty(x_QHP.shape, dtype=x_QHP.dtype, device=x_QHP.device)
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

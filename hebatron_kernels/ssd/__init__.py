"""The selective state-space scan of Mamba-2: whole sequences, and one token at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from .._dispatch import Operator
from . import native, reference, torch_ops, triton_ops

__all__ = ["ssd_scan", "ssd_update"]

_SHARED = "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, float[] dt_limit"


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake_scan(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGS: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    cu_seqlens = others[4]
    shape = (check.sequences(cu_seqlens), *x_THP.shape[1:], B_TGS.shape[2])
    return x_THP.new_empty(x_THP.shape), x_THP.new_empty(shape, dtype=_state_dtype(x_THP))


_scan = Operator(
    "ssd_scan",
    f"Tensor x, Tensor dt, {_SHARED}, Tensor? cu_seqlens, Tensor? initial_state, int chunk_size",
    "(Tensor, Tensor)",
    {"native": native, "triton": triton_ops, "emulator": native, "torch": torch_ops, "reference": reference},
    _fake_scan,
)
_update = Operator(
    "ssd_update",
    f"Tensor(a!) state, Tensor x, Tensor dt, {_SHARED}",
    "Tensor",
    {"native": native, "emulator": native, "torch": torch_ops, "reference": reference},
    lambda state, x, *others: x.new_empty(x.shape),
    differentiable=False,
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
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t^T and y_t = h_t C_t + D x_t, per head, dt_t = softplus(dt + dt_bias).

    Args:
        x_THP: (T tokens, H heads, P head dim), any floating dtype; may be strided (a slice of a projection).
        dt_TH: (T, H), raw step sizes, any floating dtype. dt_bias is added, softplus applied, then dt_limit.
        A_H: (H,), the decay rates -exp(A_log), negative, any floating dtype.
        B_TGS, C_TGS: (T, G groups, S state) in the dtype of x; head h reads group h // (H / G).
        D_H: (H,), the weight of the direct path, or None for none.
        dt_bias_H: (H,), or None for none.
        dt_limit: the smallest and the largest step after softplus, 0 <= smallest <= largest.
        cu_seqlens: (Q + 1,) int32, where each packed sequence starts and ends; None is one sequence. Sequences
            do not see one another, whatever they hold, and may be empty.
        initial_state: (Q, H, P, S), any floating dtype, the state each sequence starts from; None is zeros.
        chunk_size: the longest chunk a chunked implementation may use; changes the rounding, not the result. Inputs
            are finite: a chunked form may carry a NaN or inf to earlier tokens of its chunk, never to another sequence.
            Chunks count from each sequence's start, so in the native form a sequence cut at whole chunks (of 64
            tokens, or of chunk_size where that is less; on CUDA at sixteen of them) gives the same result to the bit.
        backend: "native", "triton", "torch", "reference" or "emulator"; None chooses.

    Returns:
        y_THP in the dtype of x, and the state after each sequence (Q, H, P, S), fp32 (fp64 for fp64 x).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To every floating tensor, through both results. Of first order in the native and the chunked form. The native
        backward saves the inputs alone and computes the states of the chunks again.

    Backends:
        native: C++ on the CPU and CUDA on a GPU over chunks of at most 64, fp32 and bf16, summed in fp32 with log
        decays in fp64; for bf16 the factors of the products are rounded to bf16, the carried state stays fp32. On CUDA
        head dim and state are multiples of 8, the state at most 128, chunks of fp32 at most 32. triton: on GPUs from
        sm_80 on, head dim at most 128, state at most 256, chunks of at most 64 (fp32: 16). emulator: the CUDA source on
        CPU tensors. torch: chunked matrix products, every dtype and device, summed in fp32 (fp64 for fp64 x).

    Source:
        Dao and Gu 2024, Mamba-2, arXiv 2405.21060, section 6; the layout and dt_limit of Nemotron-H's config.
    """
    op = "ssd_scan"
    check.tensor(op, "x_THP", x_THP, None, None, None)
    _check_inputs(op, "T", x_THP, dt_TH, A_H, B_TGS, C_TGS, D_H, dt_bias_H, dt_limit)
    check.cu_seqlens(op, cu_seqlens, x_THP.shape[0])
    if initial_state is not None:
        shape = (check.sequences(cu_seqlens), *x_THP.shape[1:], B_TGS.shape[2])
        check.tensor(op, "initial_state", initial_state, *shape)
    check.same_device(op, x_THP, cu_seqlens=cu_seqlens, initial_state=initial_state)
    check.positive(op, chunk_size=chunk_size)
    check.integer(op, chunk_size=chunk_size)
    return _scan(
        x_THP, dt_TH, A_H, B_TGS, C_TGS, D_H, dt_bias_H, dt_limit, cu_seqlens, initial_state, chunk_size,
        backend=backend,
    )  # fmt: skip


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
    *,
    backend: str | None = None,
) -> Tensor:
    """One token of ssd_scan for every sequence: state = exp(dt A) state + dt x B^T in place, y = state C + D x.

    Args:
        state_QHPS: (Q sequences, H heads, P head dim, S state), contiguous, fp32 (fp64 for fp64 x). Overwritten.
        x_QHP, dt_QH, A_H, B_QGS, C_QGS, D_H, dt_bias_H, dt_limit: as in ssd_scan, one token per sequence.
        backend: "native", "torch", "reference" or "emulator"; None chooses.

    Returns:
        y_QHP in the dtype of x.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, layout or value, or requires a gradient
            while gradients are recorded.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        None; ssd_scan with an initial_state has them.

    Backends:
        native: C++ on the CPU and CUDA on a GPU, fp32 and bf16. emulator: the CUDA source on CPU tensors. torch: every
        dtype and device.

    Source:
        Dao and Gu 2024, Mamba-2, arXiv 2405.21060, section 6.
    """
    op = "ssd_update"
    check.tensor(op, "x_QHP", x_QHP, None, None, None)
    _check_inputs(op, "Q", x_QHP, dt_QH, A_H, B_QGS, C_QGS, D_H, dt_bias_H, dt_limit)
    check.tensor(op, "state_QHPS", state_QHPS, *x_QHP.shape, B_QGS.shape[2], dtypes=(_state_dtype(x_QHP),))
    check.same_device(op, x_QHP, state_QHPS=state_QHPS)
    if not state_QHPS.is_contiguous():
        check.refuse(op, "state_QHPS", "be contiguous", f"strides {state_QHPS.stride()}")
    return _update(state_QHPS, x_QHP, dt_QH, A_H, B_QGS, C_QGS, D_H, dt_bias_H, dt_limit, backend=backend)


def _check_inputs(
    op: str,
    rows: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
) -> None:
    count, heads = x.shape[:2]
    check.tensor(op, f"dt_{rows}H", dt, count, heads)
    check.tensor(op, "A_H", A, heads)
    check.tensor(op, f"B_{rows}GS", B, count, None, None, dtypes=(x.dtype,))
    check.tensor(op, f"C_{rows}GS", C, *B.shape, dtypes=(x.dtype,))
    for name, value in (("D_H", D), ("dt_bias_H", dt_bias)):
        if value is not None:
            check.tensor(op, name, value, heads)
    check.same_device(op, x, **{f"dt_{rows}H": dt, "A_H": A, f"B_{rows}GS": B, f"C_{rows}GS": C})
    check.same_device(op, x, D_H=D, dt_bias_H=dt_bias)
    if 0 in (*x.shape[1:], *B.shape[1:]):
        check.refuse(
            op,
            f"x_{rows}HP",
            "have heads, head dim, groups and state > 0",
            f"{tuple(x.shape)}, {tuple(B.shape)}",
        )
    if heads % B.shape[1]:
        check.refuse(op, f"B_{rows}GS", f"have a number of groups that divides the {heads} heads", B.shape[1])
    pair = isinstance(dt_limit, (tuple, list)) and len(dt_limit) == 2
    if not (
        pair
        and all(isinstance(limit, (int, float)) for limit in dt_limit)
        and 0 <= dt_limit[0] <= dt_limit[1]
        and dt_limit[0] < math.inf
    ):
        condition = "be (smallest, largest) with 0 <= smallest <= largest, smallest finite"
        check.refuse(op, "dt_limit", condition, repr(dt_limit))

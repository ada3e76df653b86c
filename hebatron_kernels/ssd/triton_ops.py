"""ssd_scan in Triton, for every GPU from compute capability 8.0 on: forward and all gradients, fp32 and bf16.

T tokens, H heads, P head dim, G groups, S state, Q sequences.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _triton

FP_FUSION = True  # a product of fp32 is then one instruction a pair; the default up to Triton 3.9


def _kernels() -> ModuleType:
    from . import triton_kernels  # at the first call: it imports Triton

    return triton_kernels


def supports_ssd_scan(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGS: Tensor, C_TGS: Tensor, *others: object
) -> str | None:
    reason = _triton.refusal(x_THP)
    if reason is not None:
        return reason
    kernels = _kernels()
    for name, size, most in (
        ("head dim", x_THP.shape[2], kernels.LARGEST_HEAD_DIM),
        ("state", B_TGS.shape[2], kernels.LARGEST_STATE),
        ("distance between tokens", max(x_THP.stride(0), dt_TH.stride(0)), kernels.LARGEST_ROW),
        ("distance between tokens", max(B_TGS.stride(0), C_TGS.stride(0)), kernels.LARGEST_ROW),
    ):
        if size > most:
            return f"takes a {name} of at most {most}, got {size}"
    return None


def unproven_ssd_scan(x_THP: Tensor, *others: object) -> str | None:
    return _triton.unproven("ssd", x_THP.get_device())


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


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
    x, A, B, C, D, dt_bias = _inputs(x_THP, A_H, B_TGS, C_TGS, D_H, dt_bias_H)
    scan = _scan_of(x, B, cu_seqlens, chunk_size)
    return _forward(scan, x, dt_TH, A, B, C, D, dt_bias, dt_limit, initial_state)


def ssd_scan_bwd(grads: list[Tensor], *args: Any) -> list[Tensor]:
    """Nothing is kept from the forward: the states of the chunks are computed again."""
    x_THP, dt_TH, A_H, B_TGS, C_TGS, D_H, dt_bias_H, dt_limit, cu_seqlens, initial_state, chunk_size = args
    x, A, B, C, D, dt_bias = _inputs(x_THP, A_H, B_TGS, C_TGS, D_H, dt_bias_H)
    scan = _scan_of(x, B, cu_seqlens, chunk_size)
    found = _backward(scan, grads[0], grads[1], x, dt_TH, A, B, C, D, dt_bias, dt_limit, initial_state)
    taken = (x_THP, dt_TH, A_H, B_TGS, C_TGS, D_H, dt_bias_H, initial_state)
    return [g.to(value.dtype) for g, value in zip(found, taken) if g is not None and value is not None]


def _inputs(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    D, dt_bias = (None if value is None else value.contiguous() for value in (D, dt_bias))
    return _rows(x), A.contiguous(), _rows(B), _rows(C), D, dt_bias


class _Scan(NamedTuple):
    """What every launch of one call shares: cu_seqlens, the most chunks there can be, and a tile."""

    cu: Tensor
    chunks: int
    length: int
    size: Any


def _scan_of(x: Tensor, B: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> _Scan:
    tokens, _, head_dim = x.shape
    size = _kernels().blocks(head_dim, B.shape[2], x.element_size())
    length = min(chunk_size, size.t)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, dtype=torch.int32, device=x.device) * tokens  # no copy from the host
    sequences = cu_seqlens.shape[0] - 1
    chunks = min(tokens, (tokens + sequences * (length - 1)) // length)
    return _Scan(cu_seqlens.contiguous(), chunks, length, size)


def _forward(
    scan: _Scan,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (T, H, P) and the states behind the sequences (Q, H, P, S)."""
    before, _, last = _states(scan, x, dt, A, B, dt_bias, dt_limit, initial)
    y = x.new_empty(x.shape)
    if scan.chunks:
        arguments = (*_shared(scan, x, B, dt_limit), *_strides(x, dt), *B.stride()[:2], *C.stride()[:2])
        with _on(x):
            _kernels().outputs[(scan.chunks, B.shape[1])](
                *(x, dt, A, B, C, D, dt_bias, scan.cu, before, y), *arguments, **_constants(scan)
            )
    return y, last


def _backward(
    scan: _Scan,
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    initial: Tensor | None,
) -> list[Tensor | None]:
    """Of x, dt, A, B, C, D, dt_bias and initial; those of dt, A, D, dt_bias and initial in fp32."""
    before, decays, _ = _states(scan, x, dt, A, B, dt_bias, dt_limit, initial)
    grad_y, heads = grad_y.contiguous(), x.shape[1]
    sums = _chunk_sums(scan, grad_y, dt, A, C, dt_bias, dt_limit, decays, back=True)
    behind, grad_initial = _pass_on(scan, sums, decays, grad_last, x.dtype, initial is not None, back=True)
    grad_x, grad_B, grad_C = (x.new_empty(value.shape) for value in (x, B, C))
    grad_dt = x.new_empty(dt.shape, dtype=torch.float32)
    # zeros: of chunks that are not there. Added up in one order, as atomics would not be.
    parts = [x.new_zeros(scan.chunks, heads, dtype=torch.float32) for _ in range(3)]
    if scan.chunks:
        arguments = (*_shared(scan, x, B, dt_limit), *_strides(x, dt), *B.stride()[:2], *C.stride()[:2])
        constants = _constants(scan) | {"BLOCK_S": scan.size.part}
        with _on(x):
            _kernels().gradients_of_heads[(scan.chunks, heads)](
                *(x, dt, A, B, C, D, dt_bias, scan.cu, before, behind, grad_y, grad_x, grad_dt, *parts),
                *arguments,
                **constants,
            )
            parts_of_state = -(-B.shape[2] // scan.size.part)
            for of_C in (False, True):
                _kernels().gradients_of_groups[(scan.chunks, B.shape[1], parts_of_state)](
                    *(x, dt, A, B, C, dt_bias, scan.cu, before, behind, grad_y, grad_B, grad_C, *arguments),
                    OF_C=of_C,
                    **constants,
                )
    grad_A, grad_D, grad_bias = (part.sum(0) for part in parts)
    return [
        *(grad_x, grad_dt, grad_A, grad_B, grad_C),
        None if D is None else grad_D,
        None if dt_bias is None else grad_bias,
        grad_initial,
    ]


def _states(
    scan: _Scan,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The states before the chunks, the chunks' decays, the states behind the sequences."""
    decays = x.new_empty(scan.chunks, x.shape[1], dtype=torch.float32)
    sums = _chunk_sums(scan, x, dt, A, B, dt_bias, dt_limit, decays)
    before, last = _pass_on(scan, sums, decays, initial, x.dtype)
    assert last is not None
    return before, decays, last


def _chunk_sums(
    scan: _Scan,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    decays: Tensor,
    back: bool = False,
) -> Tensor:
    heads, head_dim = x.shape[1:]
    sums = x.new_empty(scan.chunks, heads, head_dim, B.shape[2], dtype=torch.float32)
    if scan.chunks:
        with _on(x):
            _kernels().chunk_sums[(scan.chunks, heads)](
                *(x, dt, A, B, dt_bias, scan.cu, sums, decays),
                *(*_shared(scan, x, B, dt_limit), *_strides(x, dt), *B.stride()[:2]),
                BACK=back,
                **_constants(scan),
            )
    return sums


def _pass_on(
    scan: _Scan,
    sums: Tensor,
    decays: Tensor,
    start: Tensor | None,
    dtype: torch.dtype,
    ends: bool = True,
    back: bool = False,
) -> tuple[Tensor, Tensor | None]:
    found = sums.new_empty(sums.shape, dtype=dtype)
    sequences, (_, heads, *matrix) = scan.cu.shape[0] - 1, sums.shape
    last = sums.new_empty(sequences, heads, *matrix) if ends else None
    elements = matrix[0] * matrix[1]
    programs = sequences * heads * -(-elements // _kernels().PASSED)
    if programs:
        with _on(sums):
            _kernels().pass_on[(programs,)](
                *(sums, decays, scan.cu, None if start is None else start.contiguous(), found, last),
                *(sequences, scan.length, heads, elements),
                BACK=back,
                BLOCK_Q=_sequences_tile(scan),
                PASSED=_kernels().PASSED,
                num_warps=4,
                enable_fp_fusion=FP_FUSION,
            )
    return found, last


def _shared(scan: _Scan, x: Tensor, B: Tensor, dt_limit: tuple[float, float]) -> tuple[Any, ...]:
    heads, head_dim = x.shape[1:]
    groups, state = B.shape[1:]
    return (scan.cu.shape[0] - 1, scan.length, heads, head_dim, state, heads // groups, *map(float, dt_limit))


def _strides(x: Tensor, dt: Tensor) -> tuple[int, ...]:
    return (*x.stride()[:2], *dt.stride())


def _sequences_tile(scan: _Scan) -> int:
    return max(16, 1 << (scan.cu.shape[0] - 2).bit_length()) if scan.cu.shape[0] > 1 else 16


def _constants(scan: _Scan) -> dict[str, Any]:
    return {
        "FP32": _triton.interpreting,
        "BLOCK_Q": _sequences_tile(scan),
        "BLOCK_T": scan.size.t,
        "BLOCK_P": scan.size.p,
        "BLOCK_S": scan.size.s,
        "num_warps": scan.size.warps,
        "num_stages": 1,  # two heads' tiles in flight do not fit 99 KB
        "enable_fp_fusion": FP_FUSION,
    }


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current GPU and its current stream, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

"""The Triton kernels of grouped_gemm. Importing this file imports Triton; triton_ops.py does so at the first call.

N rows, R rows of a, E experts, K inner width, M outputs. The rows of expert e are ends[e-1] to ends[e]; those from the
last end on are the group E, whose results are 0. Blocks are BLOCK_N x BLOCK_M x BLOCK_K of those dimensions.

What      times_experts: out[n] = act(a[taken[n]] @ b[e]) * scale[n]; with BACK the gradients of h = a[taken[n]] @ b[e]
          and of scale from that of out. by_expert: out[e] = sum over the rows n of e of a[taken[n]]^T grad[n].
Grid      one program a block of the result; as many as the shapes allow at most, those without work return at once.
          Rows: 16x64x128 (4 warps, 4 stages) to 128x128x64 (8, 3); 96 KB of shared memory at most. Registers and
          instructions for sm_80, sm_90 and sm_100 are held to bounds by .ci/triton_gates.py.
Traffic   times_experts: a once for every BLOCK_M outputs, b once for every BLOCK_N rows, through L2; out once.
Roofline  as csrc/cuda/grouped_gemm_sm80.cu: below about 270 rows an expert the weights' bytes, above the products.
Measured  never run on hardware; interpreted on the CPU and compiled ahead of time in every CI run.
Limits    fp32 and bf16; any strides, widths and number of rows below 2^31; compute capability 8.0.
Why so    every program finds its own expert by a prefix sum over all E counts (E+1 integers from L2, against a loop
          over K): the sizes never leave the GPU, and no launch or buffer prepares them. Blocks of M are innermost, so
          the programs that run together share the rows of a and one expert's weights stay in L2.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton

# A product of fp32 is then one instruction a pair, not two. The default up to Triton 3.9, which announces its end.
FP_FUSION = True


class Blocks(NamedTuple):
    """Sizes along N, M and K, warps, and stages of the pipeline."""

    n: int
    m: int
    k: int
    warps: int
    stages: int


def blocks(rows: int, experts: int, bytes_element: int) -> Blocks:
    """The blocks of times_experts by the mean number of rows an expert has.

    Few rows: the weights stream, so the blocks are narrow in N and long in K. All stay under the 99 KB of shared memory
    of sm_86, sm_89 and sm_120. fp32 has no tensor core product without rounding, so its blocks fit registers only.
    """
    if bytes_element == 4:
        return Blocks(16, 64, 32, 4, 3) if rows <= 16 * experts else Blocks(64, 64, 32, 4, 3)
    for each, found in (
        (16, Blocks(16, 64, 128, 4, 4)),
        (32, Blocks(32, 64, 128, 4, 3)),
        (96, Blocks(64, 128, 64, 4, 4)),
    ):
        if rows <= each * experts:
            return found
    return Blocks(128, 128, 64, 8, 3)


def weight_blocks(rows: int, experts: int, bytes_element: int) -> Blocks:
    """The blocks of by_expert, whose sum runs over the rows."""
    if bytes_element == 4:
        return Blocks(32, 64, 64, 4, 3)
    return Blocks(32, 128, 128, 8, 3) if rows <= 32 * experts else Blocks(64, 128, 128, 8, 3)


def most_row_blocks(rows: int, experts: int, block: int) -> int:
    """How many blocks of rows the groups can have at most, that of the rows past the end among them."""
    return min(rows, (rows + (experts + 1) * (block - 1)) // block)


@triton.jit
def _rows_of(ends, experts, rows, block, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """(group, first row, the group's end) of this block of rows; a group above E: no such block."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends + e, mask=e < experts, other=rows)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e <= experts), other=0)
    begin = tl.where(e > experts, rows, begin)
    count = tl.cdiv(end - begin, BLOCK_N)
    after = tl.cumsum(count, 0)
    group = tl.sum((after <= block).to(tl.int32), 0)
    mine = e == group
    first = tl.sum(tl.where(mine, begin + (block - after + count) * BLOCK_N, 0), 0)
    return group, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def times_experts(
    a,
    b,
    ends,
    taken,
    scale,
    out,
    grad,
    row_sums,
    rows,
    experts,
    inner,
    outputs,
    a_row,
    a_inner,
    b_expert,
    b_inner,
    b_output,
    RELU2: tl.constexpr,
    BACK: tl.constexpr,
    FP32: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """taken, scale: None is row n itself, 1. BACK: `grad` (N, M) is that of the result, out becomes that of the product
    before activation and scale, and row_sums (blocks of M, N) its dot with the result without the scale, where wanted.
    """
    blocks_m = tl.cdiv(outputs, BLOCK_M)
    block_m = tl.program_id(0) % blocks_m
    group, first, end = _rows_of(ends, experts, rows, tl.program_id(0) // blocks_m, BLOCK_N, BLOCK_E)
    if group > experts:
        return
    n = first + tl.arange(0, BLOCK_N)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    mine = n < end
    used = n < tl.where(group < experts, end, first)  # none of the rows past the last end
    row = n
    if taken is not None:
        row = tl.load(taken + n, mask=used, other=0)
    # 64 bits wherever a stride comes in: one tensor may have more than 2^31 elements
    a_at = a + row.to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_inner
    expert = tl.minimum(group, experts - 1).to(tl.int64)
    b_at = b + expert * b_expert
    b_at = b_at + k.to(tl.int64)[:, None] * b_inner + m.to(tl.int64)[None, :] * b_output
    step = tl.full((), BLOCK_K, tl.int64)
    h = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for begin in range(0, tl.where(group < experts, inner, 0), BLOCK_K):
        left = begin + k < inner
        x = tl.load(a_at, mask=used[:, None] & left[None, :], other=0.0)
        w = tl.load(b_at, mask=left[:, None] & (m < outputs)[None, :], other=0.0)
        if FP32:
            x, w = x.to(tl.float32), w.to(tl.float32)
        h = tl.dot(x, w, h, input_precision="ieee")
        a_at += step * a_inner
        b_at += step * b_inner
    at = n.to(tl.int64)[:, None] * outputs + m[None, :]
    inside = mine[:, None] & (m < outputs)[None, :]
    value, slope = h, h
    if RELU2:
        positive = tl.where(h < 0, 0.0, h)  # a NaN stays one, which tl.maximum would make 0
        value, slope = positive * positive, 2 * positive
    if BACK:
        g = tl.load(grad + at, mask=inside & used[:, None], other=0.0).to(tl.float32)
        if row_sums is not None:
            sums_at = row_sums + block_m.to(tl.int64) * rows + n
            tl.store(sums_at, tl.sum(tl.where(used[:, None], g * value, 0.0), 1), mask=mine)
        value = g * slope if RELU2 else g
    if scale is not None:
        value *= tl.load(scale + n, mask=used, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def by_expert(
    a,
    grad,
    ends,
    taken,
    out,
    inner,
    outputs,
    a_row,
    a_inner,
    FP32: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad (N, M) and out (E, K, M) are contiguous. An expert without rows gets zeros."""
    blocks_k = tl.cdiv(inner, BLOCK_K)
    blocks_m = tl.cdiv(outputs, BLOCK_M)
    block = tl.program_id(0)
    expert = block // (blocks_k * blocks_m)
    k = block // blocks_m % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m = block % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    a_at = a + k.to(tl.int64)[:, None] * a_inner
    total = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for begin in range(first, end, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        mine = n < end
        row = n
        if taken is not None:
            row = tl.load(taken + n, mask=mine, other=0)
        x = tl.load(
            a_at + row.to(tl.int64)[None, :] * a_row, mask=(k < inner)[:, None] & mine[None, :], other=0.0
        )
        g_at = grad + n.to(tl.int64)[:, None] * outputs + m[None, :]
        g = tl.load(g_at, mask=mine[:, None] & (m < outputs)[None, :], other=0.0)
        if FP32:
            x, g = x.to(tl.float32), g.to(tl.float32)
        total = tl.dot(x, g, total, input_precision="ieee")
    at = (expert.to(tl.int64) * inner + k[:, None]) * outputs + m[None, :]
    inside = (k < inner)[:, None] & (m < outputs)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def product(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    taken: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """(N, M): each row times its expert's b, activation, scale; 0 past the last end."""
    out = a.new_empty((a if taken is None else taken).shape[0], b.shape[2])
    _launch_rows(a, b, ends, taken, scale, activation, out, None, None)
    return out


def product_grad(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    taken: Tensor | None,
    scale: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient (N, M) of the product before activation and scale, in the dtype of a, and that (N,) of scale."""
    out = torch.empty_like(grad)
    size = blocks(grad.shape[0], b.shape[0], a.element_size())
    parts = None
    if scale is not None:  # added up in one order: a sum by atomics would differ from run to run
        parts = grad.new_empty(triton.cdiv(b.shape[2], size.m), grad.shape[0], dtype=torch.float32)
    _launch_rows(a, b, ends, taken, scale, activation, out, grad, parts)
    return out, None if scale is None or parts is None else parts.sum(0).to(scale.dtype)


def weight_grad(
    a: Tensor, grad: Tensor, ends: Tensor, taken: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """(E, K, M) in `dtype` (that of a): each expert's rows of a, transposed, times its rows of grad."""
    experts, inner, outputs = ends.shape[0], a.shape[1], grad.shape[1]
    out = a.new_empty(experts, inner, outputs, dtype=dtype)
    size = weight_blocks(grad.shape[0], experts, a.element_size())
    programs = experts * triton.cdiv(inner, size.k) * triton.cdiv(outputs, size.m)
    with _on(a):
        by_expert[(programs,)](
            a,
            grad,
            ends.contiguous(),
            None if taken is None else taken.contiguous(),
            out,
            inner,
            outputs,
            *a.stride(),
            FP32=_triton.interpreting,
            BLOCK_N=size.n,
            BLOCK_M=size.m,
            BLOCK_K=size.k,
            num_warps=size.warps,
            num_stages=size.stages,
            enable_fp_fusion=FP_FUSION,
        )
    return out


def _launch_rows(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    taken: Tensor | None,
    scale: Tensor | None,
    activation: str | None,
    out: Tensor,
    grad: Tensor | None,
    row_sums: Tensor | None,
) -> None:
    experts, inner, outputs = b.shape
    rows = out.shape[0]
    size = blocks(rows, experts, a.element_size())
    programs = most_row_blocks(rows, experts, size.n) * triton.cdiv(outputs, size.m)
    if programs == 0:
        return
    with _on(a):
        times_experts[(programs,)](
            a,
            b,
            ends.contiguous(),
            None if taken is None else taken.contiguous(),
            None if scale is None else scale.contiguous(),
            out,
            grad,
            row_sums,
            rows,
            experts,
            inner,
            outputs,
            *a.stride(),
            *b.stride(),
            RELU2=activation == "relu2",
            BACK=grad is not None,
            FP32=_triton.interpreting,
            BLOCK_E=triton.next_power_of_2(experts + 1),
            BLOCK_N=size.n,
            BLOCK_M=size.m,
            BLOCK_K=size.k,
            num_warps=size.warps,
            num_stages=size.stages,
            enable_fp_fusion=FP_FUSION,
        )


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current GPU and its current stream, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

"""The Triton kernels of ssd_scan. Importing this file imports Triton; triton_ops.py does so at the first call.

T tokens, H heads, P head dim, G groups, S state, C chunks. A chunk is at most `length` tokens of one sequence, counted
from its start; u_t = dt_t x_t, and cum_t is the sum of dt A over a chunk's tokens up to t.

What      chunk_sums: what each chunk adds to the state, sum_t exp(cum_end - cum_t) u_t B_t^T; with BACK, to the
          gradient of the state before it, sum_t exp(cum_t) dy_t C_t^T. pass_on: the states before the chunks from
          those sums, one after another; with BACK, from the last chunk on, the gradients of the states behind them.
          outputs: y. gradients_of_heads: those of x, dt, A, D, dt_bias; gradients_of_groups: of B or of C.
Grid      chunk_sums, gradients_of_heads: (chunks, heads). pass_on: a program for 1,024 elements of a head's state.
          outputs, gradients_of_groups: a chunk and group, whose heads they go through in order: C B^T is made once,
          the gradients of B and C are summed in registers. As many chunks as any lengths have; those not there return.
Traffic   forward, a token, bf16, 64 x 64 heads, state 128, 8 groups, chunks of 64: x twice, y once (8 KB each), B and
          C (2 KB each) twice, a chunk's states (2 MB in fp32, 1 MB in bf16) twice each, 96 KB: 128 KB in all, 6 times
          what must move.
Roofline  DRAM: 65,536 tokens 8.4 GB, 2.8 ms at 3.0 TB/s (H100). csrc/cuda's form is for speed, this for any GPU.
Measured  never run on hardware; interpreted on the CPU and compiled ahead of time in every CI run. For sm_80
          gradients_of_heads has 560 bytes of stack (21 stores), the others none or 40; for sm_100 chunk_sums 56.
Limits    fp32 and bf16; P at most 128, S at most 256; rows of a tensor at most 2^24 elements apart, sequences and
          tokens below 2^31; compute capability 8.0.
Why so    a chunk finds its sequence by a prefix sum over all lengths, so they never leave the GPU. The states are
          passed on by a kernel of their own: no block waits for another one, and every sum has one order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

PASSED = 1024  # elements of a state that a program of pass_on carries
LARGEST_HEAD_DIM, LARGEST_STATE = 128, 256
LARGEST_ROW = 2**24  # elements between tokens: within a tile offsets have 32 bits


class Blocks(NamedTuple):
    """Tokens, head dim and state of a tile, the part of the state in one of `gradients`, and warps."""

    t: int
    p: int
    s: int
    part: int
    warps: int


def blocks(head_dim: int, state: int, bytes_element: int) -> Blocks:
    """fp32 has no tensor core product without rounding: its operands and sums lie in registers, so its tiles are
    smaller. A tile is longer than a chunk of few tokens: tl.dot takes 16 at least."""
    p, s = (max(16, triton.next_power_of_2(n)) for n in (head_dim, state))
    if bytes_element == 4:
        return Blocks(16, p, s, 16, 4)
    large = p * s > 64 * 128
    return Blocks(32 if large else 64, p, s, min(s, 32 if large else 64), 8)


@triton.jit
def _chunk_of(cu, sequences, chunk, length, BLOCK_Q: tl.constexpr):
    """(first token, the token behind the last) of this chunk; the same for a chunk that is not there."""
    q = tl.arange(0, BLOCK_Q)
    begin = tl.load(cu + q, mask=q < sequences, other=0)
    end = tl.load(cu + q + 1, mask=q < sequences, other=0)
    count = tl.cdiv(end - begin, length)
    after = tl.cumsum(count, 0)
    mine = q == tl.sum((after <= chunk).to(tl.int32), 0)
    first = tl.sum(tl.where(mine, begin + (chunk - after + count) * length, 0), 0)
    return first, tl.minimum(first + length, tl.sum(tl.where(mine, end, 0), 0))


@triton.jit
def _steps(dt, dt_bias, t, live, head, dt_row, dt_head, smallest, largest):
    """dt_t before softplus, after it, and within the limits: as it is used, 0 for a token that is not there."""
    raw = tl.load(dt + t * dt_row + head * dt_head, mask=live, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head).to(tl.float32)
    grown = tl.exp(tl.where(raw > 20, 0.0, raw))
    one_more = 1.0 + grown
    # log(1 + e) right in every bit for a small e: what 1 + e rounds away is put back by the quotient
    small = tl.where(
        one_more == 1.0, grown, tl.log(one_more) * grown / tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    )
    soft = tl.where(raw > 20, raw, small)
    step = tl.where(soft < smallest, smallest, tl.where(soft > largest, largest, soft))  # a NaN stays one
    return raw, soft, tl.where(live, step, 0.0)


@triton.jit
def _logs(step, rate):
    """cum_t and cum_end, each the sum of two fp32: decays of a chunk add up to -50 and more, and what fp32 rounds away
    there is 2e-6 of exp(cum_t - cum_s). Only these few sums are in fp64."""
    decay = step.to(tl.float64) * rate.to(tl.float64)
    cum, total = tl.cumsum(decay, 0), tl.sum(decay, 0)
    high, total_high = cum.to(tl.float32), total.to(tl.float32)
    return (
        high,
        (cum - high.to(tl.float64)).to(tl.float32),
        total_high,
        (total - total_high.to(tl.float64)).to(tl.float32),
    )


@triton.jit
def _reach(t, high, low):
    """exp(cum_t - cum_s) for s <= t, masked before the exponential: above the diagonal it would overflow."""
    log = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(t[:, None] >= t[None, :], log, float("-inf")))


@triton.jit
def _tile(base, rows, columns, row_stride, column_stride, rows_in, columns_in, FP32: tl.constexpr):
    at = base + rows[:, None] * row_stride + columns[None, :] * column_stride
    value = tl.load(at, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
    return value.to(tl.float32) if FP32 else value


@triton.jit
def _dot(x, y, like, FP32: tl.constexpr):
    """x y summed in fp32, the factors rounded to the dtype of the tensor `like`."""
    x, y = x.to(like.dtype.element_ty), y.to(like.dtype.element_ty)
    if FP32:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def chunk_sums(
    x, dt, A, B, dt_bias, cu, sums, decays, sequences, length, heads, head_dim, state, heads_a_group, smallest, largest,
    x_row, x_head, dt_row, dt_head, B_row, B_group, BACK: tl.constexpr, FP32: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """sums (C, H, P, S) and decays (C, H), cum_end, in fp32. BACK: x is grad_y, B is C, decays stay as they are."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, end = _chunk_of(cu, sequences, chunk, length, BLOCK_Q)
    if first >= end:
        return
    # 64 bits where a tensor may have more than 2^31 elements; inside a tile 32, which halves the registers of addresses
    start, t = first.to(tl.int64), tl.arange(0, BLOCK_T)
    p, s = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_S)
    live = first + t < end
    _, _, step = _steps(dt + start * dt_row, dt_bias, t, live, head, dt_row, dt_head, smallest, largest)
    high, low, total, more = _logs(step, tl.load(A + head).to(tl.float32))
    weight = tl.exp(high + low) if BACK else tl.exp((total - high) + (more - low)) * step
    x_at = x + start * x_row + head.to(tl.int64) * x_head
    values = _tile(x_at, p, t, 1, x_row, p < head_dim, live, FP32).to(tl.float32) * weight[None, :]
    keys = _tile(
        B + start * B_row + (head // heads_a_group).to(tl.int64) * B_group,
        t,
        s,
        B_row,
        1,
        live,
        s < state,
        FP32,
    )
    sum_at = (chunk.to(tl.int64) * heads + head) * head_dim * state
    inside = (p < head_dim)[:, None] & (s < state)[None, :]
    tl.store(sums + sum_at + p[:, None] * state + s[None, :], _dot(values, keys, x, FP32), mask=inside)
    if not BACK:
        tl.store(decays + chunk * heads + head, total + more)


@triton.jit
def pass_on(
    sums, decays, cu, start, found, last, sequences, length, heads, elements, BACK: tl.constexpr, BLOCK_Q: tl.constexpr,
    PASSED: tl.constexpr,
):  # fmt: skip
    """carried = start; for every chunk of a sequence: found[chunk] = carried, carried = exp(decay) carried +
    sums[chunk]; last = carried. start, last: (Q, H, elements); None is zeros, and not wanted. found has the dtype of
    the products."""
    parts = tl.cdiv(elements, PASSED)
    part, head = tl.program_id(0) % parts, tl.program_id(0) // parts % heads
    sequence = tl.program_id(0) // parts // heads
    q = tl.arange(0, BLOCK_Q)
    before = tl.load(cu + q + 1, mask=q < sequence, other=0) - tl.load(cu + q, mask=q < sequence, other=0)
    chunk = tl.sum(tl.cdiv(before, length), 0)
    chunks = tl.cdiv(tl.load(cu + sequence + 1) - tl.load(cu + sequence), length)
    i = part * PASSED + tl.arange(0, PASSED)
    inside = i < elements
    mine = (sequence.to(tl.int64) * heads + head) * elements + i
    carried = tl.zeros((PASSED,), tl.float32)
    if start is not None:
        carried = tl.load(start + mine, mask=inside, other=0.0).to(tl.float32)
    for turn in range(0, chunks):
        c = (chunk + (chunks - 1 - turn if BACK else turn)).to(tl.int64)
        at = (c * heads + head) * elements + i
        tl.store(found + at, carried.to(found.dtype.element_ty), mask=inside)
        more = tl.load(sums + at, mask=inside, other=0.0)
        carried = tl.exp(tl.load(decays + c * heads + head)) * carried + more
    if last is not None:
        tl.store(last + mine, carried, mask=inside)


@triton.jit
def outputs(
    x, dt, A, B, C, D, dt_bias, cu, before, y, sequences, length, heads, head_dim, state, heads_a_group, smallest,
    largest, x_row, x_head, dt_row, dt_head, B_row, B_group, C_row, C_group, FP32: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y_t = sum_s<=t exp(cum_t - cum_s) (C_t . B_s) u_s + exp(cum_t) before C_t + D x_t; y (T, H, P)."""
    chunk, group = tl.program_id(0), tl.program_id(1)
    first, end = _chunk_of(cu, sequences, chunk, length, BLOCK_Q)
    if first >= end:
        return
    # 64 bits where a tensor may have more than 2^31 elements; inside a tile 32, which halves the registers of addresses
    start, t = first.to(tl.int64), tl.arange(0, BLOCK_T)
    p, s = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_S)
    live = first + t < end
    queries = _tile(C + start * C_row + group.to(tl.int64) * C_group, t, s, C_row, 1, live, s < state, FP32)
    keys = _tile(B + start * B_row + group.to(tl.int64) * B_group, s, t, 1, B_row, s < state, live, FP32)
    products = _dot(queries, keys, B, FP32)
    for i in range(0, heads_a_group):
        head = group * heads_a_group + i
        _, _, step = _steps(dt + start * dt_row, dt_bias, t, live, head, dt_row, dt_head, smallest, largest)
        high, low, _, _ = _logs(step, tl.load(A + head).to(tl.float32))
        reach = _reach(t, high, low)
        x_at = x + start * x_row + head.to(tl.int64) * x_head
        values = _tile(x_at, t, p, x_row, 1, live, p < head_dim, FP32)
        found = _dot(products * reach * step[None, :], values, x, FP32)
        state_at = before + (chunk.to(tl.int64) * heads + head) * head_dim * state
        states = _tile(state_at, s, p, 1, state, s < state, p < head_dim, FP32)
        found += tl.exp(high + low)[:, None] * _dot(queries, states, x, FP32)
        if D is not None:
            found += tl.load(D + head).to(tl.float32) * values.to(tl.float32)
        at = y + (start * heads + head) * head_dim + t[:, None] * heads * head_dim + p[None, :]
        tl.store(at, found.to(y.dtype.element_ty), mask=live[:, None] & (p < head_dim)[None, :])


@triton.jit
def gradients_of_heads(
    x, dt, A, B, C, D, dt_bias, cu, before, behind, grad_y, grad_x, grad_dt, sums_A, sums_D, sums_bias, sequences,
    length, heads, head_dim, state, heads_a_group, smallest, largest, x_row, x_head, dt_row, dt_head, B_row, B_group,
    C_row, C_group, FP32: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """From the states before the chunks and the gradients of those behind. grad_dt (T, H) and the chunks' sums (C, H)
    for A, D and dt_bias in fp32; the sums of chunks that are not there are left alone."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, end = _chunk_of(cu, sequences, chunk, length, BLOCK_Q)
    if first >= end:
        return
    # 64 bits where a tensor may have more than 2^31 elements; inside a tile 32, which halves the registers of addresses
    start, t = first.to(tl.int64), tl.arange(0, BLOCK_T)
    p, s = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_S)
    live, in_p = first + t < end, p < head_dim
    wide, group = head.to(tl.int64), (head // heads_a_group).to(tl.int64)
    raw, soft, step = _steps(dt + start * dt_row, dt_bias, t, live, head, dt_row, dt_head, smallest, largest)
    rate = tl.load(A + head).to(tl.float32)
    high, low, total, more = _logs(step, rate)
    left, since = tl.exp((total - high) + (more - low)), tl.exp(high + low)
    upstream = _tile(grad_y + (start * heads + wide) * head_dim, t, p, heads * head_dim, 1, live, in_p, FP32)
    values = _tile(x + start * x_row + wide * x_head, t, p, x_row, 1, live, in_p, FP32)
    state_at = (chunk.to(tl.int64) * heads + head) * head_dim * state
    products = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    of_u = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    earlier = tl.zeros((BLOCK_T,), tl.float32)
    both = tl.zeros((BLOCK_P,), tl.float32)
    for begin in range(0, state, BLOCK_S):  # a part of the state at a time: its tiles fit the registers
        in_s = begin + s < state
        queries = _tile(C + start * C_row + group * C_group + begin, t, s, C_row, 1, live, in_s, FP32)
        states = _tile(before + state_at + begin, p, s, state, 1, in_p, in_s, FP32)
        earlier += tl.sum(_dot(upstream, states, x, FP32) * queries.to(tl.float32), 1)
        of_state = _tile(behind + state_at + begin, p, s, state, 1, in_p, in_s, FP32)
        both += tl.sum(of_state.to(tl.float32) * states.to(tl.float32), 1)
        keys = _tile(B + start * B_row + group * B_group + begin, t, s, B_row, 1, live, in_s, FP32)
        of_u += _dot(keys, tl.trans(of_state), x, FP32)
        products += _dot(queries, tl.trans(keys), x, FP32)
    of_u *= left[:, None]
    through_state = tl.sum(of_u * values.to(tl.float32), 1) * step
    weights = products * _reach(t, high, low)
    of_u += _dot(tl.trans(weights), upstream, x, FP32)
    weights *= _dot(upstream, tl.trans(values), x, FP32) * step[None, :]
    # the decay at k weakens what goes from s < k to t >= k. As sums of rows minus sums of columns the same cancels.
    across = _dot(weights, tl.where(t[:, None] < t[None, :], 1.0, 0.0), x, FP32)
    of_decay = tl.sum(tl.where(t[:, None] >= t[None, :], across, 0.0), 0)
    of_decay += tl.cumsum(earlier * since, 0, reverse=True)
    of_decay += tl.cumsum(through_state, 0) - through_state + tl.exp(total + more) * tl.sum(both, 0)
    of_step = rate * of_decay + tl.sum(values.to(tl.float32) * of_u, 1)
    of_x = of_u * step[:, None]
    if D is not None:
        of_x += tl.load(D + head).to(tl.float32) * upstream.to(tl.float32)
        tl.store(sums_D + chunk * heads + head, tl.sum(values.to(tl.float32) * upstream.to(tl.float32)))
    # the derivative of softplus is the sigmoid; nothing passes where the limits cut
    passes = live & (soft >= smallest) & (soft <= largest)
    of_raw = tl.where(passes, of_step / (1.0 + tl.exp(-raw)), 0.0)
    tl.store(grad_dt + start * heads + t * heads + head, of_raw, mask=live)
    tl.store(sums_A + chunk * heads + head, tl.sum(of_decay * step, 0))
    if dt_bias is not None:
        tl.store(sums_bias + chunk * heads + head, tl.sum(of_raw, 0))
    at = grad_x + (start * heads + head) * head_dim + t[:, None] * heads * head_dim + p[None, :]
    tl.store(at, of_x.to(grad_x.dtype.element_ty), mask=live[:, None] & in_p[None, :])


@triton.jit
def gradients_of_groups(
    x, dt, A, B, C, dt_bias, cu, before, behind, grad_y, grad_B, grad_C, sequences, length, heads, head_dim, state,
    heads_a_group, smallest, largest, x_row, x_head, dt_row, dt_head, B_row, B_group, C_row, C_group,
    OF_C: tl.constexpr, FP32: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The sum over a group's heads, in their order, for a part of the state: of C with OF_C, else of B."""
    chunk, group = tl.program_id(0), tl.program_id(1)
    first, end = _chunk_of(cu, sequences, chunk, length, BLOCK_Q)
    if first >= end:
        return
    # 64 bits where a tensor may have more than 2^31 elements; inside a tile 32, which halves the registers of addresses
    start, t = first.to(tl.int64), tl.arange(0, BLOCK_T)
    p, s = tl.arange(0, BLOCK_P), tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    live, in_p, in_s = first + t < end, p < head_dim, s < state
    if OF_C:
        others = _tile(B + start * B_row + group.to(tl.int64) * B_group, t, s, B_row, 1, live, in_s, FP32)
    else:
        others = _tile(C + start * C_row + group.to(tl.int64) * C_group, t, s, C_row, 1, live, in_s, FP32)
    found = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for i in range(0, heads_a_group):
        head = group * heads_a_group + i
        wide = head.to(tl.int64)
        _, _, step = _steps(dt + start * dt_row, dt_bias, t, live, head, dt_row, dt_head, smallest, largest)
        high, low, total, more = _logs(step, tl.load(A + head).to(tl.float32))
        values = _tile(x + start * x_row + wide * x_head, t, p, x_row, 1, live, in_p, FP32)
        upstream = _tile(
            grad_y + (start * heads + wide) * head_dim, t, p, heads * head_dim, 1, live, in_p, FP32
        )
        weights = _reach(t, high, low) * _dot(upstream, tl.trans(values), x, FP32) * step[None, :]
        state_at = (chunk.to(tl.int64) * heads + head) * head_dim * state
        if OF_C:
            found += _dot(weights, others, x, FP32)
            states = _tile(before + state_at, p, s, state, 1, in_p, in_s, FP32)
            found += tl.exp(high + low)[:, None] * _dot(upstream, states, x, FP32)
        else:
            found += _dot(tl.trans(weights), others, x, FP32)
            of_state = _tile(behind + state_at, p, s, state, 1, in_p, in_s, FP32)
            share = step * tl.exp((total - high) + (more - low))
            found += _dot(values.to(tl.float32) * share[:, None], of_state, x, FP32)
    groups = heads // heads_a_group
    at = (start * groups + group) * state + t[:, None] * groups * state + s[None, :]
    inside = live[:, None] & in_s[None, :]
    if OF_C:
        tl.store(grad_C + at, found.to(grad_C.dtype.element_ty), mask=inside)
    else:
        tl.store(grad_B + at, found.to(grad_B.dtype.element_ty), mask=inside)

"""The state-space scan as a differentiable composite of matrix products over chunks.

T tokens, H heads, P head dim, G groups, R = H / G heads of a group, S state, Q sequences, N chunks, L chunk length.
Chunks count from the start of each sequence, so no chunk holds tokens of two. Their number is bounded by the shapes
alone and their table is made by tensor operations: nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# e^x is 0 below this, so a token's log decay can be cut here and no product changes; sums over a chunk stay exact.
LOWEST_LOG_DECAY = {torch.float32: -128.0, torch.float64: -1024.0}


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
    tokens, heads, head_dim = x_THP.shape
    dtype = torch.promote_types(x_THP.dtype, torch.float32)
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    if tokens == 0:
        sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        zeros = x_THP.new_zeros(sequences, heads, head_dim, B_TGS.shape[2], dtype=dtype)
        return x_THP.clone(), zeros if initial_state is None else initial_state.clone()

    chunks = _Chunks(tokens, min(chunk_size, _longest_chunk(x_THP, B_TGS)), cu_seqlens, x_THP.device)
    wide_THP = x_THP.to(dtype)
    x_NLHP = chunks.pack(wide_THP)
    dt_NLH = chunks.pack(_step_sizes(dt_TH, dt_bias_H, dt_limit, dtype))
    B_NGLS = chunks.pack(B_TGS.to(dtype)).transpose(1, 2).contiguous()
    C_NGLS = chunks.pack(C_TGS.to(dtype)).transpose(1, 2).contiguous()
    log_NHL = _log_decays(dt_NLH, A_H)

    decay_NH = log_NHL[..., -1].exp().to(dtype)
    added_NHPS = _states_added(x_NLHP, dt_NLH, log_NHL, B_NGLS)
    entering_NHPS = chunks.entering_states(added_NHPS, decay_NH, initial_state)
    y_NLHP = _from_states(entering_NHPS, log_NHL, C_NGLS)
    y_NLHP = y_NLHP + _inside_chunks(x_NLHP, dt_NLH, log_NHL, B_NGLS, C_NGLS)

    y_THP = chunks.unpack(y_NLHP)
    if D_H is not None:
        y_THP = torch.addcmul(y_THP, wide_THP, D_H.to(dtype)[:, None])
    return y_THP.to(x_THP.dtype), chunks.final_states(entering_NHPS, added_NHPS, decay_NH, initial_state)


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
    sequences, heads, head_dim = x_QHP.shape
    groups, state = B_QGS.shape[1:]
    dtype = state_QHPS.dtype
    wide_QHP, dt_QH = x_QHP.to(dtype), _step_sizes(dt_QH, dt_bias_H, dt_limit, dtype)
    decay_QH11 = torch.exp(dt_QH * A_H.to(dtype))[..., None, None]
    shape = (sequences, groups, heads // groups, head_dim, state)
    added = (wide_QHP * dt_QH[..., None]).reshape(shape[:4])[..., None] * B_QGS.to(dtype)[:, :, None, None]
    state_QHPS.mul_(decay_QH11).add_(added.view(sequences, heads, head_dim, state))
    y_QHP = (state_QHPS.view(shape) * C_QGS.to(dtype)[:, :, None, None]).sum(-1).view(x_QHP.shape)
    if D_H is not None:
        y_QHP = torch.addcmul(y_QHP, wide_QHP, D_H.to(dtype)[:, None])
    return y_QHP.to(x_QHP.dtype)


def _longest_chunk(x_THP: Tensor, B_TGS: Tensor) -> int:
    """Longer chunks make fewer states but more pairs of tokens, and pad short sequences more. Forward and backward
    on one core, T=4096: one sequence and 64 of them, H=6, P=64, S=64: 123 and 195 ms with 32, 115 and 297 ms with
    64; H=64, P=64, S=128: 5.1 and 7.4 s with 32, 3.3 and 7.0 s with 64, 4.2 and 16.7 s with 128."""
    return 32 if x_THP.shape[2] * B_TGS.shape[2] <= 64 * 64 else 64


def _step_sizes(dt: Tensor, bias_H: Tensor | None, limit: tuple[float, float], dtype: torch.dtype) -> Tensor:
    raw = dt.to(dtype) if bias_H is None else dt.to(dtype) + bias_H.to(dtype)
    # torch's default threshold of 20 drops e^-20 = 2e-9, which fp64 would see
    return F.softplus(raw, threshold=40.0).clamp(limit[0], limit[1])


class _Chunks:
    """Which chunk and row holds each token, and which sequence each chunk belongs to."""

    def __init__(self, tokens: int, length: int, cu_seqlens: Tensor | None, device: torch.device) -> None:
        self.tokens, self.length = tokens, length
        self.slot_T: Tensor | None = None  # None: token t is row t
        if cu_seqlens is None:
            self.sequences, self.count = 1, -(-tokens // length)
            return
        self.sequences = cu_seqlens.shape[0] - 1
        # sum of ceil(n / length) over sequences of n tokens is at most this
        self.count = (tokens + self.sequences * (length - 1)) // length
        starts_Q, ends_Q = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        self.empty_Q = starts_Q == ends_Q
        chunk_ends_Q = ((ends_Q - starts_Q + length - 1) // length).cumsum(0)
        chunk_starts_Q = F.pad(chunk_ends_Q, (1, 0))[:-1]
        self.last_Q = (chunk_ends_Q - 1).clamp(min=0)
        token_T = torch.arange(tokens, device=device)
        sequence_T = torch.searchsorted(ends_Q, token_T, right=True)
        self.slot_T = token_T + (chunk_starts_Q * length - starts_Q).index_select(0, sequence_T)
        chunk_N = torch.arange(self.count, device=device)
        # chunks past the last one in use count as its sequence's and hold only zeros
        self.sequence_N = torch.searchsorted(chunk_ends_Q, chunk_N, right=True).clamp(max=self.sequences - 1)
        self.first_N = chunk_N == chunk_starts_Q.index_select(0, self.sequence_N)

    def pack(self, value_T: Tensor) -> Tensor:
        """(T, ...) to (N, L, ...), with zeros in the rows that hold no token."""
        rows = self.count * self.length
        if self.slot_T is not None:
            value_T = value_T.new_zeros(rows, *value_T.shape[1:]).index_copy_(0, self.slot_T, value_T)
        elif rows != self.tokens:
            value_T = torch.cat([value_T, value_T.new_zeros(rows - self.tokens, *value_T.shape[1:])])
        return value_T.unflatten(0, (self.count, self.length))

    def unpack(self, value_NL: Tensor) -> Tensor:
        rows = value_NL.flatten(0, 1)
        return rows[: self.tokens] if self.slot_T is None else rows.index_select(0, self.slot_T)

    def entering_states(self, added_NHPS: Tensor, decay_NH: Tensor, initial_QHPS: Tensor | None) -> Tensor:
        """The state before the first token of every chunk."""
        if self.slot_T is None:
            return _carry_states(added_NHPS, decay_NH, initial_QHPS, None)
        starts_NHPS = None if initial_QHPS is None else initial_QHPS.index_select(0, self.sequence_N)
        return _carry_states(added_NHPS, decay_NH, starts_NHPS, self.first_N)

    def final_states(
        self, entering_NHPS: Tensor, added_NHPS: Tensor, decay_NH: Tensor, initial_QHPS: Tensor | None
    ) -> Tensor:
        """The state after the last token of every sequence; of an empty one, the state it started with."""
        if self.slot_T is None:
            return torch.addcmul(added_NHPS[-1:], entering_NHPS[-1:], decay_NH[-1:, :, None, None])
        added, entering, decay = (
            v.index_select(0, self.last_Q) for v in (added_NHPS, entering_NHPS, decay_NH)
        )
        final_QHPS = torch.addcmul(added, entering, decay[..., None, None])
        start = torch.zeros_like(final_QHPS) if initial_QHPS is None else initial_QHPS
        return torch.where(self.empty_Q[:, None, None, None], start, final_QHPS)


def _log_decays(dt_NLH: Tensor, A_H: Tensor) -> Tensor:
    """The log decay from a chunk's start through each of its tokens, in fp64.

    The decay between two tokens is e to a difference of two such sums. After one large step both are large and
    close, and in fp32 their rounding would be most of what is left; the gradient cancels in the same way.
    """
    steps = dt_NLH.double() * A_H.double()
    return steps.clamp(min=LOWEST_LOG_DECAY[dt_NLH.dtype]).cumsum(1).transpose(1, 2)


def _inside_chunks(x_NLHP: Tensor, dt_NLH: Tensor, log_NHL: Tensor, B_NGLS: Tensor, C_NGLS: Tensor) -> Tensor:
    """What each token reads of the tokens up to itself in its own chunk."""
    length, heads, groups = dt_NLH.shape[1], dt_NLH.shape[2], B_NGLS.shape[1]
    future_LL = dt_NLH.new_full((length, length), -math.inf).triu(1)
    decay_NHLL = (log_NHL[..., :, None] - log_NHL[..., None, :]).to(x_NLHP.dtype).add_(future_LL).exp_()
    scores_NGLL = C_NGLS @ B_NGLS.transpose(2, 3)
    weights_NGRLL = decay_NHLL.unflatten(1, (groups, heads // groups)) * scores_NGLL[:, :, None]
    steps_NHLP = (x_NLHP * dt_NLH[..., None]).transpose(1, 2)
    return (weights_NGRLL.flatten(1, 2) @ steps_NHLP).transpose(1, 2)


def _states_added(x_NLHP: Tensor, dt_NLH: Tensor, log_NHL: Tensor, B_NGLS: Tensor) -> Tensor:
    """What each chunk's tokens leave in the state at its end."""
    to_end_NLH = (log_NHL[..., -1:] - log_NHL).exp().to(x_NLHP.dtype).transpose(1, 2)
    weighted_NLHP = x_NLHP * (dt_NLH * to_end_NLH)[..., None]
    grouped = weighted_NLHP.unflatten(2, (B_NGLS.shape[1], -1)).flatten(3)  # N, L, G, R P
    return (grouped.permute(0, 2, 3, 1) @ B_NGLS).view(-1, *x_NLHP.shape[2:], B_NGLS.shape[3])


def _from_states(entering_NHPS: Tensor, log_NHL: Tensor, C_NGLS: Tensor) -> Tensor:
    """What each token reads of the state that enters its chunk."""
    count, heads, head_dim, state = entering_NHPS.shape
    groups = C_NGLS.shape[1]
    read = C_NGLS @ entering_NHPS.view(count, groups, -1, state).transpose(2, 3)  # N, G, L, R P
    read_NLHP = read.unflatten(3, (heads // groups, head_dim)).transpose(1, 2).flatten(2, 3)
    return read_NLHP * log_NHL.exp().to(read.dtype).transpose(1, 2)[..., None]


@torch.library.custom_op("hebatron::_carry_states", mutates_args=())
def _carry_states(added: Tensor, decay: Tensor, starts: Tensor | None, first: Tensor | None) -> Tensor:
    """entering[n] = starts[n] if first[n] else decay[n-1] * entering[n-1] + added[n-1].

    One opaque op, because the loop would otherwise unroll in a compiled graph. `first` None is one sequence,
    `starts` None is zeros.
    """
    entering = torch.empty_like(added)
    zero = added.new_zeros(())
    factor = decay[..., None, None]
    entering[0] = zero if starts is None else starts[0]
    for n in range(1, added.shape[0]):
        torch.addcmul(added[n - 1], factor[n - 1], entering[n - 1], out=entering[n])
        if first is not None:
            start = zero if starts is None else starts[n]
            torch.where(first[n], start, entering[n], out=entering[n])
    return entering


@_carry_states.register_fake
def _(added: Tensor, decay: Tensor, starts: Tensor | None, first: Tensor | None) -> Tensor:
    return torch.empty_like(added)


@torch.library.custom_op("hebatron::_carry_states_bwd", mutates_args=())
def _carry_states_bwd(
    grad: Tensor, entering: Tensor, decay: Tensor, starts: Tensor | None, first: Tensor | None
) -> list[Tensor]:
    """The gradients of added, decay and starts (empty where starts is None)."""
    grad_added = torch.zeros_like(entering)
    grad_starts = grad.new_zeros(0) if starts is None else torch.zeros_like(starts)
    zero = grad.new_zeros(())
    factor = decay[..., None, None]
    total = grad[-1]  # of entering[n], with all that follows from it
    for n in reversed(range(1, entering.shape[0])):
        if first is None:
            grad_added[n - 1] = total
        else:
            torch.where(first[n], zero, total, out=grad_added[n - 1])
            if starts is not None:
                torch.where(first[n], total, zero, out=grad_starts[n])
        total = torch.addcmul(grad[n - 1], factor[n - 1], grad_added[n - 1])
    if starts is not None:
        grad_starts[0] = total
    return [grad_added, (grad_added * entering).sum((-1, -2)), grad_starts]


@_carry_states_bwd.register_fake
def _(
    grad: Tensor, entering: Tensor, decay: Tensor, starts: Tensor | None, first: Tensor | None
) -> list[Tensor]:
    grad_starts = grad.new_empty(0) if starts is None else torch.empty_like(starts)
    return [torch.empty_like(entering), torch.empty_like(decay), grad_starts]


def _save_carry(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, decay, starts, first = inputs
    ctx.save_for_backward(output, decay, starts, first)


def _carry_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    saved = ctx.saved_tensors  # once: under activation checkpointing they can be unpacked only once
    grad_added, grad_decay, grad_starts = _carry_states_bwd(grad, *saved)
    return grad_added, grad_decay, None if saved[2] is None else grad_starts, None


_carry_states.register_autograd(_carry_gradients, setup_context=_save_carry)

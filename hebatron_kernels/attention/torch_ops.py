"""Attention by torch's scaled_dot_product_attention (SDPA): every device and dtype, differentiable.

Packed documents are cut into segments (queries of one document and the keys they can see), segments of similar
length are padded into one batch, and each batch is one SDPA call. Under torch.compile, where lengths may not be read
on the host, one block-diagonal mask with static shapes does the same.

T query tokens, S key tokens, H query heads, Hk key/value heads, P head dim, B segments in a batch, Q sequences.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Segments up to this length share a padded call with those of the same power of two. Forward and backward of 4,096
# tokens, 6 heads of 32 over 2, processor time on one core, shared and one by one: 960 documents 30 and 119 ms, 343: 28
# and 52, 191: 33 and 38; with heads of 64, 173: 57 and 50. Limits of 32 to 256 are alike. Refused, by the clock of a
# loaded machine: all 203 documents padded to the longest, 516 ms for 84; a mask per row of 256 tokens, 129.
SHARED_LENGTH_TOKENS = 64
# Queries of a window or of a chunk with earlier keys go in blocks: a block's mask covers only the keys it can see.
QUERY_BLOCK_TOKENS = 512


class Segment(NamedTuple):
    """Queries [begin_q, end_q) of one document and the keys [begin_k, end_k) they may see, aligned at the end."""

    begin_q: int
    end_q: int
    begin_k: int
    end_k: int
    triangle: bool  # query i sees exactly keys 0..i: the form that needs no mask


def host_reads_attention_prefill(
    q_THP: Tensor, k_SHkP: Tensor, v_SHkP: Tensor, cu_seqlens_q: Tensor | None, *others: object
) -> str | None:
    return "cu_seqlens" if cu_seqlens_q is not None and q_THP.is_cuda else None


def attention_prefill(
    q_THP: Tensor,
    k_SHkP: Tensor,
    v_SHkP: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    if torch.compiler.is_compiling():
        return _attend_masked(q_THP, k_SHkP, v_SHkP, cu_seqlens_q, cu_seqlens_k, causal, scale, window)
    bounds_q = [0, q_THP.shape[0]] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    bounds_k = [0, k_SHkP.shape[0]] if cu_seqlens_k is None else cu_seqlens_k.tolist()
    groups = _group(_segments(bounds_q, bounds_k, causal, window))
    segments = [segment for group in groups for segment in group]
    if not segments:
        return _zeros(q_THP, k_SHkP, v_SHkP)

    # one permutation before and one after, and split between them: a slice's gradient is a whole tensor
    # of zeros (353 documents one by one: 640 ms for 169)
    order_q = _order([(s.begin_q, s.end_q) for s in segments], q_THP)
    order_k = _order([(s.begin_k, s.end_k) for s in segments], k_SHkP)
    tokens_q = [sum(s.end_q - s.begin_q for s in group) for group in groups]
    tokens_k = [sum(s.end_k - s.begin_k for s in group) for group in groups]
    pieces = zip(
        groups,
        _take(q_THP, order_q).split(tokens_q),
        _take(k_SHkP, order_k).split(tokens_k),
        _take(v_SHkP, order_k).split(tokens_k),
        strict=True,
    )
    outputs = [_attend_group(group, q, k, v, causal, scale, window) for group, q, k, v in pieces]
    o_THP = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (
        o_THP.contiguous() if order_q is None else q_THP.new_zeros(q_THP.shape).index_copy(0, order_q, o_THP)
    )


def attention_decode(
    q_QHP: Tensor,
    k_new_QHkP: Tensor,
    v_new_QHkP: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    Q, H, P = q_QHP.shape
    _, num_blocks, block_size, Hk, _ = cache.shape
    if Q == 0:
        return q_QHP.new_zeros(q_QHP.shape)
    rows_Q = torch.arange(Q, device=q_QHP.device)
    lengths_Q = lengths.long()
    page_Q = block_table[rows_Q, lengths_Q // block_size].long()
    cache[:, page_Q, lengths_Q % block_size] = torch.stack([k_new_QHkP, v_new_QHkP])

    max_blocks = block_table.shape[1]
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        max_blocks = int(lengths_Q.max()) // block_size + 1  # elsewhere reading it would wait for the device
    # entries past a sequence's end may be anything, and so may the memory of unwritten slots
    pages_QN = block_table[:, :max_blocks].long().clamp(0, num_blocks - 1)
    positions_S = torch.arange(max_blocks * block_size, device=q_QHP.device)
    visible_QS = positions_S <= lengths_Q[:, None]
    if window is not None:
        visible_QS &= positions_S > lengths_Q[:, None] - window
    pages = cache[:, pages_QN].reshape(2, Q, -1, Hk, P)
    k_QHkSP, v_QHkSP = pages.masked_fill(~visible_QS[None, :, :, None, None], 0.0).transpose(2, 3)
    # the query heads of one kv head are its "queries": no copy of the keys per head
    o_QHkGP = F.scaled_dot_product_attention(
        q_QHP.reshape(Q, Hk, H // Hk, P),
        k_QHkSP,
        v_QHkSP,
        attn_mask=visible_QS[:, None, None, :],
        scale=scale,
    )
    return o_QHkGP.reshape(Q, H, P)


def _segments(bounds_q: list[int], bounds_k: list[int], causal: bool, window: int | None) -> list[Segment]:
    segments = []
    for begin_q, end_q, begin_k, end_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        length_q, length_k = end_q - begin_q, end_k - begin_k
        if length_q == 0:
            continue
        if not causal or (length_q == length_k and (window is None or window >= length_k)):
            segments.append(Segment(begin_q, end_q, begin_k, end_k, triangle=causal))
            continue
        for begin in range(0, length_q, QUERY_BLOCK_TOKENS):
            end = min(begin + QUERY_BLOCK_TOKENS, length_q)
            last = max(0, length_k - length_q + end)  # keys seen by the block's last query
            first = 0 if window is None else max(0, length_k - length_q + begin - window + 1)
            segments.append(
                Segment(
                    begin_q + begin, begin_q + end, begin_k + min(first, last), begin_k + last, triangle=False
                )
            )
    return segments


def _group(segments: list[Segment]) -> list[list[Segment]]:
    """Segments that share one call: short ones of the same form and power of two; a long one is alone."""
    groups: dict[tuple[int, ...], list[Segment]] = {}
    for n, s in enumerate(segments):
        length_q, length_k = s.end_q - s.begin_q, s.end_k - s.begin_k
        if max(length_q, length_k) > SHARED_LENGTH_TOKENS:
            key: tuple[int, ...] = (n,)
        else:
            key = (s.triangle, (length_q - 1).bit_length(), (length_k - 1).bit_length())
        groups.setdefault(key, []).append(s)
    return list(groups.values())


def _attend_group(
    group: list[Segment],
    q_NHP: Tensor,
    k_MHkP: Tensor,
    v_MHkP: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    lengths_q = [s.end_q - s.begin_q for s in group]
    lengths_k = [s.end_k - s.begin_k for s in group]
    if max(lengths_k) == 0:
        return _zeros(q_NHP, k_MHkP, v_MHkP)
    slots_q, slots_k = _slots(lengths_q, q_NHP.device), _slots(lengths_k, q_NHP.device)
    q_BHLP, k_BHkLP, v_BHkLP = (
        _pad(x, len(group), max(lengths), slots)
        for x, lengths, slots in (
            (q_NHP, lengths_q, slots_q),
            (k_MHkP, lengths_k, slots_k),
            (v_MHkP, lengths_k, slots_k),
        )
    )
    if group[0].triangle:  # padding stands after every real query, so the triangle hides it
        o_BHLP = _sdpa(q_BHLP, k_BHkLP, v_BHkLP, None, True, scale)
    elif not causal and slots_k is None:
        o_BHLP = _sdpa(q_BHLP, k_BHkLP, v_BHkLP, None, False, scale)
    else:
        length_q_B11 = torch.tensor(lengths_q, device=q_NHP.device)[:, None, None]
        length_k_B11 = torch.tensor(lengths_k, device=q_NHP.device)[:, None, None]
        row_L1 = torch.arange(max(lengths_q), device=q_NHP.device)[:, None]
        row_1L = torch.arange(max(lengths_k), device=q_NHP.device)[None, :]
        visible_BLL = (row_1L < length_k_B11).expand(-1, max(lengths_q), -1)
        if causal:
            visible_BLL = visible_BLL & _recent(row_L1 + length_k_B11 - length_q_B11, row_1L, window)
        o_BHLP = _sdpa_visible(q_BHLP, k_BHkLP, v_BHkLP, visible_BLL, scale)
    o_NHP = o_BHLP.transpose(1, 2).flatten(0, 1)
    return o_NHP if slots_q is None else o_NHP.index_select(0, slots_q)


def _attend_masked(
    q_THP: Tensor,
    k_SHkP: Tensor,
    v_SHkP: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Everything in one call: O(T S) work and mask, but no length is read on the host."""
    T, S = q_THP.shape[0], k_SHkP.shape[0]
    if T == 0 or S == 0:
        return _zeros(q_THP, k_SHkP, v_SHkP)
    q_1HTP, k_1HkSP, v_1HkSP = (x.transpose(0, 1)[None] for x in (q_THP, k_SHkP, v_SHkP))
    row_T = torch.arange(T, device=q_THP.device)
    row_S = torch.arange(S, device=q_THP.device)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        if not causal or (window is None and T == S):
            return _sdpa(q_1HTP, k_1HkSP, v_1HkSP, None, causal, scale)[0].transpose(0, 1).contiguous()
        visible_TS = _recent(row_T[:, None] + S - T, row_S, window)
    else:
        ends_q, ends_k = cu_seqlens_q[1:].long(), cu_seqlens_k[1:].long()
        document_T = torch.searchsorted(ends_q, row_T, right=True)
        document_S = torch.searchsorted(ends_k, row_S, right=True)
        visible_TS = document_T[:, None] == document_S
        if causal:  # a query's place among all keys: its document's last query stands at its last key
            visible_TS = visible_TS & _recent((row_T + (ends_k - ends_q)[document_T])[:, None], row_S, window)
    return _sdpa_visible(q_1HTP, k_1HkSP, v_1HkSP, visible_TS[None], scale)[0].transpose(0, 1).contiguous()


def _recent(position_q: Tensor, position_k: Tensor, window: int | None) -> Tensor:
    """Keys at or before the query, the most recent `window` of them."""
    visible = position_k <= position_q
    return visible if window is None else visible & (position_k > position_q - window)


def _sdpa_visible(
    q_BHLP: Tensor, k_BHkLP: Tensor, v_BHkLP: Tensor, visible_BLL: Tensor, scale: float | None
) -> Tensor:
    """SDPA under a mask. A query that sees nothing is let see everything and its output set to 0 afterwards: torch
    2.13's CPU kernels give 0 by themselves, but a softmax over nothing is NaN by its formula and no torch promises."""
    sees_none_BL1 = ~visible_BLL.any(2, keepdim=True)
    o_BHLP = _sdpa(q_BHLP, k_BHkLP, v_BHkLP, (visible_BLL | sees_none_BL1)[:, None], False, scale)
    return o_BHLP.masked_fill(sees_none_BL1[:, None], 0.0)


def _sdpa(
    q_BHLP: Tensor, k_BHkLP: Tensor, v_BHkLP: Tensor, mask: Tensor | None, triangle: bool, scale: float | None
) -> Tensor:
    heads_per_kv = q_BHLP.shape[1] // k_BHkLP.shape[1]
    if heads_per_kv > 1 and q_BHLP.device.type != "cpu":
        # On CUDA only the flash kernel takes enable_gqa: fp32 or a mask would fall to the unfused form.
        k_BHkLP, v_BHkLP = (x.repeat_interleave(heads_per_kv, dim=1) for x in (k_BHkLP, v_BHkLP))
        heads_per_kv = 1
    return F.scaled_dot_product_attention(
        q_BHLP, k_BHkLP, v_BHkLP, mask, is_causal=triangle, scale=scale, enable_gqa=heads_per_kv > 1
    )


def _zeros(q_THP: Tensor, k_SHkP: Tensor, v_SHkP: Tensor) -> Tensor:
    """Zeros like q with a gradient (of zeros) to all three, NaN in them or not."""
    return q_THP.new_zeros(q_THP.shape) + (q_THP[:0].sum() + k_SHkP[:0].sum() + v_SHkP[:0].sum())


def _rows(spans: list[tuple[int, int]], device: torch.device) -> Tensor:
    """The row numbers of spans [begin, end), one span after another."""
    begins_B, ends_B = torch.tensor(spans).T
    lengths_B = ends_B - begins_B
    shifts_B = begins_B - (lengths_B.cumsum(0) - lengths_B)
    return (torch.arange(int(lengths_B.sum())) + shifts_B.repeat_interleave(lengths_B)).to(device)


def _order(spans: list[tuple[int, int]], x_THP: Tensor) -> Tensor | None:
    """The rows of x that the spans name; None where they are all of them in order."""
    stops = [0] + [end for _, end in spans]
    if [begin for begin, _ in spans] == stops[:-1] and stops[-1] == x_THP.shape[0]:
        return None
    return _rows(spans, x_THP.device)


def _take(x_THP: Tensor, order: Tensor | None) -> Tensor:
    return x_THP if order is None else x_THP.index_select(0, order)


def _slots(lengths: list[int], device: torch.device) -> Tensor | None:
    """Where each row goes in a batch padded to the longest; None where nothing is padded."""
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    return _rows([(n * longest, n * longest + length) for n, length in enumerate(lengths)], device)


def _pad(x_NHP: Tensor, batch: int, length: int, slots_N: Tensor | None) -> Tensor:
    if slots_N is not None:
        x_NHP = x_NHP.new_zeros(batch * length, *x_NHP.shape[1:]).index_copy(0, slots_N, x_NHP)
    return x_NHP.unflatten(0, (batch, length)).transpose(1, 2)

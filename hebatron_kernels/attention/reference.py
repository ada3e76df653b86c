"""Attention by its definition: one sequence and one head at a time, softmax written out, everything in fp64.

T query tokens, S key tokens, H query heads, Hk key/value heads, P head dim, Q sequences. Slow on purpose: it is
what the other forms are compared with, so it shares no code with them.
"""

import math

import torch
from torch import Tensor


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
    T, H, P = q_THP.shape
    S, Hk, _ = k_SHkP.shape
    bounds_q = [0, T] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    if cu_seqlens_k is not None:
        bounds_k = cu_seqlens_k.tolist()
    else:
        bounds_k = [0, S] if cu_seqlens_q is None else bounds_q
    scale = 1.0 / math.sqrt(P) if scale is None else scale

    outputs = []
    for begin_q, end_q, begin_k, end_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        visible_LqLk = _visible(end_q - begin_q, end_k - begin_k, causal, window).to(q_THP.device)
        heads = []
        for h in range(H):
            kv_head = h // (H // Hk)
            q_LqP = q_THP[begin_q:end_q, h].double()
            k_LkP = k_SHkP[begin_k:end_k, kv_head].double()
            v_LkP = v_SHkP[begin_k:end_k, kv_head].double()
            heads.append(_attend(q_LqP, k_LkP, v_LkP, visible_LqLk, scale))
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs).to(q_THP.dtype) if outputs else q_THP.clone()


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
    block_size = cache.shape[2]
    outputs = []
    for n in range(q_QHP.shape[0]):
        length = int(lengths[n])
        pages = [int(block_table[n, p // block_size]) for p in range(length + 1)]
        slots = [p % block_size for p in range(length + 1)]
        cache[0, pages[-1], slots[-1]] = k_new_QHkP[n]
        cache[1, pages[-1], slots[-1]] = v_new_QHkP[n]
        keys_SHkP = torch.stack([cache[0, page, slot] for page, slot in zip(pages, slots, strict=True)])
        values_SHkP = torch.stack([cache[1, page, slot] for page, slot in zip(pages, slots, strict=True)])
        outputs.append(
            attention_prefill(q_QHP[n : n + 1], keys_SHkP, values_SHkP, scale=scale, window=window)
        )
    return torch.cat(outputs) if outputs else torch.zeros_like(q_QHP)


def _visible(length_q: int, length_k: int, causal: bool, window: int | None) -> Tensor:
    """(Lq, Lk) bool: may query i see key j? The last query stands at the last key, whatever the lengths."""
    visible = torch.zeros(length_q, length_k, dtype=torch.bool)
    for i in range(length_q):
        position = length_k - length_q + i  # of query i among the keys; negative: it comes before all of them
        last = position if causal else length_k - 1
        first = 0 if window is None else max(0, position - window + 1)
        visible[i, first : max(last + 1, 0)] = True
    return visible


def _attend(q_LqP: Tensor, k_LkP: Tensor, v_LkP: Tensor, visible_LqLk: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the visible keys; a query that sees none gives 0."""
    if k_LkP.shape[0] == 0:
        return q_LqP * 0.0
    scores_LqLk = torch.where(visible_LqLk, scale * (q_LqP @ k_LkP.T), -math.inf)
    largest_Lq1 = scores_LqLk.detach().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
    weights_LqLk = torch.exp(scores_LqLk - largest_Lq1)
    total_Lq1 = weights_LqLk.sum(dim=1, keepdim=True)
    sees_none_Lq1 = ~visible_LqLk.any(dim=1, keepdim=True)
    return (weights_LqLk @ v_LkP) / torch.where(sees_none_Lq1, 1.0, total_Lq1)

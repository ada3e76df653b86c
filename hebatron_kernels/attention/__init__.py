"""Causal attention with grouped heads: over packed sequences (prefill) and one token at a time over a paged cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from .._dispatch import Operator
from . import native, reference, torch_ops

__all__ = ["attention_decode", "attention_prefill"]

INT32 = (torch.int32,)


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _fake_keep(q: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (q.new_empty(q.shape[:2], dtype=torch.float32),)


_attention_prefill = Operator(
    "attention_prefill",
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, float? scale, int? window",
    "Tensor",
    {"native": native, "torch": torch_ops, "reference": reference, "emulator": native},
    _fake,
    fake_keep=_fake_keep,
    keep_results=True,
)

_attention_decode = Operator(
    "attention_decode",
    "Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) cache, Tensor block_table, Tensor lengths, "
    "float? scale, int? window",
    "Tensor",
    {"native": native, "torch": torch_ops, "reference": reference, "emulator": native},
    _fake,
    differentiable=False,
)


def attention_prefill(
    q_THP: Tensor,
    k_SHkP: Tensor,
    v_SHkP: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """o = softmax(scale q k^T) v over the keys a query may see; query head h reads key/value head h // (H / Hk).

    The last query of a sequence stands at its last key, so a chunk of queries may follow keys that came before it.

    Args:
        q_THP: (T query tokens, H heads, P head dim), any floating dtype, any strides.
        k_SHkP: (S key tokens, Hk heads, P), the dtype of q; H is a multiple of Hk.
        v_SHkP: like k_SHkP.
        cu_seqlens_q: int32 (Q+1,), where each sequence's queries begin, ending with T; None is one sequence.
            Sequences never see one another and may be empty.
        cu_seqlens_k: the same for the keys, ending with S; None is cu_seqlens_q.
        causal: a query sees no key after its own place.
        scale: > 0; None is 1 / sqrt(P).
        window: the number of most recent keys a query sees, its own among them; None is all. Needs causal.

    Returns:
        o_THP in the dtype of q. A query that sees no key (its sequence has fewer keys than queries) gives 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To q, k and v; first order.

    Backends:
        native: C++, fp32 and bf16 (fp32 scores and sums), memory linear in the lengths. A query's result is the same to
        the bit alone, packed, in chunks and beside any other; the gradients do not depend on the threads. CUDA, fp32
        and bf16, head dims up to 256 (bf16: multiples of 8, with gradients up to 128): cu_seqlens is read on the GPU
        and trusted; the same bits every run.
        torch: SDPA on batches of segments of like length, every dtype and device; it reads cu_seqlens on the host
        (on a GPU that waits for it), except under torch.compile, where one T x S mask serves instead. NaN in one
        sequence stays in it, but for that compiled form. reference: fp64, softmax written out, loops.

    Source:
        Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245. The model
        uses no positional encoding, 32 heads over 2, P = 128 and no window (Nemotron-3-Nano's config.json).
    """
    op = "attention_prefill"
    check.tensor(op, "q_THP", q_THP, None, None, None)
    tokens, heads, head_dim = q_THP.shape
    check.tensor(op, "k_SHkP", k_SHkP, None, None, head_dim, dtypes=(q_THP.dtype,))
    check.tensor(op, "v_SHkP", v_SHkP, *k_SHkP.shape, dtypes=(q_THP.dtype,))
    _check_heads(op, "k_SHkP", heads, k_SHkP.shape[1], head_dim)
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        check.refuse(op, "cu_seqlens_k", "be None when cu_seqlens_q is None", check.describe(cu_seqlens_k))
    if cu_seqlens_q is not None and cu_seqlens_k is None and k_SHkP.shape[0] != tokens:
        check.refuse(op, "cu_seqlens_k", f"be given when {tokens} queries meet {k_SHkP.shape[0]} keys", None)
    check.cu_seqlens(op, cu_seqlens_q, tokens, "cu_seqlens_q")
    check.cu_seqlens(op, cu_seqlens_k, k_SHkP.shape[0], "cu_seqlens_k")
    check.same_device(
        op, q_THP, k_SHkP=k_SHkP, v_SHkP=v_SHkP, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    if cu_seqlens_k is not None and check.sequences(cu_seqlens_k) != check.sequences(cu_seqlens_q):
        sequences = check.sequences(cu_seqlens_q)
        check.refuse(
            op, "cu_seqlens_k", f"name {sequences} sequences like cu_seqlens_q", check.describe(cu_seqlens_k)
        )
    check.truth(op, causal=causal)
    if window is not None and not causal:
        check.refuse(op, "window", "be None when causal is False", window)
    _check_scale_window(op, scale, window)
    if cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = None  # Dynamo refuses an autograd.Function that gets one tensor twice
    return _attention_prefill(
        q_THP, k_SHkP, v_SHkP, cu_seqlens_q, cu_seqlens_k, causal, scale, window, backend=backend
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
    *,
    backend: str | None = None,
) -> Tensor:
    """Writes one new key and value per sequence into the cache, in place, then o = softmax(scale q k^T) v over them.

    Args:
        q_QHP: (Q sequences, H heads, P head dim), one query token each, any floating dtype.
        k_new_QHkP: (Q, Hk, P), the dtype of q; H is a multiple of Hk.
        v_new_QHkP: like k_new_QHkP.
        cache: (2, num_blocks, block_size, Hk, P), keys then values, the dtype of q. Token t of sequence n lives in
            block block_table[n, t // block_size], row t % block_size. Memory no token was written to may hold
            anything, NaN included.
        block_table: int32 (Q, max_blocks); entries past a sequence's last block may be anything.
        lengths: int32 (Q,), tokens in the cache before this one, so that the new one is written at that position.
        scale: > 0; None is 1 / sqrt(P).
        window: the number of most recent keys seen, the new one among them; None is all.

    Returns:
        o_QHP in the dtype of q.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or requires a gradient; on the CPU also
            a length or a block outside the tables and two sequences that write the same row. Nothing is written then.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        None: the cache is updated in place.

    Backends:
        native: C++, fp32 and bf16; a sequence's result does not depend on the others. CUDA, bf16, head dims that are
        multiples of 8 up to 256: the table and the lengths are read on the GPU and trusted.
        torch: gathers each sequence's blocks, then SDPA; every dtype and device. reference: fp64, loops.

    Source:
        Paged keys and values: Kwon et al. 2023, arXiv 2309.06180, section 4.
    """
    op = "attention_decode"
    check.tensor(op, "q_QHP", q_QHP, None, None, None)
    sequences, heads, head_dim = q_QHP.shape
    dtypes = (q_QHP.dtype,)
    check.tensor(op, "k_new_QHkP", k_new_QHkP, sequences, None, head_dim, dtypes=dtypes)
    kv_heads = k_new_QHkP.shape[1]
    _check_heads(op, "k_new_QHkP", heads, kv_heads, head_dim)
    check.tensor(op, "v_new_QHkP", v_new_QHkP, sequences, kv_heads, head_dim, dtypes=dtypes)
    check.tensor(op, "cache", cache, 2, None, None, kv_heads, head_dim, dtypes=dtypes)
    check.tensor(op, "block_table", block_table, sequences, None, dtypes=INT32)
    check.tensor(op, "lengths", lengths, sequences, dtypes=INT32)
    check.same_device(
        op,
        q_QHP,
        k_new_QHkP=k_new_QHkP,
        v_new_QHkP=v_new_QHkP,
        cache=cache,
        block_table=block_table,
        lengths=lengths,
    )
    _check_scale_window(op, scale, window)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_blocks(op, cache, block_table, lengths)
    return _attention_decode(
        q_QHP, k_new_QHkP, v_new_QHkP, cache, block_table, lengths, scale, window, backend=backend
    )


def _check_heads(op: str, arg: str, heads: int, kv_heads: int, head_dim: int) -> None:
    if heads == 0 or head_dim == 0:
        check.refuse(op, "q", "have heads and a head dim > 0", (heads, head_dim))
    if kv_heads == 0 or heads % kv_heads:
        check.refuse(op, arg, f"have a number of heads that divides the {heads} of q", kv_heads)


def _check_scale_window(op: str, scale: float | None, window: int | None) -> None:
    if scale is not None:
        check.positive(op, scale=scale)
    if window is not None:
        check.positive(op, window=window)
        check.integer(op, window=window)


def _check_blocks(op: str, cache: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """What a kernel could only meet by reading or writing someone else's memory."""
    num_blocks, block_size = cache.shape[1:3]
    if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape)):
        check.refuse(op, "cache", "not be expanded (its blocks share memory)", f"strides {cache.stride()}")
    capacity = block_table.shape[1] * block_size
    written = set()
    for n, (length, blocks) in enumerate(zip(lengths.tolist(), block_table.tolist(), strict=True)):
        if not 0 <= length < capacity:
            check.refuse(
                op, f"lengths[{n}]", f"be in [0, {capacity}), {block_table.shape[1]} blocks a row", length
            )
        used = blocks[: length // block_size + 1]
        if min(used) < 0 or max(used) >= num_blocks:
            check.refuse(
                op, f"block_table[{n}]", f"name blocks in [0, {num_blocks}) for its {length + 1} tokens", used
            )
        written.add((used[-1], length % block_size))
    if len(written) < len(lengths):
        check.refuse(op, "block_table", "give each sequence a row of its own to write", block_table.tolist())

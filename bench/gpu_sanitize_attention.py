"""Attention's cases for bench/gpu_sanitize.py: ragged and small, compared with numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def attend(q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
    """One query head (P) over (S, P) keys and values."""
    scores = (k @ q) * scale
    weights = np.exp(scores - scores.max())
    return (weights @ v) / weights.sum()


def decode_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    """Two heads a kv head and twenty; lengths that end in a warp's keys, and a table that is cut into parts."""
    for lengths, heads, kv_heads, head_dim, block_size, blocks in (
        ((0, 15, 70), 4, 2, 8, 5, 20),
        ((33, 64), 20, 1, 72, 16, 6),
        ((9, 40), 2, 1, 136, 64, 1),
        ((700, 3), 2, 1, 64, 64, 12),
    ):
        sequences = len(lengths)
        table = random.permutation(sequences * blocks).reshape(sequences, blocks).astype(np.int32)
        shape = (sequences * blocks, block_size, kv_heads, head_dim)
        q, k_new, v_new = (
            run.rounded(random.standard_normal((sequences, n, head_dim)).astype(np.float32))
            for n in (heads, kv_heads, kv_heads)
        )
        keys, values = (run.rounded(random.standard_normal(shape).astype(np.float32)) for _ in "kv")
        o = run.output(sequences, heads, head_dim)
        run.call(
            "attention_decode",
            sequences=sequences,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            max_blocks=blocks,
            window=blocks * block_size + 1,
            scale=head_dim**-0.5,
            dtype=run.dtype,
            workers=1,
            q=run.put(q),
            q_stride=heads * head_dim,
            q_head_stride=head_dim,
            k_new=run.put(k_new),
            k_new_stride=kv_heads * head_dim,
            k_new_head_stride=head_dim,
            v_new=run.put(v_new),
            v_new_stride=kv_heads * head_dim,
            v_new_head_stride=head_dim,
            keys=run.put(keys),
            values=run.put(values),
            block_stride=block_size * kv_heads * head_dim,
            row_stride=kv_heads * head_dim,
            head_stride=head_dim,
            block_table=run.card.put(table),
            lengths=run.card.put(np.array(lengths, np.int32)),
            o=o,
        )
        want = np.empty((sequences, heads, head_dim), np.float32)
        for n, length in enumerate(lengths):
            pages = [pool[table[n]].reshape(-1, kv_heads, head_dim)[:length] for pool in (keys, values)]
            k, v = (np.concatenate([page, new[n][None]]) for page, new in zip(pages, (k_new, v_new)))
            for head in range(heads):
                of = head * kv_heads // heads
                want[n, head] = attend(q[n, head], k[:, of], v[:, of], head_dim**-0.5)
        run.compare("o", o, want)
        yield f"{sequences} sequences, {heads} heads over {kv_heads} of {head_dim}"


def prefill_cases(
    run: Any, random: np.random.Generator, backward: bool, head_dims: tuple[int, int] = (8, 72)
) -> Iterator[str]:
    """Sequences past a tile, without keys, without queries, a chunk behind its keys; a window; an odd head dim."""
    for lengths_q, lengths_k, heads, kv_heads, head_dim, window in (
        ((5, 0, 70), (5, 3, 70), 4, 2, head_dims[0], 1000),
        ((3, 40, 2), (0, 150, 2), 2, 1, head_dims[1], 60),
    ):
        ends_q, ends_k = (np.cumsum([0, *lengths]).astype(np.int32) for lengths in (lengths_q, lengths_k))
        tokens_q, tokens_k, scale = int(ends_q[-1]), int(ends_k[-1]), head_dim**-0.5
        q, k, v, grad_o = (
            run.rounded(random.standard_normal((tokens, n, head_dim)).astype(np.float32))
            for tokens, n in (
                (tokens_q, heads),
                (tokens_k, kv_heads),
                (tokens_k, kv_heads),
                (tokens_q, heads),
            )
        )
        o, lse = run.output(*q.shape), run.card.empty(4 * tokens_q * heads)
        given = {
            "tokens_q": tokens_q,
            "tokens_k": tokens_k,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "sequences": len(lengths_q),
            "causal": 1,
            "window": window,
            "scale": scale,
            "dtype": run.dtype,
            "workers": 1,
            "q": run.put(q),
            "q_stride": heads * head_dim,
            "q_head_stride": head_dim,
            "k": run.put(k),
            "k_stride": kv_heads * head_dim,
            "k_head_stride": head_dim,
            "v": run.put(v),
            "v_stride": kv_heads * head_dim,
            "v_head_stride": head_dim,
            "cu_seqlens_q": run.card.put(ends_q),
            "cu_seqlens_k": run.card.put(ends_k),
            "o": o,
            "lse": lse,
        }
        run.call("attention_prefill_fwd", **given)
        want = [np.zeros(x.shape, np.float32) for x in (q, q, k, v)]  # o and the gradients
        for n in range(len(lengths_q)):
            rows, keys = slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])
            age = np.arange(lengths_q[n])[:, None] + lengths_k[n] - lengths_q[n] - np.arange(lengths_k[n])
            seen = (age >= 0) & (age < window)
            for head in range(heads):
                of = head * kv_heads // heads
                _head(want, (rows, head), (keys, of), q, k, v, grad_o, seen, scale)
        run.compare("o", o, want[0])
        if backward:
            grads = [run.output(*x.shape) for x in (q, k, v)]
            named = dict(zip(("grad_q", "grad_k", "grad_v"), grads))
            run.call("attention_prefill_bwd", **given, **named, grad_o=run.put(grad_o))
            for name, pointer, expected in zip(named, grads, want[1:]):
                run.compare(name, pointer, expected)
        yield f"{lengths_q} queries, {lengths_k} keys, {heads} heads over {kv_heads} of {head_dim}"


def _head(
    want: list[Floats],
    query: tuple[slice, int],
    key: tuple[slice, int],
    q: Floats,
    k: Floats,
    v: Floats,
    grad_o: Floats,
    seen: NDArray[np.bool_],
    scale: float,
) -> None:
    """Adds one query head of one sequence to the results wanted."""
    weights = np.exp(q[query] @ k[key].T * scale) * seen
    total = weights.sum(1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    o = weights @ v[key]
    ds = weights * (grad_o[query] @ v[key].T - (o * grad_o[query]).sum(1, keepdims=True)) * scale
    want[0][query] = o
    want[1][query] = ds @ k[key]
    want[2][key] += ds.T @ q[query]
    want[3][key] += weights.T @ grad_o[query]


# each kernel's cases, and the dtypes they run in
CASES: dict[str, tuple[Callable[[Any, np.random.Generator], Iterator[str]], tuple[str, ...]]] = {
    "attention": (partial(prefill_cases, backward=False), ("bfloat16", "float32")),
    "attention_bwd": (partial(prefill_cases, backward=True), ("bfloat16", "float32")),
    "attention_sm90": (partial(prefill_cases, backward=False, head_dims=(128, 128)), ("bfloat16",)),
    "attention_decode": (decode_cases, ("bfloat16",)),
}

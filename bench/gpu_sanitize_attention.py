"""Attention's cases for bench/gpu_sanitize.py: ragged and small, compared with numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


# each kernel's cases, and the dtypes they run in
CASES: dict[str, tuple[Callable[[Any, np.random.Generator], Iterator[str]], tuple[str, ...]]] = {
    "attention_decode": (decode_cases, ("bfloat16",)),
}

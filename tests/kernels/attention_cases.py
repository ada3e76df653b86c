"""The problems on which every form of attention is tested."""

from itertools import accumulate

import torch


def cu(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def make(tokens, keys=None, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64):
    keys = tokens if keys is None else keys
    return [
        torch.randn(n, h, head_dim, dtype=dtype)
        for n, h in ((tokens, heads), (keys, kv_heads), (keys, kv_heads))
    ]


def packed(lengths_q, lengths_k=None, dtype=torch.float64, **kwargs):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    q, k, v = make(sum(lengths_q), sum(lengths_k), dtype=dtype, **kwargs)
    return [q, k, v, cu(lengths_q), cu(lengths_k)]


# causal, window: all keys, itself only, a few, more than there are
MASKS = [(True, None), (False, None), (True, 1), (True, 3), (True, 100)]
# query lengths, key lengths (None: the same): one token; empty documents first, inside and last; like lengths that
# share a call and a long one that does not; chunks behind their keys; fewer keys than queries; no keys; no queries
PACKS = [
    ([1], None),
    ([0, 5, 1, 0, 7, 6, 12, 3, 2, 0], None),
    ([5, 1, 0, 7, 13, 3, 3], [9, 4, 3, 7, 30, 3, 4]),
    ([5, 4, 3], [2, 0, 1]),
    ([6], [0]),
    ([0], [4]),
]


def paged(lengths, block_size=4, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64):
    """Sequences of these lengths in a cache of shuffled blocks; everything not written is NaN, every unused entry
    of the block table points outside. Returns the decode arguments for one more token, and the whole k and v."""
    max_blocks = max(lengths, default=0) // block_size + 2
    num_blocks = max_blocks * len(lengths) + 2
    cache = torch.full((2, num_blocks, block_size, kv_heads, head_dim), float("nan"), dtype=dtype)
    free = torch.randperm(num_blocks).tolist()
    table = torch.full((len(lengths), max_blocks), 1000, dtype=torch.int32)
    table[:, -1] = -1
    wholes = []
    for n, length in enumerate(lengths):
        whole = torch.randn(2, length + 1, kv_heads, head_dim, dtype=dtype)
        for b in range(length // block_size + 1):
            table[n, b] = free.pop()
            rows = whole[:, b * block_size : min(length, (b + 1) * block_size)]
            cache[:, table[n, b], : rows.shape[1]] = rows
        wholes.append(whole)
    q = torch.randn(len(lengths), heads, head_dim, dtype=dtype)
    new = (
        torch.stack([w[:, -1] for w in wholes], 1)
        if wholes
        else torch.empty(2, 0, kv_heads, head_dim, dtype=dtype)
    )
    return [q, new[0], new[1], cache, table, torch.tensor(lengths, dtype=torch.int32)], wholes


# an empty sequence, one token, the last row of a block, the first of the next, longer than any other
LENGTHS = [0, 1, 3, 4, 17]

"""Random problems of every operator, each made from one seed: sizes, layouts, dtypes, options, packed documents."""

import random
from itertools import accumulate

import torch
from attention_cases import paged

from hebatron_kernels import testing

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Draw(random.Random):
    """The choices of one problem. Sizes are small, for the oracles go token by token; a few stand at the edges of
    vectors, panels and blocks."""

    def size(self, *edges, low=1, high=9):
        return self.choice(edges) if edges and self.random() < 0.2 else self.randint(low, high)

    def maybe(self, make, share=0.5):
        return make() if self.random() < share else None

    def dtype(self, *others):
        return self.choice([FP32, BF16]) if self.random() < 0.9 or not others else self.choice(others)

    def parameter(self, dtype):
        """Of a tensor that may come in fp32 beside half-precision tokens."""
        return self.choice([dtype, FP32]) if dtype in (BF16, FP16) else dtype

    def noise(self, *shape, dtype, scale=1.0, layout=True):
        x = (torch.randn(shape, dtype=FP64) * scale).to(dtype)
        return self.laid_out(x) if layout else x

    def laid_out(self, x):
        """The same values: as they are, as a slice between NaN, as every second row, or with the first two dimensions
        exchanged in memory (of a matrix, that only the torch form takes)."""
        kind = self.choice(["plain"] * 4 + ["slice"] * 3 + ["rows"] * 2 + ["exchanged"])
        if kind == "slice" and x.is_floating_point():
            return testing.strided(x, self.randint(2, 9))
        if kind == "rows":
            return x.repeat_interleave(2, 0)[::2]
        if kind == "exchanged" and x.dim() > 1:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return x

    def lengths(self, *edges):
        """Tokens of each document; some have none, sometimes all, sometimes there is no document."""
        count = self.choice([0, 1, 1, 2, 2, 3, 5])
        return [self.choice([0, 1, self.size(*edges, low=2, high=12)]) for _ in range(count)]

    def packed(self, *edges):
        """Tokens, cu_seqlens or None, sequences."""
        lengths = self.lengths(*edges)
        if len(lengths) == 1 and self.random() < 0.6:
            return lengths[0], None, 1
        return sum(lengths), self.ends(lengths), len(lengths)

    def ends(self, lengths):
        return self.laid_out(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))


def rms_norm(draw):
    dtype = draw.dtype(FP16, FP64)
    group = draw.size(16, 17, 33, 64, 130, low=2)
    width = group * draw.choice([1, 1, 2, 3])
    rows = draw.size(0, 70)
    x, residual, gate = (
        draw.noise(rows, width, dtype=dtype, scale=draw.choice([1, 1, 20])) for _ in range(3)
    )
    weight = draw.noise(width, dtype=draw.parameter(dtype))
    eps = draw.choice([1e-5, 1e-6, 0.1])
    group = group if group < width or draw.random() < 0.5 else None
    return [x, weight, eps, draw.maybe(lambda: residual), draw.maybe(lambda: gate), group]


def causal_conv1d(draw):
    dtype = draw.dtype(FP16, FP64)
    tokens, cu_seqlens, sequences = draw.packed(64, 70)
    channels, taps = draw.size(16, 33, 65), draw.choice([1, 2, 3, 4, 4, 4, 5, 16, 17])
    return [
        draw.noise(tokens, channels, dtype=dtype),
        draw.noise(channels, taps, dtype=draw.parameter(dtype)),
        draw.maybe(lambda: draw.noise(channels, dtype=draw.parameter(dtype))),
        draw.choice(["silu", "silu", None]),
        cu_seqlens,
        draw.maybe(lambda: draw.noise(sequences, channels, taps - 1, dtype=dtype)),
    ]


def causal_conv1d_update(draw):
    dtype = draw.dtype(FP16, FP64)
    rows, channels, taps = draw.size(0, low=1), draw.size(16, 33, 65), draw.choice([1, 2, 4, 4, 16])
    return [
        draw.noise(rows, channels, dtype=dtype),
        draw.noise(rows, channels, taps - 1, dtype=dtype, layout=False),
        draw.noise(channels, taps, dtype=draw.parameter(dtype)),
        draw.maybe(lambda: draw.noise(channels, dtype=draw.parameter(dtype))),
        draw.choice(["silu", "silu", None]),
    ]


def scan_inputs(draw, rows, dtype):
    groups = draw.choice([1, 1, 2, 3])
    heads, head_dim, state = groups * draw.choice([1, 2, 3, 5]), draw.size(16, 33, 65), draw.size(16, 33, 65)
    vectors = [draw.noise(heads, dtype=draw.parameter(dtype)) for _ in range(3)]
    largest = draw.choice([float("inf"), 0.5])
    return [
        draw.noise(rows, heads, head_dim, dtype=dtype),
        draw.noise(rows, heads, dtype=draw.parameter(dtype)) - 1,
        -vectors[0].exp(),
        draw.noise(rows, groups, state, dtype=dtype),
        draw.noise(rows, groups, state, dtype=dtype),
        draw.maybe(lambda: vectors[1]),
        draw.maybe(lambda: vectors[2]),
        (draw.choice([0.0, 0.1]), largest),
    ]


def ssd_scan(draw):
    dtype = draw.dtype(FP16, FP64)
    tokens, cu_seqlens, sequences = draw.packed(16, 17, 64, 65, 70)
    args = scan_inputs(draw, tokens, dtype)
    shape = (sequences, *args[0].shape[1:], args[3].shape[2])
    initial = draw.maybe(lambda: draw.noise(*shape, dtype=draw.parameter(dtype)))
    return [*args, cu_seqlens, initial, draw.choice([1, 4, 13, 64, 200])]


def ssd_update(draw):
    dtype = draw.dtype(FP16, FP64)
    args = scan_inputs(draw, draw.size(0, low=1, high=5), dtype)
    shape = (*args[0].shape, args[3].shape[2])
    return [draw.noise(*shape, dtype=torch.promote_types(dtype, FP32), layout=False), *args]


def moe_route(draw):
    dtype = draw.dtype(FP16, FP64)
    groups, per_group = draw.choice([(1, 1), (1, 7), (1, 16), (1, 128), (2, 2), (2, 5), (4, 3), (8, 4)])
    kept = draw.randint(1, groups)
    tokens = draw.size(0)
    logits = torch.randn(tokens, groups * per_group, dtype=FP64) * draw.choice([1, 1, 4])
    if draw.random() < 0.5:
        logits = (logits * 4).round() / 4  # ties
    return [
        draw.laid_out(logits.to(dtype)),
        draw.noise(groups * per_group, dtype=draw.parameter(dtype), scale=draw.choice([0, 0.2])),
        draw.randint(1, min(6, kept * per_group)),
        groups,
        kept,
        draw.random() < 0.7,
        draw.choice([1.0, 2.5]),
    ]


def slots(draw, tokens, experts, top_k, dtype):
    """Experts of each token, seldom one of them twice, and weights."""
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    if draw.random() < 0.2:
        ids = torch.randint(draw.randint(1, experts), (tokens, top_k))
    weights = draw.noise(tokens, top_k, dtype=draw.parameter(dtype))
    return draw.laid_out(ids.contiguous().to(draw.choice([torch.int64, torch.int32]))), weights


def moe_permute(draw):
    dtype, experts = draw.dtype(FP16, FP64), draw.size(64)
    tokens, width = draw.size(0), draw.size(33)
    ids, _ = slots(draw, tokens, experts, draw.randint(1, min(experts, 4)), dtype)
    return [draw.noise(tokens, width, dtype=dtype), ids, experts]


def moe_combine(draw):
    dtype, tokens, top_k, width = draw.dtype(FP16, FP64), draw.size(0), draw.randint(1, 4), draw.size(33)
    rows = draw.noise(tokens * top_k, width, dtype=dtype)
    weights = draw.noise(tokens, top_k, dtype=draw.parameter(dtype))
    return [rows, draw.laid_out(torch.randperm(tokens * top_k)), weights, tokens]


def moe_combine_norm(draw):
    rows, order, weights, tokens = moe_combine(draw)
    width = rows.shape[1]
    norm = draw.noise(width, dtype=draw.parameter(rows.dtype))
    added = [draw.maybe(lambda: draw.noise(tokens, width, dtype=rows.dtype)) for _ in range(2)]
    return [rows, order, weights, norm, draw.choice([1e-5, 1e-2]), *added]


def grouped_gemm(draw):
    dtype, experts = draw.dtype(FP16, FP64), draw.size()
    counts = [draw.choice([0, 1, draw.size(40)]) for _ in range(experts)]
    rows = sum(counts) + draw.choice([0, 0, 3])
    width, outputs = draw.size(8, 16, 64, 65), draw.size(8, 16, 64, 65)
    rows_of_a = draw.choice([None, draw.randint(1, 9)])
    a = draw.noise(rows if rows_of_a is None else rows_of_a, width, dtype=dtype)
    b = draw.noise(experts, outputs, width, dtype=dtype, scale=width**-0.5)
    gathered = None
    if rows_of_a is not None:
        gathered = draw.laid_out(torch.randint(rows_of_a, (rows,), dtype=torch.int32))
    ends = draw.laid_out(torch.tensor(list(accumulate(counts)), dtype=torch.int32))
    b = draw.choice([b.transpose(1, 2), b.transpose(1, 2).contiguous()])
    scale = draw.maybe(lambda: draw.noise(rows, dtype=draw.parameter(dtype)))
    return [a, b, ends, gathered, scale, draw.choice([None, "relu2"])]


def moe_mlp(draw, *others):
    dtype, experts = draw.dtype(FP64, *others), draw.size(16, 64)
    top_k = draw.randint(1, min(experts, 6))
    tokens, width, expert_width = draw.size(0, 40), draw.size(16, 64, 65, 130), draw.size(16, 64, 65, 130)
    ids, weights = slots(draw, tokens, experts, top_k, dtype)
    stored = draw.parameter(dtype)
    # rounded to the dtype of x first: the oracle, in fp64, would not round fp32 weights at their use
    up = draw.laid_out(draw.noise(experts, expert_width, width, dtype=dtype, scale=width**-0.5).to(stored))
    down = draw.noise(experts, width, expert_width, dtype=dtype, scale=expert_width**-0.5).to(stored)
    return [draw.noise(tokens, width, dtype=dtype), ids, weights, up, draw.laid_out(down)]


def moe_mlp_packed(draw):
    args = moe_mlp(draw)
    while args[0].dtype == FP64 or not all(args[i].stride(-1) == 1 for i in (0, 3, 4)):
        args = moe_mlp(draw)
    return args


def linear(draw):
    dtype = draw.dtype(FP16, FP64)
    tokens, width, outputs = draw.size(0, 40), draw.size(16, 64, 65, 130), draw.size(16, 64, 65, 130)
    # rounded to the dtype of x first, as the weights of moe_mlp
    weight = draw.noise(outputs, width, dtype=dtype, scale=width**-0.5, layout=False).to(
        draw.parameter(dtype)
    )
    return [draw.noise(tokens, width, dtype=dtype), draw.laid_out(weight)]


def linear_packed(draw):
    args = linear(draw)
    while args[0].dtype not in (FP32, BF16) or any(a.stride(-1) != 1 for a in args):
        args = linear(draw)
    return args


def heads(draw):
    kv_heads = draw.choice([1, 2, 3])
    return {
        "heads": kv_heads * draw.choice([1, 2, 3, 7]),
        "kv_heads": kv_heads,
        "head_dim": draw.size(16, 33, 65, low=2),
    }


def attention_prefill(draw):
    dtype, shape = draw.dtype(FP16, FP64), heads(draw)
    keys = draw.lengths(70, 100, 300)
    same = draw.random() < 0.4
    queries = keys if same else [draw.choice([n, draw.randint(0, n + 3)]) for n in keys]
    packs = len(keys) != 1 or draw.random() < 0.5
    causal = draw.random() < 0.8
    dim = shape["head_dim"]
    return [
        draw.noise(sum(queries), shape["heads"], dim, dtype=dtype),
        draw.noise(sum(keys), shape["kv_heads"], dim, dtype=dtype),
        draw.noise(sum(keys), shape["kv_heads"], dim, dtype=dtype),
        draw.ends(queries) if packs else None,
        draw.ends(keys) if packs and not (same and draw.random() < 0.5) else None,
        causal,
        draw.choice([None, 0.2]),
        draw.choice([None, None, 2, draw.randint(2, 80)]) if causal else None,
    ]


def attention_decode(draw):
    lengths = [draw.choice([0, draw.randint(1, 20), draw.size(255, 300)]) for _ in range(draw.randint(0, 4))]
    args, _ = paged(lengths, draw.choice([1, 4, 5, 16]), **heads(draw), dtype=draw.dtype(FP16, FP64))
    args[3].nan_to_num_(draw.choice([1e3, 0.0]))  # NaN where nothing was written has tests of its own
    window = draw.choice([None, None, 1, draw.randint(1, 30)])
    return [*map(draw.laid_out, args), draw.choice([None, 0.2]), window]


def linear_cross_entropy(draw):
    dtype = draw.dtype(FP16, FP64)
    tokens, width, entries = draw.size(0, 70), draw.size(33, 64), draw.size(40, 513, low=1)
    ignore = draw.choice([-100, -100, 0, -1])
    targets = torch.randint(entries, (tokens,))
    targets[torch.rand(tokens) < draw.choice([0, 0.3])] = ignore
    reduction = draw.choice(["mean", "sum", "none"] if (targets != ignore).any() else ["sum", "none"])
    x = draw.noise(tokens, width, dtype=dtype)
    weight = draw.noise(entries, width, dtype=dtype, scale=draw.choice([0.5, 3]))
    return [x, weight, draw.laid_out(targets), ignore, reduction]


GENERATORS = {
    f.__name__: f
    for f in (
        rms_norm, causal_conv1d, causal_conv1d_update, ssd_scan, ssd_update, moe_route, moe_permute, moe_combine,
        moe_combine_norm, grouped_gemm, moe_mlp, moe_mlp_packed, linear, linear_packed, attention_prefill,
        attention_decode, linear_cross_entropy,
    )
}  # fmt: skip

"""The gradients of grouped_gemm as the CUDA kernels compute them, beside their oracle: what the tests of those share.

`through_relu2` is grouped_gemm_fwd with `kept`, `weight_grad` is grouped_gemm_wgrad. Both take backend= like a public
operator, for testing.check_oracle: "emulator", or "native" with tensors on a GPU, runs the kernels.
"""

from functools import partial
from itertools import pairwise

import torch

from hebatron_kernels import _native, testing
from hebatron_kernels.moe.native import IMPLEMENTATIONS, parse_implementation

# rows of every expert by case, a tile having so many, and rows past the last end. The few take every block of a
# persistent kernel round again; forty experts are more than a warp has lanes.
CASES = {
    "edges": lambda tile: ([0, tile, tile + 1, 0, 1, 0], 5),
    "few": lambda tile: ([3, 0, 2, 1, 4, 2], 0),
    "one for all": lambda tile: ([0, 0, tile + 3, 0], 0),
    "one row": lambda tile: ([1], 0),
    "forty": lambda tile: ([(7 * e) % 5 if e % 3 else 0 for e in range(40)], 0),
    "none": lambda tile: ([0, 0, 0], 0),
    "all past the end": lambda tile: ([0, 0, 0], tile + 1),
}


def expert_of_row(ends, rows):
    """The expert of every row; past the last end, as many as there are."""
    return torch.searchsorted(ends.long(), torch.arange(rows, device=ends.device), right=True)


def _spans(ends):
    return list(pairwise([0, *ends.tolist()]))


def products(a, b, ends, rows):
    """a[rows] b[e] row by row, zeros past the last end."""
    a = a if rows is None else a[rows.long()]
    out = a.new_zeros(a.shape[0], b.shape[2])
    for expert, (begin, end) in enumerate(_spans(ends)):
        out[begin:end] = a[begin:end] @ b[expert]
    return out


def _call(op, a, arguments):
    call = partial(_native.call, op, **arguments)
    return call() if a.is_cuda else _native.emulated(call)


def call_gemm(a, b, ends, rows, scale, kept=None, relu2=True, implementation=None, **changed):
    """grouped_gemm_fwd on CUDA: out, and the sums of rows where `kept` is given."""
    count = (a if rows is None else rows).shape[0]
    by_output = b.stride(1) == 1
    stored = b.transpose(1, 2) if by_output else b
    name, tile_m, tile_n = parse_implementation(implementation)
    out = a.new_full((count, b.shape[2]), torch.nan)
    row_sums = a.new_full((count,), torch.nan, dtype=torch.float32) if kept is not None else None
    arguments = dict(
        rows=count, a_rows=a.shape[0], experts=b.shape[0], n=b.shape[2], k=b.shape[1], workers=1,
        dtype=_native.dtype_name(a), relu2=int(relu2), a=a, a_stride=a.stride(0), rows_of_a=rows,
        b=stored, b_expert_stride=stored.stride(0), b_stride=stored.stride(1), b_k_major=int(by_output),
        offsets=ends, scale=None if scale is None else scale.float(), kept=kept, row_sums=row_sums, out=out,
        implementation=IMPLEMENTATIONS[name] if name else 0, tile_m=tile_m, tile_n=tile_n,
    )  # fmt: skip
    _call("grouped_gemm_fwd", a, arguments | changed)
    return out if kept is None else (out, row_sums)


def through_relu2(a, b, ends, rows, scale, kept, *, backend, implementation=None):
    """The gradients of h and of scale from a b[e], that of relu(h)^2 * scale = kept."""
    if backend in ("emulator", "native"):
        return call_gemm(a, b, ends, rows, scale, kept, implementation=implementation)
    g = products(a, b, ends, rows)
    live = ((scale != 0) & (expert_of_row(ends, len(g)) < len(ends)))[:, None]
    scale = scale[:, None]
    slope = 2 * (scale * kept).sqrt() * scale.sign()
    sums = torch.where(live, g * kept / scale, 0).double().sum(1)
    return torch.where(live, slope * g, 0), sums if backend == "reference" else sums.float()


def weight_grad(a, b, ends, rows, transposed, out_dtype, *, backend, implementation=None, **changed):
    """a[rows]^T b, expert by expert; transposed, b^T a[rows]."""
    count, width, outputs = b.shape[0], a.shape[1], b.shape[1]
    shape = (len(ends), outputs, width) if transposed else (len(ends), width, outputs)
    if backend not in ("emulator", "native"):
        taken = a if rows is None else a[rows.long()]
        dtype = torch.float64 if backend == "reference" else out_dtype
        out = a.new_zeros(shape, dtype=dtype)
        for expert, (begin, end) in enumerate(_spans(ends)):
            product = taken[begin:end].to(dtype).t() @ b[begin:end].to(dtype)
            out[expert] = product.t() if transposed else product
        return out
    name, tile_m, tile_n = parse_implementation(implementation)
    out = a.new_full(shape, torch.nan, dtype=out_dtype)
    arguments = dict(
        rows=count, a_rows=a.shape[0], experts=len(ends), m=width, n=outputs, workers=1,
        dtype=_native.dtype_name(a), out_dtype=_native.dtype_name(out), a=a, a_stride=a.stride(0), rows_of_a=rows,
        b=b, b_stride=b.stride(0), offsets=ends, out=out, transposed=int(transposed),
        implementation=IMPLEMENTATIONS[name] if name else 0, tile_m=tile_m, tile_n=tile_n,
    )  # fmt: skip
    _call("grouped_gemm_wgrad", a, arguments | changed)
    return out


def _routed(counts, past, gathered, width):
    rows = sum(counts) + past
    ends = torch.tensor(counts).cumsum(0).int()
    source = rows // 2 + 1 if gathered else rows
    a = torch.randn(source, width, dtype=torch.float64)
    return a, ends, torch.randint(source, (rows,), dtype=torch.int32) if gathered else None


def relu2_args(case, tile_m, inner, outputs, gathered=True, by_output=False):
    """[a, b, ends, rows, scale, kept]: b with the outputs last, as in the way back; every seventh scale is 0."""
    counts, past = CASES[case](tile_m)
    a, ends, rows = _routed(counts, past, gathered, inner)
    shape = (len(counts), outputs, inner) if by_output else (len(counts), inner, outputs)
    b = torch.randn(shape, dtype=torch.float64) / inner**0.5
    count = sum(counts) + past
    scale = torch.rand(count, dtype=torch.float64) - 0.3
    scale[::7] = 0
    kept = torch.randn(count, outputs, dtype=torch.float64).relu() ** 2 * scale[:, None]
    # exact in bf16, so that every backend divides by the scale that kept was made with
    kept, scale = kept.bfloat16().double(), scale.bfloat16().double()
    return [a, b.transpose(1, 2) if by_output else b, ends, rows, scale, kept]


def wgrad_args(case, tile, width, outputs, gathered=True):
    """[a, b, ends, rows]; what is past the last end is NaN, and so is a row of a that nobody takes."""
    counts, past = CASES[case](tile)
    a, ends, rows = _routed(counts, past, gathered, width)
    b = torch.randn(sum(counts) + past, outputs, dtype=torch.float64)
    last = int(ends[-1])
    b[last:] = torch.nan
    if rows is None:
        a[last:] = torch.nan
    else:
        a = torch.cat([a, torch.full_like(a[:1], torch.nan)])
        rows[last:] = len(a) - 1
    return [a, b, ends, rows]


# What the kernels of every architecture must do; `tile` is an implementation with its tile, "sm80:64x128"


def rows_of(tile):
    return int(tile.partition(":")[2].partition("x")[0])


def check_relu2(tile, case, inner, outputs, gathered, by_output=False):
    args = relu2_args(case, rows_of(tile), inner, outputs, gathered, by_output)
    # the sums of a few columns, whose terms cancel
    op = partial(through_relu2, implementation=tile)
    testing.check_oracle(op, args, torch.bfloat16, "emulator", grad=False, floor=1.0)


def check_wgrad(tile, case, span, width, outputs, gathered, transposed, dtype):
    """`span`: rows of an expert about as many as a step of the kernel sums over."""

    def op(*given, backend):
        named = tile if backend == "emulator" else None
        return weight_grad(*given, transposed, dtype, backend=backend, implementation=named)

    args = wgrad_args(case, span, width, outputs, gathered)
    testing.check_oracle(op, args, torch.bfloat16, "emulator", grad=False)


def check_way_back_keeps_nan_to_its_row_and_expert(tile, by_output=False):
    args = testing._cast(relu2_args("edges", rows_of(tile), 72, 136, False, by_output), torch.bfloat16)
    a, b, ends, _, scale, kept = args
    want = call_gemm(*args, implementation=tile)
    end = int(ends[-1])
    a[3, 9], a[end:], b[0], kept[end:], scale[end:] = [torch.nan] * 5
    got = call_gemm(*args, implementation=tile)
    others = torch.arange(len(a)) != 3
    for mine, first in zip(got, want):
        assert mine[3].isnan().any() and torch.equal(mine[others], first[others])
        assert not mine[end:].any()


def check_way_back_is_zero_where_the_scale_is_or_nothing_is_summed(tile):
    args = testing._cast(relu2_args("few", 16, 72, 136), torch.bfloat16)
    args[0][:] = torch.inf
    out, row_sums = call_gemm(*args, implementation=tile)
    zero = args[4] == 0
    assert zero.any() and not out[zero].any() and not row_sums[zero].any()
    for empty in (dict(k=0), dict(experts=0), dict(n=0)):
        out, row_sums = call_gemm(*args, implementation=tile, **empty)
        assert not row_sums.any() and ("n" in empty or not out.any())


def nan_in_expert_2(span):
    """[a, b, ends, rows] of which expert 2 alone takes NaN: expert 1 ends within a step, and row 0 of a, which stands
    in for one that is not there, belongs to expert 2."""
    a, b, ends, rows = wgrad_args("edges", span, 72, 136)
    a, rows = torch.cat([torch.full_like(a[:1], torch.nan), a]), rows + 1
    begin, end = int(ends[1]), int(ends[2])
    b[begin:end], rows[begin:end] = torch.nan, 0
    return [a, b, ends, rows]


def check_wgrad_takes_no_nan_from_its_neighbours(tile, span, transposed):
    def op(*given, backend):
        named = tile if backend == "emulator" else None
        return weight_grad(*given, transposed, torch.float32, backend=backend, implementation=named)

    args = nan_in_expert_2(span)
    assert op(*args, backend="reference")[2].isnan().all()
    testing.check_oracle(op, args, torch.bfloat16, "emulator", grad=False)

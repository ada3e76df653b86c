"""What only the native forms promise, for every operator: the same bits each time, on any number of threads, whatever
memory held before, and for a token whatever stands beside it."""

import pytest
import torch
from fuzz_cases import CALLS, ON_CUDA_ONLY, chosen, problem
from fuzz_problems import BF16, FP32, GENERATORS

import hebatron_kernels as hk
from hebatron_kernels import testing

NATIVE = [name for name in GENERATORS if name not in ON_CUDA_ONLY]


def call_of(name):
    return CALLS.get(name, getattr(hk, name))


def native_problem(name, dtype):
    """The first problem of some size that the native form serves in this dtype."""
    for seed in range(1000):
        args = problem(name, seed)
        floats = [a for a in args if torch.is_tensor(a) and a.is_floating_point()]
        coarsest = BF16 if any(a.dtype == BF16 for a in floats) else floats[0].dtype
        if coarsest == dtype and max(a.numel() for a in floats) > 60 and chosen(name, args) == "native":
            return args
    raise AssertionError(f"no problem for {name}")


def run(name, args):
    return testing.run(call_of(name), args, name not in CALLS, backend="native")


def same(got, want):
    assert got.keys() == want.keys()
    return all(torch.equal(got[n].nan_to_num(7.0), want[n].nan_to_num(7.0)) for n in want)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", NATIVE)
def test_native_gives_the_same_bits_250_times_on_any_number_of_threads(name, dtype):
    args = native_problem(name, dtype)
    want = run(name, args)
    before = torch.get_num_threads()
    try:
        for repeat in range(250):
            torch.set_num_threads(1 + repeat // 10 % 3)
            assert same(run(name, args), want), repeat
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", NATIVE)
def test_native_writes_all_of_its_results_and_reads_nothing_unwritten(name, dtype, monkeypatch):
    """Results and workspaces full of NaN (every byte 255, in integers -1 or the largest) and full of zeros."""
    args = native_problem(name, dtype)
    assert (
        torch.empty(3, dtype=torch.uint8).tolist() == [255] * 3 and torch.empty(3).isnan().all()
    )  # conftest.py
    poisoned = run(name, args)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: real(*size, **kind).zero_())
    assert same(run(name, args), poisoned)


def rows(count, *sizes, dtype):
    return torch.randn(count, *sizes, dtype=torch.float64).to(dtype)


def update_inputs(count, dtype):
    vectors = [torch.randn(6) for _ in range(3)]
    x, dt, B, C = (rows(count, *s, dtype=dtype) for s in ((6, 5), (6,), (2, 17), (2, 17)))
    return [rows(count, 6, 5, 17, dtype=FP32), x, dt, -vectors[0].exp(), B, C, *vectors[1:], (0.0, 1.0)]


def norm_inputs(count, dtype):
    x, residual, gate = (rows(count, 99, dtype=dtype) for _ in range(3))
    return [x, rows(99, dtype=dtype), 1e-5, residual, gate, 33]


def conv_inputs(count, dtype):
    weight, bias = rows(70, 4, dtype=dtype), rows(70, dtype=dtype)
    return [rows(count, 70, dtype=dtype), rows(count, 70, 3, dtype=dtype), weight, bias, "silu"]


def route_inputs(count, dtype):
    return [rows(count, 24, dtype=dtype), rows(24, dtype=FP32), 5, 4, 2, True, 2.5]


# of operators whose results are of rows: the arguments for so many, and which of them have a row each
ROWWISE = {
    "rms_norm": (norm_inputs, (0, 3, 4)),
    "causal_conv1d_update": (conv_inputs, (0, 1)),
    "ssd_update": (update_inputs, (0, 1, 2, 4, 5)),
    "moe_route": (route_inputs, (0,)),
}


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("name", ROWWISE)
def test_native_gives_a_row_the_same_bits_in_any_batch(name, batch, dtype, isa):
    make, with_rows = ROWWISE[name]
    args = make(130, dtype)

    def results(values):
        """Results and gradients that have a row for each of the batch."""
        found = run(name, values)
        return {
            n: v for n, v in found.items() if v.dim() and v.shape[0] == values[0].shape[0] and n != "out2"
        }

    def part(begin):
        return [a[begin : begin + batch] if i in with_rows else a for i, a in enumerate(args)]

    with testing.use_isa(isa):
        whole = results(args)
        # upstream gradients depend on the element's place in the batch: only of the first rows are they the same
        assert same(results(part(0)), {n: v[:batch] for n, v in whole.items()})
        for begin in range(0, 130, batch):
            out = {n: v for n, v in results(part(begin)).items() if n.startswith("out")}
            assert same(out, {n: whole[n][begin : begin + batch] for n in out}), begin


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_causal_conv1d_native_gives_a_document_the_same_bits_among_any_others(batch, dtype, isa):
    lengths = [(7 * q) % 13 for q in range(64)]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    x, state = rows(int(ends[-1]), 21, dtype=dtype), rows(64, 21, 3, dtype=dtype)
    weight, bias = rows(21, 4, dtype=dtype), rows(21, dtype=dtype)
    with testing.use_isa(isa):
        y, last = hk.causal_conv1d(x, weight, bias, "silu", ends, state, backend="native")
        for q in range(0, 64, batch):
            some = ends[q : q + batch + 1]
            begin, end = int(some[0]), int(some[-1])
            given = [x[begin:end], weight, bias, "silu", some - begin, state[q : q + batch]]
            found = hk.causal_conv1d(*given, backend="native")
            assert torch.equal(found[0], y[begin:end]) and torch.equal(found[1], last[q : q + batch])

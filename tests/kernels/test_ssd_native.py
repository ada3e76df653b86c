import random

import pytest
import torch
from ssd_cases import ROWS, assert_close, cast, make

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

# tokens, heads, head dim, groups, state, ends of the sequences (None: one, without cu_seqlens). Chunks hold 64 tokens,
# blocks of decays 16, panels 64 columns (32 where a vector has 8 lanes), strips 6 rows.
SHAPES = [
    (0, 2, 3, 1, 4, None),
    (0, 2, 3, 1, 4, [0]),  # no sequence at all
    (0, 2, 3, 1, 4, [0, 0, 0]),  # only empty ones
    (1, 1, 1, 1, 1, None),
    (64, 4, 8, 2, 16, None),  # a whole chunk
    (67, 3, 5, 3, 7, None),  # odd everywhere; a group per head
    (130, 5, 3, 1, 5, [0, 130]),  # two chunks and more; one group, its heads in four parts
    (150, 4, 3, 2, 5, [0, 0, 1, 66, 66, 150]),  # empty, one token, one over a chunk
    (40, 2, 65, 1, 67, [0, 23, 40]),  # one over a panel in both widths
    (70, 2, 64, 1, 128, None),  # the model's head
]
DTYPES = [torch.float32, torch.bfloat16]


def rows_of(args, begin, end):
    return [a[begin:end] if i in ROWS else a for i, a in enumerate(args)]


# with D, dt_bias and initial states on every ISA, without them on the strongest
@pytest.mark.parametrize(
    ("isa", "options"),
    [*((isa, True) for isa in testing.isas()), *((isa, False) for isa in testing.isas()[-1:])],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_scan_native_matches_oracle(dtype, shape, isa, options):
    # grad_A has an element a head: at the model's two heads the torch form's error in it happens to be a third of usual
    factor = 4 if shape == SHAPES[-1] else 2
    with testing.use_isa(isa):
        testing.check_oracle(hk.ssd_scan, make(*shape, *[options] * 3), dtype, "native", factor=factor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_scan_native_keeps_the_limits_of_dt(dtype):
    """Steps under, between and over: outside there is no gradient to dt and dt_bias."""
    args = make(100)
    args[7] = (0.2, 0.6)
    testing.check_oracle(hk.ssd_scan, args, dtype, "native")
    raw = args[1].bfloat16().double() + args[6].bfloat16().double()
    step = torch.nn.functional.softplus(raw)
    grad = testing.run(hk.ssd_scan, cast(args, dtype), backend="native")["grad1"]
    outside = (step < 0.19) | (step > 0.61)
    assert outside.any() and not grad[outside].any()
    assert grad[(step > 0.21) & (step < 0.59)].all()


@pytest.mark.parametrize(("head_dim", "state"), [(1, 5), (3, 1), (1, 1)])
def test_ssd_native_takes_rows_of_one_laid_out_otherwise(head_dim, state):
    """Of a last dimension of one torch flattens a view in which the heads of a token do not stand side by side."""
    args = cast(make(20, 4, head_dim, 2, state), torch.float32)
    exchanged = list(args)
    for i in (0, 3, 4):  # x, B, C
        exchanged[i] = args[i].transpose(0, 1).contiguous().transpose(0, 1)
    want = testing.run(hk.ssd_scan, args, backend="native")
    got = testing.run(hk.ssd_scan, exchanged, backend="native")
    assert all(torch.equal(got[name], want[name]) for name in want)
    states = [torch.randn(20, 4, head_dim, state)]
    states.append(states[0].clone())
    some = [hk.ssd_update(s, *a[:8], backend="native") for s, a in zip(states, (args, exchanged))]
    assert torch.equal(*some) and torch.equal(*states)


def test_ssd_scan_native_takes_mixed_dtypes():
    """The model's mix in bf16: A, D, dt_bias and the states in fp32, dt in the dtype of x."""
    args = make(80)
    mixed = [
        *cast(args[:2], torch.bfloat16),
        args[2].float(),
        *cast(args[3:5], torch.bfloat16),
        *cast(args[5:], torch.float32),
    ]
    got = testing.run(hk.ssd_scan, mixed, backend="native")
    want = testing.run(hk.ssd_scan, cast(mixed, torch.float64), backend="reference")
    for index in (0, 1, 2, 3, 4, 5, 6, 9):
        assert got[f"grad{index}"].dtype == mixed[index].dtype, index
    assert got["out0"].dtype == torch.bfloat16 and got["out1"].dtype == torch.float32
    assert_close(got, want, 2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", testing.isas())
def test_ssd_scan_native_does_not_see_its_batch(isa, dtype):
    """Document B alone is document B packed among 2, 7 and 64 to the bit, its gradients of rows and state as well."""
    lengths = [70, 3, 64, 1, 16, 0, 40, *range(1, 58)]
    for count in (1, 2, 7, 64):
        ends = [0]
        for length in lengths[:count]:
            ends.append(ends[-1] + length)
        args = cast(make(ends[-1], 3, 5, 1, 6, ends), dtype)
        args[9] = args[9].float()
        upstream = torch.cos(torch.arange(ends[-1] * 15.0)).view(-1, 3, 5).to(dtype)
        with testing.use_isa(isa):
            packed = scan_and_grads(args, upstream)
            for q in random.Random(0).sample(range(count), min(count, 7)):
                begin, end = ends[q], ends[q + 1]
                alone = rows_of(args, begin, end)
                alone[8], alone[9] = None, args[9][q : q + 1]
                for one, many in zip(scan_and_grads(alone, upstream[begin:end]), packed):
                    part = many[q : q + 1] if many.dim() == 4 else many[begin:end]
                    assert torch.equal(one, part), (count, q)


def scan_and_grads(args, upstream):
    """y, the last states, and the gradients of x, dt, B, C and the initial states."""
    leaves = [a.detach().requires_grad_() if i in (*ROWS, 9) else a for i, a in enumerate(args)]
    y, last = hk.ssd_scan(*leaves, backend="native")
    return (
        y,
        last,
        *torch.autograd.grad([y, last], [leaves[i] for i in (*ROWS, 9)], [upstream, torch.ones_like(last)]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunk_size", "step"), [(256, 64), (16, 16), (1, 7), (5, 10)])
def test_ssd_scan_native_pieces_of_whole_chunks_are_the_whole(dtype, chunk_size, step):
    args = cast(make(200, 4, 20, 2, 9), dtype)
    args[9] = args[9].float()
    whole = hk.ssd_scan(*args, chunk_size, backend="native")
    pieces, state = [], args[9]
    for begin in range(0, 200, step):
        piece = rows_of(args, begin, begin + step)
        piece[9] = state
        y, state = hk.ssd_scan(*piece, chunk_size, backend="native")
        pieces.append(y)
    assert torch.equal(torch.cat(pieces), whole[0]) and torch.equal(state, whole[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_scan_native_causes_before_effects(dtype):
    """Tokens that follow, in the chunk or behind it, change nothing before them, to the bit."""
    args = cast(make(100, 3, 6, 1, 6), dtype)
    whole = hk.ssd_scan(*args, backend="native")[0]
    for end in (1, 5, 16, 17, 63, 64, 65, 99):
        assert torch.equal(hk.ssd_scan(*rows_of(args, 0, end), backend="native")[0], whole[:end]), end


@pytest.mark.parametrize("heads", [1, 5, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_scan_native_repeats_to_the_bit_on_any_number_of_threads(dtype, heads):
    """A group alone has its heads in up to four parts, on however many threads; three sizes make 250 repeats each."""
    args = cast(make(130, heads, 8, 1, 8, [0, 40, 130]), dtype)
    before = torch.get_num_threads()
    first = testing.run(hk.ssd_scan, args, backend="native")
    try:
        for threads, repeats in ((1, 2), (2, 80), (3, 2)):
            torch.set_num_threads(threads)
            for _ in range(repeats):
                again = testing.run(hk.ssd_scan, args, backend="native")
                assert all(torch.equal(again[name], first[name]) for name in first), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_scan_native_goes_on_past_a_segment(isa, dtype):
    """The backward keeps the states of 64 chunks; chunks of one token reach past that within few tokens."""
    args = make(150, 2, 3, 1, 4, [0, 0, 148, 150])
    with testing.use_isa(isa):
        testing.check_oracle(hk.ssd_scan, [*args, 1], dtype, "native")


def test_ssd_scan_native_large_step_has_exact_gradients():
    """A sum over pairs cancels nothing: behind a step of 1e4 the gradients of dt are as exact as without it. The
    difference of row and column sums, in fp32, would be off by 1e-3 of them."""
    args = cast(make(64, 2, 4, 1, 4), torch.float32)
    args[1][20] = 1e4
    args[2][0] = -1e-6
    want = testing.run(hk.ssd_scan, cast(args, torch.float64), backend="reference")["grad1"]
    got = testing.run(hk.ssd_scan, args, backend="native")["grad1"]
    torch.testing.assert_close(
        got[21:].double(), want[21:], rtol=2e-5, atol=2e-6 * want[21:].abs().max().item()
    )


def test_ssd_scan_native_keeps_the_tails_of_softplus_and_decay():
    """e^-22: what softplus adds to 22 and to 0 at -22, and what a step of 22 leaves of a state of 1e9."""
    args = cast(make(40, bias=False), torch.float32)
    args[1][::3], args[1][1::3], args[9] = 22.0, -22.0, 1e9 * args[9]
    args[2].fill_(-1.0)
    want = testing.run(hk.ssd_scan, cast(args, torch.float64), backend="reference")
    got = testing.run(hk.ssd_scan, args, backend="native")
    assert_close({"y": got["out0"]}, {"y": want["out0"]}, 2e-6)
    torch.testing.assert_close(got["out1"].double(), want["out1"], rtol=5e-6, atol=1e-9)


def test_ssd_scan_native_takes_positive_rates():
    args = make(70)
    args[2] = 0.05 * args[2].abs()
    testing.check_oracle(hk.ssd_scan, args, torch.float32, "native")


@pytest.mark.slow
def test_ssd_scan_native_at_the_models_size():
    args = make(1000, 16, 64, 2, 128, [0, 300, 1000])
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        rounded = cast(args, dtype)
        want = testing.run(hk.ssd_scan, cast(rounded, torch.float64), backend="torch")
        assert_close(testing.run(hk.ssd_scan, rounded, backend="native"), want, limit)


def native_args(args):
    from hebatron_kernels.ssd import native

    return native._scan_inputs(*cast(args, torch.float32), 64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(head_dim=0), "ssd_scan: head_dim must be > 0, got 0"),
        (dict(state_dim=-1), "ssd_scan: state_dim must be > 0, got -1"),
        (dict(groups=3), "ssd_scan: groups must divide the heads, got 3"),
        (dict(groups=0), "ssd_scan: groups must divide the heads, got 0"),
        (dict(chunk=65), "ssd_scan: chunk must be between 1 and 64, got 65"),
        (dict(chunk=0), "ssd_scan: chunk must be between 1 and 64, got 0"),
        (dict(workers=0), "ssd_scan: workers must be > 0, got 0"),
        (dict(sequences=-1), "ssd_scan: sequences must be >= 0, got -1"),
        (dict(tokens=51), "ssd_scan: cu_seqlens must end at the number of tokens, got 50"),
        (dict(cu_seqlens=torch.tensor([1, 50]).int()), "ssd_scan: cu_seqlens must start at 0, got 1"),
        (
            dict(cu_seqlens=torch.tensor([0, 60, 50]).int(), sequences=2),
            "ssd_scan: cu_seqlens must not fall, got 50",
        ),
        (dict(dtype="float16"), "dtype must be float32 or bfloat16, got float16"),
        (dict(other=1), "unexpected keyword"),
    ],
)
def test_ssd_scan_native_module_names_a_bad_number(wrong, message):
    inputs = native_args(make(50))
    y, last = torch.empty(50, 4, 3), torch.empty(1, 4, 3, 5)
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        _native.call("ssd_scan_fwd", **{**inputs, "y": y, "last": last, **wrong})


def test_ssd_scan_native_module_refuses_a_small_workspace():
    tensors = {**native_args(make(50)), "y": torch.empty(50, 4, 3), "last": torch.empty(1, 4, 3, 5)}
    numbers = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    with pytest.raises(ValueError, match="ssd_scan: workspace is too small, got 0"):
        _native.cpu_module.ssd_scan_fwd(**numbers)

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from ssd_cases import ROWS, assert_close, cast, make

import hebatron_kernels as hk
from hebatron_kernels import testing

# tokens, heads, head dim, groups, state, ends of the sequences (None: one, without cu_seqlens). Chunks hold 32 tokens.
SHAPES = [
    (0, 2, 3, 1, 4, None),
    (0, 2, 3, 1, 4, [0]),  # no sequence at all
    (0, 2, 3, 1, 4, [0, 0, 0]),  # only empty ones
    (1, 1, 1, 1, 1, None),
    (32, 4, 3, 2, 5, None),  # a whole chunk
    (33, 3, 2, 3, 7, None),  # one more; a group per head
    (65, 4, 5, 1, 3, [0, 65]),  # two chunks and one more; one group
    (98, 4, 3, 2, 5, [0, 0, 1, 34, 34, 98]),  # empty, one token, one over a chunk, exactly two chunks
    (70, 2, 65, 1, 64, [0, 3, 70]),  # over 64 x 64 state values, so chunks of 64
]
# D, dt_bias, initial state
FORMS = [(True, True, True), (False, False, False)]


# rounding steps of the dtype; the worst over these shapes are 12, 5.6, 0.9 and 1.2. The halves' upstream gradients are
# rounded too, so the oracle's differ from theirs.
@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.float64, 30), (torch.float32, 12), (torch.bfloat16, 2), (torch.float16, 2)]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ssd_scan_torch_matches_oracle(dtype, steps, form, shape):
    args = cast(make(*shape, *form), dtype)
    want = testing.run(hk.ssd_scan, cast(args, torch.float64), backend="reference")
    assert_close(testing.run(hk.ssd_scan, args, backend="torch"), want, steps * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_ssd_scan_keeps_small_decays_after_a_large_step(backend):
    """A sum of log decays over the chunk in fp32 would lose them: 1e4 x 1e4 is 1e8, and its rounding step is 8."""
    args = cast(make(64), torch.float32)
    args[1][[5, 6, 40]] = 1e4
    args[2][0] = -1e4
    want = testing.run(hk.ssd_scan, cast(args, torch.float64), backend="reference")
    got = testing.run(hk.ssd_scan, args, backend=backend)
    assert all(value.isfinite().all() for value in got.values())
    rows = [t for t in range(64) if t not in (5, 6, 40)]
    for results in (got, want):  # the rows of the three large steps carry the 1e4 and would hide the others
        results["out0"], results["grad1"] = results["out0"][rows], results["grad1"][rows]
    assert_close({n: got[n] for n in ("out0", "grad1")}, {n: want[n] for n in ("out0", "grad1")}, 1e-6)


def test_ssd_scan_keeps_the_tails_of_softplus_and_decay():
    """e^-22: what softplus adds to 22, and what a step of 22 leaves of a state of 1e9."""
    args = make(40, bias=False)
    args[1][::3], args[9] = 22.0, 1e9 * args[9]
    args[2].fill_(-1.0)
    want = testing.run(hk.ssd_scan, args, backend="reference")
    got = testing.run(hk.ssd_scan, args, backend="torch")
    assert_close({"y": got["out0"]}, {"y": want["out0"]}, 1e-14)
    torch.testing.assert_close(got["out1"], want["out1"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize(
    ("dt", "A"), [(1e4, -1e4), (-1e4, -1e4), (1e4, -1e-30), (-60.0, -1.0), (3e38, -3e38)]
)
def test_ssd_scan_extreme_steps_leave_no_nan(backend, dt, A):
    args = cast(make(40, bias=False), torch.float32)
    args[0].mul_(1e-6)
    args[1].fill_(dt)
    args[2].fill_(A)
    got = testing.run(hk.ssd_scan, args, backend=backend)
    assert not any(value.isnan().any() for value in got.values())


@pytest.mark.parametrize("ends", [None, [0, 0, 20, 21, 150]])
def test_ssd_scan_chunk_size_does_not_change_the_result(ends):
    args = cast(make(150, ends=ends), torch.float32)
    want = testing.run(hk.ssd_scan, cast(args, torch.float64), backend="reference")
    for chunk_size in (1, 7, 16, 32, 64, 1000):
        assert_close(testing.run(hk.ssd_scan, [*args, chunk_size], backend="torch"), want, 1e-6)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_ssd_scan_split_anywhere_is_the_whole(backend):
    args = cast(make(70), torch.float32)
    whole = hk.ssd_scan(*args, backend=backend)
    for k in (0, 1, 31, 32, 33, 50, 69, 70):
        halves = [[a[s] if i in ROWS else a for i, a in enumerate(args)] for s in (slice(k), slice(k, 70))]
        first, halves[1][9] = hk.ssd_scan(*halves[0], backend=backend)
        second, last = hk.ssd_scan(*halves[1], backend=backend)
        torch.testing.assert_close(torch.cat([first, second]), whole[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(last, whole[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_ssd_scan_document_alone_is_packed(backend):
    ends = [0, 33, 33, 35, 99, 130]
    args = cast(make(130, ends=ends), torch.float32)
    packed = testing.run(hk.ssd_scan, args, grad=False, backend=backend)
    for q, (begin, end) in enumerate(pairwise(ends)):
        alone = [a[begin:end] if i in ROWS else a for i, a in enumerate(args)]
        alone[8], alone[9] = None, args[9][q : q + 1]
        y, state = hk.ssd_scan(*alone, backend=backend)
        torch.testing.assert_close(y, packed["out0"][begin:end], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(state[0], packed["out1"][q], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_ssd_scan_keeps_a_poisoned_document_to_itself(backend, initial):
    ends = [0, 30, 31, 31, 100, 131]
    args = cast(make(131, ends=ends, initial=initial), torch.float32)
    clean = testing.run(hk.ssd_scan, args, backend=backend)
    for i in ROWS:
        args[i][31:100] = float("nan")
    if initial:
        args[9][3] = float("nan")
    got = testing.run(hk.ssd_scan, args, backend=backend)
    assert got["out0"][31:100].isnan().all() and got["out1"][3].isnan().all()
    for name in ("out0", "grad0", "grad1", "grad3", "grad4"):
        assert torch.equal(got[name][:31], clean[name][:31]), name
        assert torch.equal(got[name][100:], clean[name][100:]), name
    for name in ("out1", "grad9") if initial else ("out1",):
        assert torch.equal(got[name][[0, 1, 2, 4]], clean[name][[0, 1, 2, 4]]), name


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.2, 0.6)])
def test_ssd_update_token_by_token_is_the_scan(backend, dt_limit):
    args = cast(make(45), torch.float32)
    args[7] = dt_limit
    whole, last = hk.ssd_scan(*args, backend=backend)
    head = [a[:33] if i in ROWS else a for i, a in enumerate(args)]
    y, state = hk.ssd_scan(*head, backend=backend)
    x, dt, A, B, C, D, bias = args[:7]
    for t in range(33, 45):
        row = slice(t, t + 1)
        one = hk.ssd_update(state, x[row], dt[row], A, B[row], C[row], D, bias, dt_limit, backend=backend)
        y = torch.cat([y, one])
    torch.testing.assert_close(y, whole, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state, last, rtol=2e-6, atol=2e-6)


# the model's state and vector width 16; a tail; one value. Three sequences at once.
@pytest.mark.parametrize(
    ("heads", "head_dim", "groups", "state"), [(4, 3, 2, 128), (3, 5, 3, 21), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", testing.isas())
def test_ssd_update_matches_oracle(isa, dtype, heads, head_dim, groups, state):
    x, dt, A, B, C, D, bias = cast(make(3, heads, head_dim, groups, state)[:7], dtype)
    start = torch.randn(3, heads, head_dim, state)
    for weight, shift in ((D, bias), (None, None)):
        states = [start.clone(), start.clone(), start.double()]
        with testing.use_isa(isa):
            native = hk.ssd_update(states[0], x, dt, A, B, C, weight, shift, backend="native")
        views = [testing.strided(t.flatten(1)).unflatten(1, t.shape[1:]) for t in (x, dt, B, C)]
        torch_form = hk.ssd_update(
            states[1], *views[:2], A, *views[2:], weight, shift, (0.0, math.inf), backend="torch"
        )
        exact = [None if t is None else t.double() for t in (x, dt, A, B, C, weight, shift)]
        want = hk.ssd_update(states[2], *exact, backend="reference")
        scale = want.abs().max().item()
        for y, after in ((native, states[0]), (torch_form, states[1])):
            torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6 * scale)
            torch.testing.assert_close(after.double(), states[2], rtol=2e-6, atol=2e-6)


def test_ssd_update_native_extremes_and_threads():
    x, dt, A, B, C, D, bias = cast(make(3)[:7], torch.float32)
    dt[0], dt[1], A[0] = 1e4, -1e4, -1e4
    start = torch.randn(3, 4, 3, 5)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            state = start.clone()
            y = hk.ssd_update(state, x, dt, A, B, C, D, bias, backend="native")
            results.append(torch.cat([y.flatten(), state.flatten()]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and results[0].isfinite().all()
    alone = start[2:].clone()
    y = hk.ssd_update(
        alone, *(t[2:] for t in (x, dt)), A, *(t[2:] for t in (B, C)), D, bias, backend="native"
    )
    assert torch.equal(y.flatten(), results[0][24:36]) and torch.equal(alone.flatten(), results[0][-60:])


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_ssd_scan_takes_slices_of_a_projection(backend):
    args = cast(make(40, ends=[0, 9, 40]), torch.float32)
    flat = testing.run(hk.ssd_scan, args, backend=backend)
    views = [
        testing.strided(a.flatten(1)).unflatten(1, a.shape[1:]) if i in ROWS else a
        for i, a in enumerate(args)
    ]
    sliced = testing.run(hk.ssd_scan, views, backend=backend)
    assert all(torch.equal(sliced[name], flat[name]) for name in flat)


def test_ssd_scan_offsets_pass_int32():
    stride = 2**30 + 8  # row 2 starts past 2^31 elements; only the rows' pages are ever touched
    wide = torch.from_numpy(np.zeros(2 * stride + 8, dtype=np.int16)).view(torch.bfloat16)
    x = wide.as_strided((3, 4, 2), (stride, 2, 1))
    args = cast(make(3, 4, 2), torch.bfloat16)
    x.copy_(args[0])
    got, want = hk.ssd_scan(x, *args[1:]), hk.ssd_scan(*args)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    states = [args[9].float().expand(3, 4, 2, 5).clone() for _ in range(2)]
    rows = [*args[1:7]]
    got_y = hk.ssd_update(states[0], x, *rows, backend="native")
    assert torch.equal(got_y, hk.ssd_update(states[1], args[0], *rows, backend="native"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("ends", [None, [0, 0, 2, 7]])
def test_ssd_scan_gradcheck(backend, ends):
    x, dt, A, B, C, D, bias, limit, cu_seqlens, state = make(7, 2, 2, 1, 2, ends)
    leaves = [t.requires_grad_() for t in (x, dt, A, B, C, D, bias, state)]
    assert torch.autograd.gradcheck(
        lambda a, b, c, d, e, f, g, h: hk.ssd_scan(
            a, b, c, d, e, f, g, limit, cu_seqlens, h, 3, backend=backend
        ),
        leaves,
        check_undefined_grad=False,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_ssd_scan_registration_and_fullgraph(backend, form):
    args = [*cast(make(9, 2, 2, 1, 3, [0, 2, 9], *form), torch.float32), 4]
    testing.check_registration("ssd_scan", *args, backend=backend)
    testing.check_fullgraph(hk.ssd_scan, args, backend)


@pytest.mark.parametrize("packed", [True, False])
def test_ssd_scan_carried_states_registration(packed):
    added, decay = torch.randn(4, 2, 3, 5, requires_grad=True), torch.rand(4, 2, requires_grad=True)
    starts = torch.randn(4 if packed else 1, 2, 3, 5, requires_grad=True)
    first = torch.tensor([True, False, True, False]) if packed else None
    carry = torch.ops.hebatron._carry_states.default
    torch.library.opcheck(carry, (added, decay, starts, first))
    torch.library.opcheck(carry, (added, decay, None, first))


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_ssd_update_registration_and_fullgraph(backend):
    x, dt, A, B, C, D, bias, limit, _, _ = cast(make(3), torch.float32)
    state = torch.randn(3, 4, 3, 5)
    testing.check_registration("ssd_update", state, x, dt, A, B, C, D, bias, limit, backend=backend)
    states = [state.clone(), state.clone()]
    torch._dynamo.reset()
    compiled = torch.compile(hk.ssd_update, fullgraph=True, backend="aot_eager")
    want = hk.ssd_update(states[0], x, dt, A, B, C, D, bias, backend=backend)
    got = compiled(states[1], x, dt, A, B, C, D, bias, backend=backend)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(states[0], states[1])
    assert not torch.equal(states[0], state)


def test_ssd_scan_torch_form_never_reads_values():
    """On the meta device a shape that depends on a value raises: so nothing waits for a GPU either."""
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in make(ends=[0, 5, 50])]
    y, state = hk.ssd_scan(*args, backend="torch")
    assert y.shape == (50, 4, 3) and state.shape == (2, 4, 3, 5)


def test_ssd_scan_says_why_not_native():
    args = cast(make(), torch.float32)
    assert "-> native" in hk.explain(hk.ssd_scan, *args)
    assert "-> torch" in hk.explain(hk.ssd_scan, *make())
    with pytest.raises(
        hk.BackendError, match=r"ssd_scan\[native\]: computes float32 and bfloat16, got float64"
    ):
        hk.ssd_scan(*make(), backend="native")
    rows, state = args[:7], torch.zeros(50, 4, 3, 5)
    assert "-> native" in hk.explain(hk.ssd_update, state, *rows)
    with pytest.raises(ValueError, match="ssd_update: arguments must not require a gradient"):
        hk.ssd_update(state, rows[0].requires_grad_(), *rows[1:])

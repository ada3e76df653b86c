"""The CUDA kernels of the causal convolution, run by the emulator: values against the oracle, the same bits in every
order of work, for a document alone and token by token, and nothing for the checked build to report."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conv_cases import FORMS, make, single
from emulated import same_bits

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

pytestmark = pytest.mark.usefixtures("emulator")

BF16, FP32 = torch.bfloat16, torch.float32
RANDOM = dict(mode="random", seed=7)
# tokens, channels, taps, ends of the sequences (None: one, without cu_seqlens). A run is 16 tokens, a block four runs.
SHAPES = [
    (0, 5, 4, None),
    (0, 3, 4, [0]),  # no sequence at all
    (0, 8, 4, [0, 0, 0]),  # nothing but states
    (1, 1, 4, None),
    (2, 17, 4, None),  # shorter than its own history
    (16, 8, 4, None),  # one run to its last token
    (113, 17, 4, [0, 1, 1, 3, 40, 113]),  # one token, empty, shorter than the history, over runs and blocks
    (70, 264, 4, [0, 17, 64, 64, 67, 70]),  # a pack past a warp; ends at, behind and before those of runs
    (12, 65, 2, [0, 0, 12, 12]),  # empty at both ends; two taps
    (9, 33, 1, [0, 4, 9]),  # one tap: no state
    (41, 6, 8, [0, 3, 20, 41]),  # the most taps
]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_conv1d_emulated_matches_oracle(dtype, form, shape):
    testing.check_oracle(hk.causal_conv1d, make(*shape, *form), dtype, "emulator")


def test_causal_conv1d_emulated_sums_long_runs():
    # 18 tokens a run, 31 partial rows; the oracle goes token by token, and 2,200 of them are the torch form's
    args = make(2200, 2)
    want = testing.run(hk.causal_conv1d, args, backend="torch")
    for name, got in testing.run(hk.causal_conv1d, single(args), backend="emulator").items():
        scale = want[name].abs().max().item()
        torch.testing.assert_close(got.double(), want[name], rtol=0, atol=2e-6 * scale, msg=name)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("channels", "taps", "form"), [(264, 4, 0), (33, 4, 2), (7, 1, 1), (5, 8, 0)])
def test_causal_conv1d_update_emulated_matches_oracle(dtype, channels, taps, form):
    x, weight, bias, act, _, _ = testing._cast(make(3, channels, taps, None, *FORMS[form]), dtype)
    state = torch.randn(3, channels, taps - 1).to(dtype)
    exact = state.double()
    y = hk.causal_conv1d_update(x, state, weight, bias, act, backend="emulator")
    want = hk.causal_conv1d_update(
        x.double(), exact, weight.double(), None if bias is None else bias.double(), act, backend="reference"
    )
    torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=4e-6)
    assert torch.equal(state.double(), exact)


def test_causal_conv1d_update_emulated_takes_more_sequences_than_blocks():
    x, weight, bias, act, _, _ = single(make(131, 3))
    states = [torch.randn(131, 3, 3)] * 2
    states[1] = states[0].clone()
    got = hk.causal_conv1d_update(x, states[0], weight, bias, act, backend="emulator")
    want = hk.causal_conv1d_update(x, states[1], weight, bias, act, backend="native")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(*states)


@pytest.mark.parametrize("channels", [10, 16])  # single elements and packs
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_causal_conv1d_emulated_split_anywhere_and_token_by_token_is_the_whole(dtype, channels):
    x, weight, bias, act, _, state = testing._cast(make(21, channels), dtype)
    run = partial(hk.causal_conv1d, backend="emulator")
    whole, last = run(x, weight, bias, act, None, state)
    for k in (0, 1, 2, 16, 18, 21):
        first, middle = run(x[:k], weight, bias, act, None, state)
        second, end = run(x[k:], weight, bias, act, None, middle)
        assert torch.equal(torch.cat([first, second]), whole) and torch.equal(end, last), k
    y, state = run(x[:5], weight, bias, act, None, state)
    for t in range(5, 21):
        one = hk.causal_conv1d_update(x[t : t + 1], state, weight, bias, act, backend="emulator")
        y = torch.cat([y, one])
    assert torch.equal(y, whole) and torch.equal(state, last)


def test_causal_conv1d_emulated_document_alone_is_packed_and_a_poisoned_one_stays_alone():
    ends = [0, 7, 7, 9, 40, 75]
    args = single(make(75, 12, ends=ends))
    packed = testing.run(hk.causal_conv1d, args, backend="emulator")
    for q, (begin, end) in enumerate(pairwise(ends)):
        alone = hk.causal_conv1d(args[0][begin:end], *args[1:4], None, args[5][q : q + 1], backend="emulator")
        assert torch.equal(alone[0], packed["out0"][begin:end]) and torch.equal(
            alone[1][0], packed["out1"][q]
        )
    args[0][9:40], args[5][3] = torch.nan, torch.nan
    got = testing.run(hk.causal_conv1d, args, backend="emulator")
    assert got["out0"][9:40].isnan().all()
    for name in ("out0", "grad0"):
        for clean in (slice(0, 9), slice(40, 75)):
            assert torch.equal(got[name][clean], packed[name][clean])
    for name in ("out1", "grad5"):
        assert torch.equal(got[name][[0, 1, 2, 4]], packed[name][[0, 1, 2, 4]])


def test_causal_conv1d_emulated_takes_strided_rows():
    args = single(make(23, 16, ends=[0, 5, 23]))
    flat = testing.run(hk.causal_conv1d, args, backend="emulator")
    for extra in (3, 16):  # rows that start on no pack, and on one
        views = [
            testing.strided(args[0], extra),
            testing.strided(args[1]),
            *args[2:5],
            testing.strided(args[5]),
        ]
        sliced = testing.run(hk.causal_conv1d, views, backend="emulator")
        assert all(torch.equal(sliced[name], flat[name]) for name in flat)


def test_causal_conv1d_emulated_offsets_pass_int32():
    stride = 2**30 + 8  # row 2 starts past 2^31 elements; only the rows' pages are ever touched
    wide = torch.from_numpy(np.zeros(2 * stride + 8, dtype=np.int16)).view(BF16)
    x = wide.as_strided((3, 8), (stride, 1))
    x.copy_(torch.randn(3, 8))
    args = testing._cast(make(3, 8)[1:], BF16)
    got = testing.run(hk.causal_conv1d, [x, *args], backend="emulator")
    want = testing.run(
        hk.causal_conv1d, [x.clone(memory_format=torch.contiguous_format), *args], backend="emulator"
    )
    assert all(torch.equal(got[name], want[name]) for name in want)
    state = torch.randn(3, 8, 3).to(BF16)
    ones = [hk.causal_conv1d_update(v, state.clone(), *args[:3], backend="emulator") for v in (x, x.clone())]
    assert torch.equal(*ones)


@pytest.mark.parametrize("ends", [[0, 90, -7, 3], [5, 5, 4], [2**31 - 1, -(2**31), 9], [0, 3, 3]])
def test_causal_conv1d_emulated_survives_ends_the_host_may_not_read(checked, ends):
    x, weight, bias, act, _, _ = single(make(20, 8))
    cu_seqlens, state = torch.tensor(ends, dtype=torch.int32), torch.ones(len(ends) - 1, 8, 3)
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]
    y, last = torch.ops.hebatron._causal_conv1d(x, weight, bias, act, cu_seqlens, state, "emulator")
    assert y.isfinite().all() and last.isfinite().all()
    grads = [torch.ones_like(y), torch.ones_like(last)]
    found = torch.ops.hebatron._causal_conv1d_bwd(grads, *leaves[:3], act, cu_seqlens, state, "emulator")
    assert all(value.isfinite().all() for value in found)


def test_causal_conv1d_emulated_gives_the_same_bits_in_every_order():
    same_bits(hk.causal_conv1d, testing._cast(make(80, 40, ends=[0, 3, 50, 80]), BF16))


@pytest.mark.parametrize("order", [{}, RANDOM])
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 2, 4, 7, 10)])
def test_causal_conv1d_has_no_race(checked, shape, order):
    with testing.emulate(**order):
        testing.check_oracle(hk.causal_conv1d, make(*shape), BF16, "emulator")
        x, weight, bias, act, _, _ = testing._cast(make(3, *shape[1:3]), BF16)
        state = torch.randn(3, shape[1], shape[2] - 1).to(BF16)
        hk.causal_conv1d_update(x, state, weight, bias, act, backend="emulator")


def test_causal_conv1d_emulated_is_a_fixed_sequence_of_launches():
    take = _native.emulator_module.take_statistics
    args = single(make(30, 8, ends=[0, 9, 30]))
    take()
    hk.causal_conv1d(*args, backend="emulator")
    assert take()["launches"] == 1
    testing.run(hk.causal_conv1d, args, backend="emulator")
    assert take()["launches"] == 3  # the backward has two


def test_causal_conv1d_kernels_say_why_they_refuse():
    with pytest.raises(hk.BackendError, match=r"causal_conv1d\[emulator\]: takes at most 8 taps, got 9"):
        hk.causal_conv1d(*single(make(5, 4, 9)), backend="emulator")
    x, weight, bias, act, _, state = make(1, 4)
    with pytest.raises(hk.BackendError, match="computes float32 and bfloat16, got float64"):
        hk.causal_conv1d_update(x, state, weight, bias, act, backend="emulator")


def test_causal_conv1d_emulated_registers_and_compiles_to_one_graph():
    args = single(make(11, 6, 4, [0, 2, 11]))
    testing.check_registration("causal_conv1d", *args, backend="emulator")
    testing.check_fullgraph(hk.causal_conv1d, args, "emulator")
    update = [args[0][:2], torch.randn(2, 6, 3), *args[1:4]]
    testing.check_registration("causal_conv1d_update", *update, backend="emulator")

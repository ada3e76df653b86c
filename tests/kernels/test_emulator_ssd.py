"""The state-space scan's CUDA kernels, run by the emulator: values against the oracle, the same bits in every order of
work and beside any other sequence, and nothing for the checked build to report."""

import numpy as np
import pytest
import torch
from emulated import ORDERS, same_bits
from ssd_cases import ROWS, assert_close, cast, make

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

pytestmark = pytest.mark.usefixtures("emulator")

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16]
RANDOM = dict(mode="random", seed=7)
GRADIENTS = True


# ---- ssd_update ----

# sequences, heads, head dim, groups, state: the model's head; a block's rows and one more, a tail of packs; one value;
# single values, more than a warp of them; a state of more packs than a warp has lanes
UPDATES = [(2, 2, 64, 1, 128), (1, 4, 17, 2, 20), (3, 1, 1, 1, 1), (2, 3, 5, 3, 37), (1, 2, 3, 1, 136)]


def one_token(sequences, heads, head_dim, groups, state, dtype, D=True):
    args = cast(make(sequences, heads, head_dim, groups, state, D=D, bias=D)[:8], dtype)
    return [torch.randn(sequences, heads, head_dim, state), *args]


def updated(args, backend):
    """y and the state behind it; the one given stays."""
    state = args[0].clone()
    return hk.ssd_update(state, *args[1:], backend=backend), state


def check_update(args):
    y, state = updated(args, "emulator")
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    want_y, want_state = updated(exact, "reference")
    scale = want_y.abs().max().item()
    torch.testing.assert_close(y.double(), want_y, rtol=torch.finfo(y.dtype).eps, atol=1e-6 * scale)
    torch.testing.assert_close(state.double(), want_state, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("D", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", UPDATES)
def test_ssd_update_emulated_matches_oracle(size, dtype, D):
    check_update(one_token(*size, dtype, D))


def test_ssd_update_emulated_keeps_tails_limits_and_nan():
    args = one_token(6, 4, 3, 2, 5, FP32)
    args[2] = torch.tensor([1e4, -1e4, 22.0, -22.0, 0.3, torch.nan])[:, None].expand(6, 4).contiguous()
    args[3], args[7] = torch.tensor([-1e4, -1.0, -1e-30, -1.0]), torch.zeros(4)
    y, state = updated(args, "emulator")
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    want_y, want_state = updated(exact, "reference")
    torch.testing.assert_close(y.double(), want_y, rtol=4e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(state.double(), want_state, rtol=4e-6, atol=0, equal_nan=True)
    assert y[5].isnan().all() and y[:5].isfinite().all()
    args[8] = (0.2, 0.6)
    check_update([a[:5] if i in (0, 1, 2, 4, 5) else a for i, a in enumerate(args)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_update_emulated_does_not_see_its_batch(dtype):
    args = one_token(5, 2, 20, 1, 12, dtype)
    y, state = updated(args, "emulator")
    for order in ORDERS:
        with testing.emulate(**order):
            again = updated(args, "emulator")
        assert torch.equal(again[0], y) and torch.equal(again[1], state), order
    alone = updated([a[3:4] if i in (0, 1, 2, 4, 5) else a for i, a in enumerate(args)], "emulator")
    assert torch.equal(alone[0], y[3:4]) and torch.equal(alone[1], state[3:4])


def test_ssd_update_emulated_takes_slices_of_a_projection():
    args = one_token(3, 4, 8, 2, 16, BF16)
    want = updated(args, "emulator")
    for extra in (3, 4):  # rows that start on no pack, and on one
        views = [
            testing.strided(a.flatten(1), extra).unflatten(1, a.shape[1:]) if i in (1, 4, 5) else a
            for i, a in enumerate(args)
        ]
        got = updated(views, "emulator")
        torch.testing.assert_close(got[0], want[0], rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)


def test_ssd_update_emulated_offsets_pass_int32():
    stride = 2**30 + 8  # row 2 starts past 2^31 elements; only the rows' pages are ever touched
    wide = torch.from_numpy(np.zeros(2 * stride + 8, dtype=np.int16)).view(BF16)
    args = one_token(3, 4, 2, 1, 8, BF16)
    want = updated(args, "emulator")
    for i, row in ((1, (2, 1)), (4, (8, 1)), (5, (8, 1))):
        view = wide.as_strided(args[i].shape, (stride, *row))
        view.copy_(args[i])
        got = updated([view if j == i else a for j, a in enumerate(args)], "emulator")
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), i


@pytest.mark.parametrize("order", [{}, RANDOM])
@pytest.mark.parametrize("size", [(2, 2, 18, 1, 20), (1, 3, 5, 3, 37)])
def test_ssd_update_has_no_race(checked, size, order):
    with testing.emulate(**order):
        check_update(one_token(*size, BF16))


def test_ssd_update_emulated_is_one_launch_and_none_for_nothing():
    _native.emulator_module.take_statistics()
    updated(one_token(2, 2, 4, 1, 4, FP32), "emulator")
    assert _native.emulator_module.take_statistics()["launches"] == 1
    y, _ = updated(one_token(0, 2, 4, 1, 4, FP32), "emulator")
    assert y.shape == (0, 2, 4) and _native.emulator_module.take_statistics()["launches"] == 0


# ---- ssd_scan ----

# tokens, heads, head dim, groups, state, ends of the sequences (None: one, no cu_seqlens), chunk_size (a segment is 16
# chunks). The model's head, a chunk and more; an empty sequence, one token, one over a chunk; a group a head, over a
# segment; two slices of a head and several segments; nothing at all, and only empty sequences.
SCANS = [
    (70, 2, 64, 1, 128, None, 128),
    (150, 2, 8, 1, 16, [0, 0, 1, 66, 66, 150], 64),
    (18, 2, 16, 2, 40, [0, 18], 1),
    (70, 1, 72, 1, 24, [0, 3, 70], 4),
    (0, 2, 8, 1, 8, [0], 64),
    (0, 2, 8, 1, 8, [0, 0, 0], 64),
]


def scan_args(tokens, heads, head_dim, groups, state, ends, chunk, options=True):
    return [*make(tokens, heads, head_dim, groups, state, ends, *[options] * 3), chunk]


def rows_of(args, begin, end):
    return [a[begin:end] if i in ROWS else a for i, a in enumerate(args)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scan", SCANS)
def test_ssd_scan_emulated_matches_oracle(scan, dtype):
    testing.check_oracle(hk.ssd_scan, scan_args(*scan), dtype, "emulator", GRADIENTS and scan[0] > 0)


def test_ssd_scan_emulated_matches_oracle_without_options():
    testing.check_oracle(hk.ssd_scan, scan_args(*SCANS[2], False), BF16, "emulator", GRADIENTS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_scan_emulated_keeps_small_decays_after_a_large_step(dtype):
    """A sum of log decays in fp32 alone would lose them: after a step of 1e4 its rounding step is 1e-3."""
    args = cast(scan_args(64, 2, 8, 1, 8, None, 64), dtype)
    args[1][[5, 6, 40]] = 1e4
    args[2][0], args[2][1] = -1e4, -0.01
    want = hk.ssd_scan(*cast(args, torch.float64), backend="reference")
    got = hk.ssd_scan(*args, backend="emulator")
    rows = [t for t in range(64) if t not in (5, 6, 40)]  # the large steps' own rows would hide the others
    for head in (0, 1):
        pair = {"y": got[0][rows, head]}, {"y": want[0][rows, head]}
        assert_close(*pair, 2e-6 if dtype == FP32 else 2 * torch.finfo(BF16).eps)


def test_ssd_scan_emulated_keeps_tails_and_limits():
    args = cast(scan_args(40, 4, 8, 2, 8, None, 64), FP32)
    args[1][::3], args[1][1::3], args[9], args[6] = 22.0, -22.0, 1e9 * args[9], None
    args[2].fill_(-1.0)
    want = hk.ssd_scan(*cast(args, torch.float64), backend="reference")
    got = hk.ssd_scan(*args, backend="emulator")
    assert_close({"y": got[0]}, {"y": want[0]}, 2e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=5e-6, atol=1e-9)
    args = scan_args(40, 4, 8, 2, 8, None, 64)
    args[7] = (0.2, 0.6)
    testing.check_oracle(hk.ssd_scan, args, BF16, "emulator", GRADIENTS)
    args[2] = 0.05 * args[2].abs()  # a rate that grows
    testing.check_oracle(hk.ssd_scan, args, FP32, "emulator", GRADIENTS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_scan_emulated_does_not_see_its_batch_nor_where_it_is_cut(dtype):
    """A sequence alone is itself packed, and its pieces of whole segments (16 tokens here) are the whole to the bit."""
    args = cast(scan_args(44, 1, 16, 1, 16, [0, 3, 3, 43, 44], 1), dtype)
    args[9] = args[9].float()
    y, last = hk.ssd_scan(*args, backend="emulator")
    for q, begin, end in ((0, 0, 3), (3, 43, 44)):
        alone = rows_of(args, begin, end)
        alone[8], alone[9] = None, args[9][q : q + 1]
        got = hk.ssd_scan(*alone, backend="emulator")
        assert torch.equal(got[0], y[begin:end]) and torch.equal(got[1], last[q : q + 1])
    state, pieces = args[9][2:3], []
    for begin, end in ((3, 19), (19, 35), (35, 43)):
        piece = rows_of(args, begin, end)
        piece[8], piece[9] = None, state
        part, state = hk.ssd_scan(*piece, backend="emulator")
        pieces.append(part)
    assert torch.equal(torch.cat(pieces), y[3:43]) and torch.equal(state, last[2:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd_scan_emulated_causes_before_effects(dtype):
    args = cast(scan_args(70, 1, 8, 1, 8, None, 64), dtype)
    whole = hk.ssd_scan(*args, backend="emulator")[0]
    for end in (1, 16, 17, 65):
        assert torch.equal(hk.ssd_scan(*rows_of(args, 0, end), backend="emulator")[0], whole[:end]), end


def test_ssd_scan_emulated_gives_the_same_bits_in_every_order():
    same_bits(hk.ssd_scan, cast(scan_args(19, 2, 24, 1, 16, [0, 2, 19], 1), BF16), GRADIENTS)


@pytest.mark.parametrize("order", [{}, RANDOM])
def test_ssd_scan_has_no_race(checked, order):
    nothing, two_segments, two_chunks, fp32 = (
        (0, 2, 8, 1, 8, [0, 0, 0], 64),
        (19, 1, 24, 1, 24, [0, 2, 19], 1),
        (66, 1, 8, 1, 8, None, 64),
        (34, 1, 8, 1, 8, None, 64),
    )
    with testing.emulate(**order):
        for scan in (nothing, two_segments, two_chunks):
            testing.check_oracle(hk.ssd_scan, scan_args(*scan), BF16, "emulator", GRADIENTS and scan[0] > 0)
        testing.check_oracle(hk.ssd_scan, scan_args(*fp32), FP32, "emulator", GRADIENTS)


def test_ssd_scan_emulated_takes_slices_of_a_projection_and_mixed_dtypes():
    args = cast(scan_args(40, 2, 16, 2, 16, [0, 9, 40], 64), BF16)
    for i in (2, 5, 6, 9):
        args[i] = args[i].float()
    want = hk.ssd_scan(*args, backend="emulator")
    views = list(args)
    for i in (0, 3, 4):
        wide = torch.full((40, args[i][0].numel() + 24), torch.nan).to(BF16)
        wide[:, 8:-16] = args[i].flatten(1)
        views[i] = wide[:, 8:-16].unflatten(1, args[i].shape[1:])
    got = hk.ssd_scan(*views, backend="emulator")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_ssd_scan_emulated_offsets_pass_int32():
    stride = 2**30 + 8  # row 2 starts past 2^31 elements; only the rows' pages are ever touched
    wide = torch.from_numpy(np.zeros(2 * stride + 64, dtype=np.int16)).view(BF16)
    args = cast(scan_args(3, 1, 8, 1, 16, None, 64), BF16)
    want = hk.ssd_scan(*args, backend="emulator")
    for i in (0, 3, 4):
        view = wide.as_strided(args[i].shape, (stride, args[i].shape[2], 1))
        view.copy_(args[i])
        got = hk.ssd_scan(*[view if j == i else a for j, a in enumerate(args)], backend="emulator")
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), i


def test_ssd_scan_emulated_is_three_launches_whatever_the_lengths():
    for ends in ([0, 18], [0, 1, 1, 18]):
        _native.emulator_module.take_statistics()
        hk.ssd_scan(*cast(scan_args(18, 1, 8, 1, 8, ends, 1), BF16), backend="emulator")
        assert _native.emulator_module.take_statistics()["launches"] == 3


def test_ssd_scan_kernels_say_why_they_refuse():
    def refused(reason, args):
        with pytest.raises(hk.BackendError, match=reason):
            hk.ssd_scan(*args, backend="emulator")

    refused("head dim to be a multiple of 8, got 12", cast(scan_args(4, 1, 12, 1, 8, None, 64), BF16))
    refused("state to be a multiple of 8 up to 128, got 12", cast(scan_args(4, 1, 8, 1, 12, None, 64), BF16))
    refused(
        "state to be a multiple of 8 up to 128, got 136", cast(scan_args(4, 1, 8, 1, 136, None, 64), BF16)
    )
    args = cast(scan_args(4, 1, 8, 1, 8, None, 64), BF16)
    args[0] = testing.strided(args[0].flatten(1)).unflatten(1, (1, 8))
    refused("rows of x_THP to start on 16 bytes", args)

"""The state-space scan's CUDA kernels, run by the emulator: values against the oracle, the same bits in every order of
work and beside any other sequence, and nothing for the checked build to report."""

import numpy as np
import pytest
import torch
from emulated import ORDERS
from ssd_cases import cast, make

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

pytestmark = pytest.mark.usefixtures("emulator")

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16]
RANDOM = dict(mode="random", seed=7)


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

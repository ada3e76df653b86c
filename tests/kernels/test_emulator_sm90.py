"""The sm_90a kernels of grouped_gemm and its gradients under the emulator: every tile, layout and way back against the
oracle, the same bits in every order of work in flight, nothing read or written that is not theirs, no race."""

import mmap
from functools import partial

import pytest
import torch
from emulated import same_bits_in_every_order
from gemm_cases import (
    call_gemm,
    check_relu2,
    check_way_back_is_zero_where_the_scale_is_or_nothing_is_summed,
    check_way_back_keeps_nan_to_its_row_and_expert,
    check_wgrad,
    check_wgrad_takes_no_nan_from_its_neighbours,
    products,
    relu2_args,
    rows_of,
    weight_grad,
    wgrad_args,
)

from hebatron_kernels import testing


def tiles(text):
    return [f"sm90a:{tile}" for tile in text.split()]


K_TILES = tiles(
    "64x128 64x256 128x128 128x208 128x224 128x232 192x208 192x224 256x192 256x208 384x208 512x192"
)
N_TILES = tiles("64x128 64x256 128x192 192x192 256x192 384x192 512x192")
WGRAD_TILES = tiles("128x192 192x192 256x192")
STEP = 64  # rows that a step of the gradient of the weights sums over
LAYOUTS = [*((tile, True) for tile in K_TILES), *((tile, False) for tile in N_TILES)]
# one of each kind: columns side by side, three warpgroups by halves, a cluster, columns in groups of 64
KINDS = [("sm90a:64x256", True), ("sm90a:192x208", True), ("sm90a:384x208", True), ("sm90a:384x192", False)]

pytestmark = pytest.mark.usefixtures("emulator")


def check_product(tile, case, inner, outputs, gathered, by_output):
    args = relu2_args(case, rows_of(tile), inner, outputs, gathered, by_output)[:4]
    testing.check_oracle(partial(plain, implementation=tile), args, torch.bfloat16, "emulator", grad=False)


def plain(a, b, ends, rows, *, backend, implementation=None):
    if backend == "emulator":
        return call_gemm(a, b, ends, rows, None, relu2=False, implementation=implementation)
    return products(a, b, ends, rows)


# K: a tail of 8 behind a whole step; N: tails of every tile
@pytest.mark.parametrize(("tile", "by_output"), LAYOUTS)
def test_sm90_tile_matches_oracle(tile, by_output):
    check_relu2(tile, "edges", 72, 280, True, by_output)
    check_product(tile, "few", 72, 136, False, by_output)


@pytest.mark.slow
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("case", "inner", "outputs"),
    [
        ("edges", 72, 136),
        ("one for all", 8, 8),
        ("one row", 10 * 64 + 40, 240),
        ("forty", 72, 136),
        ("none", 8, 8),
        ("all past the end", 72, 136),
        ("few", 10 * 64 + 40, 464),
    ],
)
@pytest.mark.parametrize(("tile", "by_output"), LAYOUTS)
def test_sm90_tile_matches_oracle_everywhere(tile, by_output, case, inner, outputs, kept, gathered):
    check = check_relu2 if kept else check_product
    check(tile, case, inner, outputs, gathered, by_output)


@pytest.mark.parametrize(("tile", "by_output"), KINDS)
def test_sm90_gives_the_same_bits_in_every_order(tile, by_output):
    args = testing._cast(relu2_args("few", 64, 136, 232, True, by_output), torch.bfloat16)
    same_bits_in_every_order(partial(call_gemm, *args, implementation=tile))


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "by_output"), LAYOUTS)
def test_sm90_gives_the_same_bits_in_every_order_with_every_tile(tile, by_output):
    for gathered in (False, True):
        args = testing._cast(relu2_args("edges", 64, 10 * 64 + 8, 232, gathered, by_output), torch.bfloat16)
        same_bits_in_every_order(partial(call_gemm, *args, implementation=tile))


@pytest.mark.parametrize(("tile", "by_output"), LAYOUTS)
def test_sm90_way_back_keeps_nan_to_its_row_and_expert(tile, by_output):
    check_way_back_keeps_nan_to_its_row_and_expert(tile, by_output)


def test_sm90_way_back_is_zero_where_the_scale_is_or_nothing_is_summed():
    check_way_back_is_zero_where_the_scale_is_or_nothing_is_summed("sm90a:192x192")


@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=5)])
@pytest.mark.parametrize(("tile", "by_output"), KINDS)
def test_sm90_has_no_race(tile, by_output, order):
    with testing.emulate(checked=True, **order):
        check_relu2(tile, "few", 72, 232, True, by_output)


@pytest.mark.slow
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    ("case", "inner", "outputs"), [("edges", 72, 136), ("few", 10 * 64 + 40, 240), ("all past the end", 8, 8)]
)
@pytest.mark.parametrize(("tile", "by_output"), LAYOUTS)
def test_sm90_has_no_race_with_any_tile(tile, by_output, case, inner, outputs, gathered):
    for order in (dict(mode="lazy"), dict(mode="random", seed=5)):
        with testing.emulate(checked=True, **order):
            check_relu2(tile, case, inner, outputs, gathered, by_output)


# ---- the gradient of the weights ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", WGRAD_TILES)
def test_sm90_wgrad_matches_oracle(tile, transposed):
    check_wgrad(tile, "edges", STEP, 264, 200, True, transposed, torch.bfloat16)
    check_wgrad(tile, "few", STEP, 72, 8, False, transposed, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("case", "width", "outputs"),
    [
        ("edges", 264, 200),
        ("few", 8, 8),
        ("one for all", 200, 392),
        ("one row", 72, 136),
        ("forty", 72, 136),
        ("none", 264, 200),
        ("all past the end", 72, 136),
    ],
)
@pytest.mark.parametrize("tile", WGRAD_TILES)
def test_sm90_wgrad_matches_oracle_everywhere(tile, case, width, outputs, dtype, gathered, transposed):
    check_wgrad(tile, case, STEP, width, outputs, gathered, transposed, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", WGRAD_TILES)
def test_sm90_wgrad_takes_no_nan_from_its_neighbours(tile, transposed):
    # more rows than a step: those of expert 2 come into shared memory with the last of expert 1
    check_wgrad_takes_no_nan_from_its_neighbours(tile, 70, transposed)


@pytest.mark.parametrize("tile", WGRAD_TILES)
def test_sm90_wgrad_gives_the_same_bits_in_every_order(tile):
    a, b, ends, rows = wgrad_args("edges", 6 * 64, 72, 136)
    call = partial(
        weight_grad, a.bfloat16(), b.bfloat16(), ends, rows, True, torch.bfloat16, backend="emulator"
    )
    same_bits_in_every_order(partial(call, implementation=tile))


@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=6)])
def test_sm90_wgrad_has_no_race(order):
    with testing.emulate(checked=True, **order):
        check_wgrad("sm90a:192x192", "edges", STEP, 72, 136, True, True, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("case", "width", "outputs"), [("edges", 264, 136), ("few", 72, 200), ("one for all", 72, 8)]
)
@pytest.mark.parametrize("tile", WGRAD_TILES)
def test_sm90_wgrad_has_no_race_anywhere(tile, case, width, outputs, dtype, transposed):
    for order in (dict(mode="lazy"), dict(mode="random", seed=6)):
        with testing.emulate(checked=True, **order):
            check_wgrad(tile, case, STEP, width, outputs, True, transposed, dtype)


# ---- offsets past 2^31 elements (results: tests/emulator/cases/offsets.cu) ----


def far_apart(values, stride):
    """The same rows, so many elements apart: addresses without memory between them."""
    rows, width = values.shape
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, ((rows - 1) * stride + width) * values.element_size(), flags=flags)
    far = torch.frombuffer(memory, dtype=values.dtype).as_strided((rows, width), (stride, 1))
    return far.copy_(values)


# the rows of a pass 2^31 elements, and 2^31 packs of 16 bytes, of which the gather's offsets may have 2^32
@pytest.mark.parametrize("stride", [2**31 + 8, 2**32 // 3 * 8 - 64])
def test_sm90_takes_rows_and_weights_far_apart(stride):
    a, b, ends, rows, scale, kept = testing._cast(relu2_args("few", 64, 72, 16), torch.bfloat16)
    a, rows = a[:3].clone(), rows % 3
    want = call_gemm(a, b, ends, rows, scale, kept, implementation="sm90a:64x128")
    far = far_apart(a, stride)
    got = call_gemm(far, b, ends, rows, scale, kept, implementation="sm90a:64x128")
    assert all(torch.equal(mine, first) for mine, first in zip(got, want))
    grad = torch.randn(len(rows), 136).bfloat16()
    call = partial(
        weight_grad, ends=ends, rows=rows, transposed=False, out_dtype=torch.float32, backend="emulator"
    )
    want = call(a, grad, implementation="sm90a:128x192")
    assert torch.equal(call(far, grad, implementation="sm90a:128x192"), want)
    if stride == 2**31 + 8:
        got = call(far, far_apart(grad, stride), implementation="sm90a:128x192")
        assert torch.equal(got, want)

"""The sm_80 kernels of grouped_gemm's gradients under the emulator: every tile and way back against the oracle, the
same bits in every order of work in flight, nothing read or written that is not theirs, no race; the gradients made of
them. Bugs planted in these kernels must be found by the same checks."""

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
    relu2_args,
    weight_grad,
    wgrad_args,
)
from moe_cases import FORMS, groups, with_form
from planted import planted

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

# 128x128 has fewer stages on chips with 99 KB a block
TILES = [("sm80:16x64", 227), ("sm80:64x128", 227), ("sm80:128x128", 227), ("sm80:128x128", 99)]
WGRAD_TILES = TILES[1:]
STEP = 33  # rows: a stage of the gradient of the weights sums over 32

pytestmark = pytest.mark.usefixtures("emulator")


def chip(shared):
    return dict(bytes_shared=shared * 1024, compute_capability=89 if shared == 99 else 80)


# ---- the way back through relu2 ----


# K: a tail of 8 behind whole stages and more of them than are in flight; N: tails of every tile
@pytest.mark.parametrize(
    ("case", "inner", "outputs"),
    [
        ("edges", 72, 136),
        ("one for all", 8, 8),
        ("one row", 8 * 64 + 40, 240),
        ("forty", 72, 136),
        ("none", 8, 8),
        ("all past the end", 72, 136),
    ],
)
@pytest.mark.parametrize(("tile", "shared"), TILES)
def test_sm80_way_back_matches_oracle(tile, shared, case, inner, outputs):
    with testing.emulate(**chip(shared)):
        check_relu2(tile, case, inner, outputs, gathered=case != "forty")


@pytest.mark.parametrize(("tile", "shared"), TILES[:3])
def test_sm80_way_back_keeps_nan_to_its_row_and_expert(tile, shared):
    check_way_back_keeps_nan_to_its_row_and_expert(tile)


def test_sm80_way_back_is_zero_where_the_scale_is_or_nothing_is_summed():
    check_way_back_is_zero_where_the_scale_is_or_nothing_is_summed("sm80:64x128")


@pytest.mark.parametrize("tile", ["sm80:16x64", "sm80:128x128"])
def test_sm80_way_back_gives_the_same_bits_in_every_order(tile):
    args = testing._cast(relu2_args("edges", 64, 8 * 64 + 40, 136), torch.bfloat16)
    same_bits_in_every_order(partial(call_gemm, *args, implementation=tile))


# K of one stage alone: the sums of rows lie where it is still being read
@pytest.mark.parametrize("inner", [72, 24])
@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=5)])
@pytest.mark.parametrize("tile", ["sm80:16x64", "sm80:64x128", "sm80:128x128"])
def test_sm80_way_back_has_no_race(tile, order, inner):
    with testing.emulate(checked=True, **order):
        check_relu2(tile, "edges", inner, 136, True)


# ---- the gradient of the weights ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("case", "width", "outputs"),
    [
        ("edges", 136, 72),
        ("few", 8, 8),
        ("one for all", 72, 136),
        ("one row", 264, 72),
        ("forty", 72, 8),
        ("none", 136, 72),
        ("all past the end", 8, 136),
    ],
)
@pytest.mark.parametrize(("tile", "shared"), WGRAD_TILES)
def test_sm80_wgrad_matches_oracle(tile, shared, case, width, outputs, dtype, transposed):
    with testing.emulate(**chip(shared)):
        check_wgrad(tile, case, STEP, width, outputs, case in ("edges", "forty"), transposed, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", ["sm80:64x128", "sm80:128x128"])
def test_sm80_wgrad_takes_no_nan_from_its_neighbours(tile, transposed):
    check_wgrad_takes_no_nan_from_its_neighbours(tile, STEP, transposed)


@pytest.mark.parametrize("tile", ["sm80:64x128", "sm80:128x128"])
def test_sm80_wgrad_gives_the_same_bits_in_every_order(tile):
    a, b, ends, rows = wgrad_args("edges", 200, 72, 136)
    call = partial(
        weight_grad, a.bfloat16(), b.bfloat16(), ends, rows, True, torch.bfloat16, backend="emulator"
    )
    same_bits_in_every_order(partial(call, implementation=tile))


@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=6)])
@pytest.mark.parametrize(("transposed", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("tile", ["sm80:64x128", "sm80:128x128"])
def test_sm80_wgrad_has_no_race(tile, transposed, dtype, order):
    with testing.emulate(checked=True, **order):
        check_wgrad(tile, "edges", STEP, 72, 136, True, transposed, dtype)


def test_sm80_gradients_say_why_they_refuse():
    a, b, ends, rows = wgrad_args("few", 16, 72, 136)
    a, b = a.bfloat16(), b.bfloat16()
    run = partial(
        weight_grad, transposed=False, out_dtype=torch.bfloat16, backend="emulator", implementation="sm80"
    )
    for wrong, reason in [
        (dict(m=68), "m and n must be multiples of 8"),
        (dict(a_stride=68), "the strides of a and b must be multiples of 8"),
        (
            dict(out=torch.zeros(80000, dtype=torch.bfloat16)[4:]),
            "a, b and out must start on a multiple of 16 bytes",
        ),
        (dict(tile_m=32, tile_n=32), "the tile must be 64x128 or 128x128"),
        (dict(dtype="float32"), "a and b must be bf16"),
    ]:
        with pytest.raises(ValueError, match=rf"grouped_gemm_wgrad\[sm80\]: {reason}"):
            run(a, b, ends, rows, **wrong)
    args = testing._cast(relu2_args("few", 16, 72, 136, by_output=True), torch.bfloat16)
    with pytest.raises(ValueError, match=r"grouped_gemm\[sm80\]: needs n contiguous in b for the way back"):
        call_gemm(*args, implementation="sm80")


# ---- the public gradients ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", ["outputs last", "width last"])
def test_grouped_gemm_emulated_has_its_gradients_from_the_kernels(form, stored):
    args = with_form(groups(4, 72, 40, [3, 3, 9, 40], 43), form)
    if stored == "outputs last":
        args[1] = args[1].contiguous()
    take = _native.emulator_module.take_statistics
    with testing.emulate(compute_capability=80):
        testing.check_oracle(hk.grouped_gemm, args, torch.bfloat16, "emulator")
        take()
        testing.run(hk.grouped_gemm, testing._cast(args, torch.bfloat16), backend="emulator")
    assert take()["launches"] == (3 if form[1:] == (False, None) else 4)  # with an epilogue the product again


# ---- planted bugs: each in the place where a real one would stand, and what must find it ----

BUGS = {
    "stage refilled while others read it": (
        "grouped_gemm_sm80.cuh",
        "        cp_async_wait<T::kStages - 2>();\n        block_sync();\n        slot =",
        "        cp_async_wait<T::kStages - 2>();\n        slot =",
        "data race in shared memory",
    ),
    "one stage too few waited for": (
        "grouped_gemm_sm80.cuh",
        "      } else if (turn + 1 < turns) {\n        cp_async_wait<T::kStages - 2>();",
        "      } else if (turn + 1 < turns) {\n        cp_async_wait<T::kStages - 1>();",
        "data race in shared memory",
    ),
    "rows of the next expert multiplied": (
        "grouped_gemm_wgrad_sm80.cu",
        "in && r < k);",
        "in);",
        "over the bound|differs|nan|past the end",
    ),
    "sums of rows written over a stage that is read": (
        "grouped_gemm_sm80.cu",
        "    block_sync();  // the stages are read: the sums of rows take their place\n",
        "",
        "data race in shared memory",
    ),
    "index read past the last row": (
        "grouped_gemm_wgrad_sm80.cu",
        "rows && r < k ? rows[r]",
        "rows ? rows[r]",
        "past the end of rows_of_a",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_sm80_planted_bug_is_found(bug):
    file, right, wrong, says = BUGS[bug]
    with planted(f"cuda/{file}", right, wrong):
        with pytest.raises((RuntimeError, AssertionError), match=says):
            for order in (dict(mode="lazy"), dict(mode="random", seed=6)):
                with testing.emulate(**order):
                    check_relu2("sm80:128x128", "edges", 200, 136, True)
                    check_relu2("sm80:128x128", "edges", 24, 136, True)
                    check_wgrad("sm80:64x128", "edges", STEP, 72, 136, True, False, torch.float32)

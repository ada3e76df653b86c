"""The CUDA kernels of the operators, run by the emulator: values against the oracle on the plain build, the same bits
in whatever order work in flight is done, and no race, access out of bounds or undefined behaviour on the checked."""

from functools import partial

import pytest
import torch
from emulated import same_bits
from moe_cases import FORMS, groups, with_form

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

# rows, width, group: one element, odd sizes (no packs of 16 bytes), the edges of a warp and of packs, one group of 512
# columns and many, no rows
SHAPES = [
    (1, 1, 1),
    (3, 113, 113),
    (2, 1023, 341),
    (65, 48, 16),
    (5, 17, 17),
    (0, 32, 8),
    (130, 33, 11),
    (2, 4096, 512),
    (3, 2688, 2688),
]
RESIDUAL_AND_GATE = [(False, False), (True, False), (False, True), (True, True)]
TILES = [
    *(f"sm80:{tile}" for tile in ("16x64", "64x128", "128x128")),
    *(f"sm90a:{tile}" for tile in ("128x128", "128x208", "128x224", "128x232", "256x192")),
]


pytestmark = pytest.mark.usefixtures("emulator")


# ---- rms_norm ----


def norm_args(rows, width, group, residual, gate, dtype=torch.float64):
    def noise():
        return torch.randn(rows, width, dtype=dtype)

    weight = 1 + 0.3 * torch.randn(width, dtype=dtype)
    return [noise(), weight, 1e-5, noise() if residual else None, noise() if gate else None, group]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("residual", "gate"), RESIDUAL_AND_GATE)
@pytest.mark.parametrize(("rows", "width", "group"), SHAPES)
def test_rms_norm_emulated_matches_oracle(dtype, residual, gate, rows, width, group):
    # one column: the gradient is the difference of two equal terms, all rounding, so only the forward is held
    args = norm_args(rows, width, group, residual, gate)
    testing.check_oracle(hk.rms_norm, args, dtype, "emulator", width > 1)


@pytest.mark.parametrize(("rows", "width", "group"), [(130, 33, 11), (65, 48, 16), (3, 2688, 2688)])
def test_rms_norm_emulated_gives_the_same_bits_in_every_order(rows, width, group):
    same_bits(hk.rms_norm, norm_args(rows, width, group, True, True, torch.float32))


def test_rms_norm_emulated_rounds_the_sum_before_it_normalises():
    x, weight, eps, residual, _, group = norm_args(7, 48, 16, True, False, torch.bfloat16)
    y, total = hk.rms_norm(x, weight, eps, residual, None, group, backend="emulator")
    assert torch.equal(total, x + residual)
    assert torch.equal(y, hk.rms_norm(total, weight, eps, None, None, group, backend="emulator"))


def test_rms_norm_emulated_takes_strided_rows_and_another_weight():
    x, weight, eps, residual, gate, group = norm_args(9, 48, 16, True, True, torch.float32)
    flat = testing.run(hk.rms_norm, [x, weight, eps, residual, gate, group], backend="emulator")
    views = [testing.strided(x), weight, eps, testing.strided(residual), testing.strided(gate), group]
    sliced = testing.run(hk.rms_norm, views, backend="emulator")
    for name in flat:  # single elements instead of packs: another order of the sums
        torch.testing.assert_close(sliced[name], flat[name])
    got = hk.rms_norm(x.bfloat16(), weight, backend="emulator")
    want = hk.rms_norm(x.bfloat16().double(), weight.double(), backend="reference")
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)


@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "group"), [(5, 17, 17), (33, 48, 16), (2, 2688, 2688), (0, 32, 8)])
def test_rms_norm_has_no_race(checked, dtype, order, rows, width, group):
    with testing.emulate(**order):
        testing.check_oracle(hk.rms_norm, norm_args(rows, width, group, True, True), dtype, "emulator")


# ---- grouped_gemm ----


def counts(tile_m):
    """By case: the rows of every expert, and how many rows lie past the last end. The edges are those of a tile of so
    many rows; the five tiles of "few" take every block of the persistent kernel round again; forty experts are more
    than a warp has lanes."""
    return {
        "edges": ([0, tile_m, tile_m + 1, 0, 1, 0], 5),
        "few": ([3, 0, 2, 1, 4, 2], 0),
        "one for all": ([0, 0, tile_m + 3, 0], 0),
        "one row": ([1], 0),
        "forty": ([(7 * e) % 5 if e % 3 else 0 for e in range(40)], 0),
        "none": ([0, 0, 0], 0),
        "all past the end": ([0, 0, 0], tile_m + 1),
    }


# K, M (the outputs): tails of both beside whole tiles, longer than every pipeline (8 stages of 64), the smallest
WIDTHS = {"tails": (72, 136), "deep": (8 * 64 + 40, 240), "smallest": (8, 8)}


def gemm_args(tile, case, width, form):
    per_expert, past = counts(int(tile.partition(":")[2].partition("x")[0]))[case]
    inner, outputs = WIDTHS[width]
    ends = torch.tensor(per_expert).cumsum(0).tolist()
    return with_form(groups(len(per_expert), inner, outputs, ends, sum(per_expert) + past), form)


def emulated_gemm(tile):
    def op(*args, backend):
        implementation = tile if backend == "emulator" else None
        return hk.grouped_gemm(*args, implementation=implementation, backend=backend)

    return op


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("case", "width"),
    [
        ("edges", "tails"),
        ("one for all", "smallest"),
        ("one row", "deep"),
        ("forty", "tails"),
        ("none", "smallest"),
        ("all past the end", "tails"),
    ],
)
@pytest.mark.parametrize("tile", TILES)
def test_grouped_gemm_emulated_matches_oracle(tile, case, width, form):
    args = gemm_args(tile, case, width, form)
    testing.check_oracle(emulated_gemm(tile), args, torch.bfloat16, "emulator", grad=False)


def test_grouped_gemm_emulated_takes_overlapping_rows_without_tensor_maps():
    # a tensor map cannot describe rows that overlap: sm90a refuses them by name, and the automatic choice is sm80
    a = torch.randn(8 * 8 + 64).bfloat16().as_strided((8, 64), (8, 1))
    b = torch.randn(2, 16, 64).bfloat16().transpose(1, 2)
    ends = torch.tensor([5, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"grouped_gemm\[sm90a\]: the rows of a must not overlap"):
        hk.grouped_gemm(a, b, ends, implementation="sm90a", backend="emulator")
    got = hk.grouped_gemm(a, b, ends, backend="emulator")
    want = hk.grouped_gemm(a.contiguous(), b, ends, implementation="sm80", backend="emulator")
    assert torch.equal(got, want)


@pytest.mark.parametrize("checked_build", [False, True])
def test_grouped_gemm_emulated_fits_a_chip_with_less_shared_memory(checked_build):
    # 99 KB a block, as sm_86, sm_89 and sm_120 have: 128x128 runs with three stages there
    tile = "sm80:128x128"
    with testing.emulate(bytes_shared=99 * 1024, compute_capability=89, checked=checked_build):
        for width, case in (("deep", "few"), ("tails", "edges")):
            args = gemm_args(tile, case, width, FORMS[4])
            testing.check_oracle(emulated_gemm(tile), args, torch.bfloat16, "emulator", grad=False)


@pytest.mark.parametrize("tile", TILES)
def test_grouped_gemm_emulated_gives_the_same_bits_in_every_order(tile):
    for width, case in (("deep", "few"), ("tails", "edges")):
        args = testing._cast(gemm_args(tile, case, width, FORMS[4]), torch.bfloat16)
        same_bits(emulated_gemm(tile), args, grad=False)


@pytest.mark.parametrize("tile", ["sm80:16x64", "sm80:64x128", "sm80:128x128"])
@pytest.mark.parametrize(("case", "width"), [("edges", "tails"), ("one row", "deep"), ("forty", "smallest")])
def test_grouped_gemm_emulated_takes_weights_with_the_outputs_last(tile, case, width):
    args = gemm_args(tile, case, width, FORMS[4])
    args[1] = args[1].contiguous()
    testing.check_oracle(emulated_gemm(tile), args, torch.bfloat16, "emulator", grad=False)


def whole_args(dtype=torch.bfloat16):
    """Everything an expert layer uses, small."""
    return testing._cast(gemm_args("any:5x5", "edges", "tails", FORMS[4]), dtype)


def test_grouped_gemm_emulated_has_the_gradients_of_the_torch_form():
    testing.check_oracle(hk.grouped_gemm, whole_args(), torch.bfloat16, "emulator")


@pytest.mark.parametrize("tile", ["sm80", "sm90a"])
def test_grouped_gemm_emulated_takes_strided_rows_and_weights(tile):
    a, b, *others = whole_args()
    wide = torch.full((a.shape[0], a.shape[1] + 16), torch.nan, dtype=a.dtype)
    wide[:, 8:-8] = a
    stored = torch.full((b.shape[0], b.shape[2] + 1, b.shape[1] + 8), torch.nan, dtype=b.dtype)
    stored[:, 1:, 8:] = b.transpose(1, 2)
    want = hk.grouped_gemm(a, b, *others, implementation=tile, backend="emulator")
    views = [wide[:, 8:-8], stored[:, 1:, 8:].transpose(1, 2)]
    got = hk.grouped_gemm(*views, *others, implementation=tile, backend="emulator")
    assert torch.equal(got, want)


@pytest.mark.parametrize("tile", TILES)
def test_grouped_gemm_emulated_keeps_nan_to_its_row_and_expert(tile):
    a, b, ends, *_ = testing._cast(gemm_args(tile, "edges", "tails", FORMS[0]), torch.bfloat16)
    want = hk.grouped_gemm(a, b, ends, activation="relu2", implementation=tile, backend="emulator")
    a[3, 9], a[int(ends[-1]) :], b[0] = torch.nan, torch.nan, torch.nan
    got = hk.grouped_gemm(a, b, ends, activation="relu2", implementation=tile, backend="emulator")
    assert got[3].isnan().all()
    others = torch.arange(len(a)) != 3
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=5)])
@pytest.mark.parametrize(
    ("case", "width"), [("edges", "tails"), ("few", "deep"), ("all past the end", "smallest")]
)
@pytest.mark.parametrize("tile", TILES)
def test_grouped_gemm_has_no_race(checked, tile, case, width, order):
    args = gemm_args(tile, case, width, FORMS[4 if case == "edges" else 0])
    with testing.emulate(**order):
        testing.check_oracle(emulated_gemm(tile), args, torch.bfloat16, "emulator", grad=False)


@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=6)])
def test_grouped_gemm_with_the_outputs_last_has_no_race(checked, order):
    a, b, *others = whole_args()
    with testing.emulate(**order):
        testing.check_oracle(
            hk.grouped_gemm, [a, b.contiguous(), *others], torch.bfloat16, "emulator", grad=False
        )


def test_grouped_gemm_emulated_chooses_by_the_chip_and_the_layout():
    def kinds(b, **options):
        _native.emulator_module.take_statistics()
        with testing.emulate(**options):
            hk.grouped_gemm(a, b, *others, backend="emulator")
        return _native.emulator_module.take_statistics()

    a, b, *others = whole_args()
    hopper, ampere = kinds(b), kinds(b, compute_capability=80)
    assert hopper["launches"] == ampere["launches"] == 1
    # a wgmma of 64 rows and 128 columns or more does the work of 64 mma.sync
    assert ampere["matrix_operations"] > 8 * hopper["matrix_operations"] > 0
    assert 0 < kinds(b.contiguous())["matrix_operations"] < ampere["matrix_operations"] / 8
    with pytest.raises(ValueError, match=r"sm90a\]: runs on compute capability 9.0 only"):
        with testing.emulate(compute_capability=80):
            hk.grouped_gemm(a, b, *others, implementation="sm90a", backend="emulator")


# ---- the door ----


def test_emulated_operators_run_their_kernels_and_nothing_else():
    take = _native.emulator_module.take_statistics
    take()
    x, weight, eps, *others = norm_args(4, 40, 8, True, True, torch.float32)
    hk.rms_norm(x, weight, eps, *others, backend="native")
    assert take()["launches"] == 0
    testing.run(hk.rms_norm, [x, weight, eps, *others], backend="emulator")
    assert take()["launches"] == 3  # the backward has two
    with hk.use_backend("emulator"):
        hk.rms_norm(x, weight)
    assert take()["launches"] == 1 and not _native.emulating


@pytest.mark.parametrize("op", ["rms_norm", "grouped_gemm"])
def test_emulated_operators_register_and_compile_to_one_graph(op):
    if op == "rms_norm":
        args = norm_args(5, 12, 4, True, True, torch.float32)
        testing.check_registration(op, *args, backend="emulator")
    else:
        args = whole_args()
        testing.check_registration(op, *args, None, backend="emulator", dtype=torch.bfloat16)
    testing.check_fullgraph(getattr(hk, op), args, "emulator")


def test_the_emulator_is_explained_and_never_chosen():
    a, b, ends, *_ = whole_args()
    text = hk.explain(hk.grouped_gemm, a, b, ends)
    assert text.startswith("grouped_gemm: native") and "   emulator  supported, only by name" in text
    assert "-> emulator" in hk.explain(hk.grouped_gemm, a, b, ends, backend="emulator")
    assert "emulator  computes bfloat16, got float32" in hk.explain(
        hk.grouped_gemm, a.float(), b.float(), ends
    )
    packed = hk.explain(hk.linear_packed, torch.ones(4, 8), hk.linear_pack(torch.ones(5, 8)), 5)
    assert "emulator  not written for this operator" in packed


def test_grouped_gemm_says_why_its_kernels_refuse():
    a, b, ends, *_ = whole_args()

    def refused(reason, a=a, b=b, error=hk.BackendError, **options):
        with pytest.raises(error, match=reason):
            hk.grouped_gemm(a, b, ends, backend="emulator", **options)

    ends = ends.clamp(max=7)
    a = a[:7]
    for width in (70, 71):
        left = a[:, :width].contiguous()
        refused(f"multiple of 8, got {width}", left, b[:, :width].contiguous())
    refused("number of outputs to be a multiple of 8, got 132", b=b[:, :, :132].contiguous())
    refused("rows of a_ND to start on 16 bytes", testing.strided(a, 9))
    refused("rows of a_ND to start on 16 bytes", testing.strided(a, 8))
    refused("rows of b_EKN to start on 16 bytes", b=testing.strided(b.transpose(1, 2), 4).transpose(1, 2))
    refused("needs a contiguous last dimension", b=b.repeat_interleave(2, 2)[:, :, ::2])
    refused("needs b_EKN without overlap", b=b[:, :, :1].transpose(1, 2).expand(6, 136, 72).transpose(1, 2))
    refused("CUTLASS's kernels run on a GPU only", implementation="cutlass")
    refused("the tile must be 16x64, 64x128 or 128x128", error=ValueError, implementation="sm80:32x32")
    refused("the tile must be one of 64x128 64x256", error=ValueError, implementation="sm90a:64x64")
    refused(
        "n contiguous in b the tile must be",
        b=b.contiguous(),
        error=ValueError,
        implementation="sm90a:128x208",
    )


def test_emulated_kernels_may_touch_their_tensors_only(checked):
    def normalise(x, y, rows):
        arguments = dict(rows=rows, width=32, group=32, eps=1e-5, dtype="float32", weight_dtype="float32")
        unused = dict(residual=None, residual_stride=0, gate=None, gate_stride=0, sum=None)
        tensors = dict(x=x, x_stride=x.stride(0), weight=torch.ones(32), y=y)
        _native.emulated(partial(_native.call, "rms_norm_fwd", **arguments, **unused, **tensors))

    y = torch.empty(4, 32)
    normalise(torch.ones(4, 32), y, 4)
    torch.testing.assert_close(y, torch.ones(4, 32), rtol=1e-5, atol=0)
    wide = torch.ones(4, 64)
    for x, result in ((torch.ones(3, 32), y), (torch.ones(4, 32), y[:3]), (wide[:3, :32], y)):
        with pytest.raises(RuntimeError, match=r"emulator: .*csrc/cuda/"):
            normalise(x, result, 4)
    normalise(wide[:, :32], y, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(mode="late"), "emulator: mode must be eager, lazy or random, got late"),
        (dict(sms=0), "emulator: sms must be >= 1, got 0"),
        (dict(speed=3), "emulator: there is no option speed"),
    ],
)
def test_emulate_names_a_wrong_option_and_changes_nothing(wrong, message):
    before = _native.emulator_module.options()
    with pytest.raises(ValueError, match=message), testing.emulate(**wrong):
        pass
    assert _native.emulator_module.options() == before

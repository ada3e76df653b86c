"""The expert layer's CUDA kernels, run by the emulator: values against the oracle, the order of rows against a stable
sort, the same bits in every order of work, and nothing for the checked build to report."""

from functools import partial

import pytest
import torch
from emulated import same_bits
from moe_cases import MLPS_OF_8, ROUTES, ROWS, mlp, routing, slots

import hebatron_kernels as hk
from hebatron_kernels import _native, testing
from hebatron_kernels.moe import native_rows

pytestmark = pytest.mark.usefixtures("emulator")

BF16, FP32 = torch.bfloat16, torch.float32
RANDOM = dict(mode="random", seed=7)


# ---- moe_route ----

# beside ROUTES: more tokens than the grid has warps, a lane past a warp's, top-22 of 512, every lane a choice, the most
# groups there can be, and groups across lanes
MORE_ROUTES = [
    (230, 40, 6, 1, 1),
    (3, 129, 4, 1, 1),
    (4, 512, 22, 1, 1),
    (3, 64, 32, 1, 1),
    (3, 512, 6, 256, 100),
    (5, 264, 7, 3, 2),
]


def route_args(tokens, experts, *others, normalize=True):
    return [*routing(tokens, experts), *others, normalize, 2.5]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("route", [*ROUTES, *MORE_ROUTES])
def test_moe_route_emulated_matches_oracle(dtype, route, normalize):
    # bf16 logits are chosen from in fp32, the oracle's doubles are not: its weights would be of other experts
    args = testing._cast(route_args(*route, normalize=normalize), dtype)
    if dtype == BF16:
        want = testing.run(
            hk.moe_route, [args[0].float(), args[1].float(), *args[2:]], route[0] > 0, backend="emulator"
        )
        got = testing.run(hk.moe_route, args, route[0] > 0, backend="emulator")
        for name in want:
            torch.testing.assert_close(got[name].to(want[name].dtype), want[name], rtol=2**-8, atol=0)
        return
    testing.check_oracle(hk.moe_route, args, dtype, "emulator", route[0] > 0)


@pytest.mark.parametrize("groups", [(1, 1), (8, 3)])
def test_moe_route_emulated_chooses_what_the_cpu_does_among_many_equals(groups):
    logits, bias = routing(150, 64, FP32)
    args = [(logits * 2).round() / 2, (bias * 4).round() / 4, 6, *groups, True, 2.5]
    want, got = (hk.moe_route(*args, backend=backend) for backend in ("native", "emulator"))
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("route", [(230, 40, 6, 1, 1), (25, 24, 5, 4, 2)])
def test_moe_route_emulated_gives_the_same_bits_in_every_order(route):
    same_bits(hk.moe_route, testing._cast(route_args(*route), FP32))


@pytest.mark.parametrize("order", [{}, RANDOM])
@pytest.mark.parametrize("route", [(70, 128, 6, 1, 1), (5, 24, 5, 4, 2), (3, 5, 3, 1, 1), (0, 8, 2, 1, 1)])
def test_moe_route_has_no_race(checked, route, order):
    with testing.emulate(**order):
        testing.check_oracle(hk.moe_route, route_args(*route), FP32, "emulator", route[0] > 0)


# ---- the rows ----

# slots and experts around a block's 2,048 slots and a warp's run of them, one expert, the most experts, 22 choices
SORTS = [(2047, 5, 1), (2048, 128, 1), (683, 7, 3), (300, 512, 7), (1500, 1, 2), (100, 33, 22)]


def sorted_slots(ids, experts):
    flat = ids.flatten()
    return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=experts).cumsum(0).int()


def tables(ids, experts):
    """order, position and offsets alone, as moe_mlp makes them: the rows of many slots are millions of threads."""
    order, position = torch.empty_like(ids).flatten(), torch.empty_like(ids).int()
    offsets = torch.empty(experts, dtype=torch.int32)
    sizes = dict(tokens=ids.shape[0], top_k=ids.shape[1], experts=experts, width=1, dtype="float32")
    tensors = dict(ids=ids, x=None, x_stride=1, rows=None, order=order, position=position, offsets=offsets)
    _native.emulated(partial(_native.call, "moe_permute_fwd", **sizes, **tensors))
    return order, position, offsets


def check_tables(ids, experts):
    order, position, offsets = tables(ids, experts)
    want, ends = sorted_slots(ids, experts)
    assert torch.equal(order, want) and torch.equal(offsets, ends)
    assert torch.equal(position.flatten()[want], torch.arange(want.numel()).int())


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SORTS)
def test_moe_permute_emulated_is_a_stable_sort(tokens, experts, top_k):
    check_tables(torch.randint(experts, (tokens, top_k)), experts)


def test_moe_permute_emulated_sorts_what_all_goes_to_one_expert():
    check_tables(torch.full((1100, 2), 4), 9)


@pytest.mark.slow
def test_moe_permute_emulated_sorts_the_slots_of_65536_tokens():
    check_tables(torch.randint(128, (65536, 6)), 128)


@pytest.mark.parametrize("order", [{}, RANDOM])
def test_moe_permute_of_two_blocks_has_no_race(checked, order):
    with testing.emulate(**order):
        check_tables(torch.randint(40, (700, 3)), 40)


def test_moe_permute_emulated_puts_ids_of_no_expert_past_the_last_end():
    ids = torch.randint(6, (90, 3))
    ids[5], ids[17, 1], ids[89, 2] = -1, 6, 2**40
    x = torch.randn(90, 8)
    rows, order, offsets = _native.emulated(native_rows.moe_permute, x, ids, 6)
    want, ends = sorted_slots(torch.where((ids < 0) | (ids > 5), 6, ids), 7)
    assert torch.equal(order, want) and torch.equal(offsets, ends[:6]) and offsets[-1] == 265
    assert torch.equal(rows, x[want // 3])


def rows_args(tokens, experts, top_k, width):
    x = torch.randn(tokens, width, dtype=torch.float64)
    ids, weights = slots(tokens, experts, top_k)
    rows, order, _ = hk.moe_permute(x, ids, experts, backend="torch")
    return x, ids, rows + 0.1, order, weights


# beside ROWS: the model's width and choices, more than four packs of a warp, rows that single elements fill
MORE_ROWS = [(3, 9, 6, 2688), (2, 3, 2, 1025), (5, 30, 22, 40)]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "width"), [*ROWS, *MORE_ROWS])
def test_moe_permute_and_combine_emulated_match_oracle(dtype, tokens, experts, top_k, width):
    x, ids, rows, order, weights = rows_args(tokens, experts, top_k, width)
    testing.check_oracle(hk.moe_permute, [x, ids.int(), experts], dtype, "emulator", tokens > 0)
    testing.check_oracle(hk.moe_combine, [rows, order, weights, tokens], dtype, "emulator", tokens > 0)


def norm_args(tokens, experts, top_k, width, shared=True, residual=True):
    x, _, rows, order, weights = rows_args(tokens, experts, top_k, width)
    norm = 1 + 0.3 * torch.randn(width, dtype=torch.float64)
    return [rows, order, weights, norm, 1e-5, x.cos() if shared else None, x if residual else None]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("shared", "residual"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("size", [(33, 16, 2, 48), (9, 5, 2, 7), (3, 9, 6, 2688), (0, 3, 2, 8)])
def test_moe_combine_norm_emulated_matches_oracle(dtype, shared, residual, size):
    testing.check_oracle(
        hk.moe_combine_norm, norm_args(*size, shared, residual), dtype, "emulator", size[0] > 0
    )


def test_moe_combine_norm_emulated_normalises_what_it_returns():
    rows, order, weights, norm, eps, shared, residual = testing._cast(norm_args(21, 6, 3, 48), BF16)
    y, total = hk.moe_combine_norm(
        rows, order, weights, norm.float(), eps, shared, residual, backend="emulator"
    )
    assert torch.equal(y, hk.rms_norm(total, norm.float(), eps, backend="emulator"))
    plain = hk.moe_combine_norm(rows, order, weights, norm, eps, backend="emulator")[1]
    assert torch.equal(plain, hk.moe_combine(rows, order, weights, 21, backend="emulator"))


def test_moe_rows_emulated_take_strided_rows():
    x, ids, rows, order, weights = testing._cast(rows_args(12, 5, 3, 40), FP32)
    for extra in (3, 8):  # rows that start on no pack, and on one
        got = hk.moe_permute(testing.strided(x, extra), ids, 5, backend="emulator")
        assert torch.equal(got[0], hk.moe_permute(x, ids, 5, backend="emulator")[0])
        views = [testing.strided(rows, extra), order, testing.strided(weights), 12]
        assert torch.equal(
            hk.moe_combine(*views, backend="emulator"),
            hk.moe_combine(rows, order, weights, 12, backend="emulator"),
        )


def test_moe_rows_emulated_give_the_same_bits_in_every_order():
    x, ids, rows, order, weights = testing._cast(rows_args(60, 16, 6, 40), BF16)
    same_bits(hk.moe_permute, [x, ids, 16])
    same_bits(hk.moe_combine, [rows, order, weights, 60])
    same_bits(hk.moe_combine_norm, testing._cast(norm_args(60, 16, 3, 40), BF16))


@pytest.mark.parametrize("order", [{}, RANDOM])
@pytest.mark.parametrize("size", [(9, 5, 2, 7), (2, 88, 6, 264), (0, 3, 2, 8)])
def test_moe_rows_have_no_race(checked, size, order):
    x, ids, rows, slot, weights = rows_args(*size)
    with testing.emulate(**order):
        testing.check_oracle(hk.moe_permute, [x, ids, size[1]], FP32, "emulator", size[0] > 0)
        testing.check_oracle(hk.moe_combine, [rows, slot, weights, size[0]], BF16, "emulator", size[0] > 0)
        testing.check_oracle(hk.moe_combine_norm, norm_args(*size), BF16, "emulator", size[0] > 0)


# ---- the whole layer ----


@pytest.mark.parametrize("size", MLPS_OF_8)
def test_moe_mlp_emulated_matches_oracle(size):
    testing.check_oracle(hk.moe_mlp, mlp(*size), BF16, "emulator", size[0] > 0)


def masters(size):
    x, ids, weights, up, down = mlp(*size)
    return [x.to(BF16), ids, weights.float(), up.float(), down.float()]


@pytest.mark.parametrize("compute_capability", [80, 90])
def test_moe_mlp_emulated_rounds_fp32_weights_and_not_their_gradients(compute_capability):
    args = masters((37, 16, 2, 48, 32))
    with testing.emulate(compute_capability=compute_capability):
        testing.check_oracle(hk.moe_mlp, args, None, "emulator")
        got = testing.run(hk.moe_mlp, args, backend="emulator")
        same = testing.run(
            hk.moe_mlp, [a.to(BF16) if i > 2 else a for i, a in enumerate(args)], backend="emulator"
        )
    assert torch.equal(got["out0"], same["out0"]) and torch.equal(got["grad0"], same["grad0"])
    for name in ("grad3", "grad4"):
        assert got[name].dtype == FP32 and torch.equal(got[name].to(BF16), same[name])
        assert not torch.equal(got[name], same[name].float())


def test_moe_mlp_emulated_takes_weights_of_any_sign_and_zero():
    x, ids, weights, up, down = testing._cast(mlp(31, 6, 3, 48, 32), BF16)
    weights = torch.linspace(-1.5, 1.5, 93).view(31, 3)
    weights.view(-1)[46] = 0
    got = testing.run(hk.moe_mlp, [x, ids, weights, up, down], backend="emulator")
    want = testing.run(
        hk.moe_mlp,
        [a.double() if a.is_floating_point() else a for a in (x, ids, weights, up, down)],
        backend="torch",
    )
    assert got["grad2"].flatten()[46] == 0  # as documented: nothing is kept of the row
    want["grad2"].view(-1)[46] = 0
    for name in want:
        scale = want[name].abs().max().item()
        torch.testing.assert_close(got[name].double(), want[name], rtol=2**-6, atol=2**-7 * scale, msg=name)


def test_moe_mlp_emulated_leaves_experts_without_rows_exactly_zero_and_unread():
    x, ids, weights, up, down = testing._cast(mlp(12, 4, 1, 48, 32), BF16)
    ids.fill_(2)
    others = torch.tensor([0, 1, 3])
    up[others], down[others] = torch.nan, torch.nan
    got = testing.run(hk.moe_mlp, [x, ids, weights, up, down], backend="emulator")
    assert all(value.isfinite().all() for value in got.values())
    assert got["grad3"][others].eq(0).all() and got["grad4"][others].eq(0).all()


def test_moe_mlp_emulated_keeps_nan_to_its_token():
    args = testing._cast(mlp(20, 6, 2, 48, 32), BF16)
    want = hk.moe_mlp(*args, backend="emulator")
    args[0][7] = torch.nan
    got = hk.moe_mlp(*args, backend="emulator")
    kept = torch.arange(20) != 7
    assert got[7].isnan().all() and torch.equal(got[kept], want[kept])


def test_moe_mlp_emulated_gives_only_the_gradients_asked_for():
    args = testing._cast(mlp(10, 4, 2, 48, 32), BF16)
    want = testing.run(hk.moe_mlp, args, backend="emulator")
    upstream = torch.cos(torch.arange(480, dtype=torch.float64) * 0.7 + 1).view(10, 48).to(BF16)
    for i in (0, 2, 3, 4):
        leaves = [a.detach().requires_grad_(i == j) if j != 1 else a for j, a in enumerate(args)]
        hk.moe_mlp(*leaves, backend="emulator").backward(upstream)
        assert torch.equal(leaves[i].grad, want[f"grad{i}"])


def test_moe_mlp_emulated_takes_a_gradient_that_starts_anywhere():
    args = testing._cast(mlp(5, 4, 2, 48, 32), BF16)
    grad = torch.randn(5 * 48 + 1).to(BF16)[1:].view(5, 48)
    found = []
    for upstream in (grad, grad.clone()):
        leaves = [value.clone().requires_grad_(value.is_floating_point()) for value in args]
        hk.moe_mlp(*leaves, backend="emulator").backward(upstream)
        found.append([leaf.grad for leaf in leaves if leaf.requires_grad])
    for unaligned, aligned in zip(*found, strict=True):
        assert torch.equal(unaligned, aligned)


def test_moe_mlp_emulated_is_a_fixed_sequence_of_launches():
    args = testing._cast(mlp(129, 4, 2, 48, 32), BF16)
    _native.emulator_module.take_statistics()
    hk.moe_mlp(*args, backend="emulator")
    assert _native.emulator_module.take_statistics()["launches"] == 4  # tables, up, down, sum
    args = testing._cast(mlp(10, 4, 2, 48, 32), BF16)
    hk.moe_mlp(*args, backend="emulator")
    assert _native.emulator_module.take_statistics()["launches"] == 1  # moe_decode
    testing.run(hk.moe_mlp, args, backend="emulator")
    # tables, down back and its row sums, to slots, up back, sum, and one product for each weight
    assert _native.emulator_module.take_statistics()["launches"] == 4 + 8


def test_moe_mlp_emulated_gives_the_same_bits_in_every_order():
    same_bits(hk.moe_mlp, testing._cast(mlp(23, 6, 2, 48, 40), BF16))


@pytest.mark.parametrize("order", [{}, RANDOM])
@pytest.mark.parametrize("size", [(9, 4, 2, 24, 16), (1, 3, 2, 8, 8), (0, 3, 2, 8, 8)])
def test_moe_mlp_has_no_race(checked, size, order):
    with testing.emulate(**order):
        testing.check_oracle(hk.moe_mlp, mlp(*size), BF16, "emulator", size[0] > 0)


# ---- the door ----


def test_moe_kernels_say_why_they_refuse():
    def refused(reason, op, *args):
        with pytest.raises(hk.BackendError, match=reason):
            op(*args, backend="emulator")

    logits, bias = routing(2, 520, FP32)
    refused("at most 512 experts and 32 choices, got 520 and 3", hk.moe_route, logits, bias, 3)
    refused(
        "at most 512 experts and 32 choices, got 100 and 33", hk.moe_route, logits[:, :100], bias[:100], 33
    )
    refused("computes float32 and bfloat16, got float16", hk.moe_route, logits[:, :9].half(), bias[:9], 3)
    refused("at most 512 experts, got 513", hk.moe_permute, torch.ones(1, 4), torch.zeros(1, 1).long(), 513)
    refused(
        "at most 8,192 columns, got 8,193", hk.moe_permute, torch.ones(1, 8193), torch.zeros(1, 1).long(), 3
    )
    x, ids, weights, up, down = testing._cast(mlp(4, 3, 2, 16, 24), BF16)
    refused("computes bfloat16, got float32", hk.moe_mlp, x.float(), ids, weights, up.float(), down.float())
    refused(
        "needs the width to be a multiple of 8 and at most 8,192, got 12",
        hk.moe_mlp,
        x[:, :12],
        ids,
        weights,
        up[..., :12],
        down[:, :12],
    )
    refused(
        "expert width to be a multiple of 8 .*, got 20",
        hk.moe_mlp,
        x,
        ids,
        weights,
        up[:, :20],
        down[..., :20],
    )
    refused("rows of x_TD to start on 16 bytes", hk.moe_mlp, testing.strided(x), ids, weights, up, down)
    refused("rows of down_EDF to start on 16 bytes", hk.moe_mlp, x, ids, weights, up, testing.strided(down))


CALLS = {
    "moe_route": lambda: [*routing(7, 8, FP32), 2, 4, 2, True, 2.5],
    "moe_permute": lambda: [torch.randn(7, 16), slots(7, 4, 2)[0], 4],
    "moe_combine": lambda: [torch.randn(14, 16), torch.randperm(14), torch.rand(7, 2), 7],
    "moe_combine_norm": lambda: testing._cast(norm_args(7, 4, 2, 16), FP32),
    "moe_mlp": lambda: testing._cast(mlp(7, 4, 2, 16, 8), BF16),
}


@pytest.mark.parametrize("name", CALLS)
def test_moe_emulated_registers_and_compiles_to_one_graph(name):
    args = CALLS[name]()
    testing.check_registration(name, *args, backend="emulator", dtype=BF16 if name == "moe_mlp" else FP32)
    testing.check_fullgraph(getattr(hk, name), args, "emulator")

"""The Triton kernels in Triton's interpreter, which is on for a whole process or not at all: test_triton.py runs this
file in one of its own, pytest does not collect it by itself. bf16 operands are widened before a product, which is
exact: the interpreter would multiply their bits."""

import pytest
import torch
from moe_cases import FORMS, groups, mlp, with_form

import hebatron_kernels as hk
from hebatron_kernels import testing
from hebatron_kernels.moe import triton_kernels
from hebatron_kernels.moe.triton_kernels import Blocks

DTYPES = [torch.float32, torch.bfloat16]
BYTES = {torch.float32: 4, torch.bfloat16: 2}
MEANS = (1, 16, 17, 32, 33, 96, 97, 5000)  # rows an expert has, around every change of the blocks
ALL_BLOCKS = sorted({triton_kernels.blocks(mean, 1, size) for mean in MEANS for size in (2, 4)})
WEIGHT_BLOCKS = sorted({triton_kernels.weight_blocks(mean, 1, size) for mean in MEANS for size in (2, 4)})

# experts, width, outputs, offsets, rows: empty first, middle and last; all to one; none at all; past the end; widths
# that are not multiples of anything; one row
SMALL = [
    (5, 8, 16, [0, 4, 4, 7, 7], 7),
    (3, 16, 8, [0, 11, 11], 11),
    (3, 16, 8, [0, 0, 0], 0),
    (3, 16, 8, [0, 0, 0], 5),
    (3, 7, 5, [2, 5, 9], 12),
    (1, 1, 1, [1], 1),
]


def oracle(args, dtype, grad=True):
    testing.check_oracle(hk.grouped_gemm, args, dtype, "triton", grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "problem"), [*((f, SMALL[4]) for f in FORMS), *((FORMS[4], p) for p in SMALL)]
)
def test_grouped_gemm_triton_matches_oracle(dtype, form, problem):
    oracle(with_form(groups(*problem), form), dtype, problem[4] > 0)


@pytest.mark.parametrize("size", ALL_BLOCKS, ids=str)
def test_grouped_gemm_triton_has_right_tails_of_every_block(monkeypatch, size):
    """No rows, a whole block, one more, one row, rows past the end; K of two blocks and a tail, M of one and a tail."""
    monkeypatch.setattr(triton_kernels, "blocks", lambda *_: size)
    counts = torch.tensor([0, size.n, 0, size.n + 1, 1, 0])
    ends = counts.cumsum(0).tolist()
    problem = groups(len(ends), size.k * 2 + 3, size.m + 5, ends, ends[-1] + 4)
    args = with_form(problem, FORMS[4])
    args[1] = args[1].contiguous() if size.n == 64 else args[1]
    oracle(args, torch.float32, size.n < 64)


@pytest.mark.parametrize("size", WEIGHT_BLOCKS, ids=str)
def test_grouped_gemm_triton_sums_the_weights_gradient_over_every_block(monkeypatch, size):
    monkeypatch.setattr(triton_kernels, "weight_blocks", lambda *_: size)
    ends = torch.tensor([0, size.n, 0, size.n + 1, 1, 0]).cumsum(0).tolist()
    a, b, ends = groups(len(ends), size.k + 3, size.m + 5, ends, ends[-1] + 4, torch.float32)
    grad = torch.randn(a.shape[0], b.shape[1])
    got = triton_kernels.weight_grad(a, grad, ends, None)
    for e, (begin, end) in enumerate(zip([0, *ends.tolist()], ends.tolist())):
        want = a[begin:end].double().t() @ grad[begin:end].double()
        torch.testing.assert_close(got[e].double(), want, rtol=1e-5, atol=1e-5)


def test_grouped_gemm_triton_finds_the_expert_among_many():
    """More experts than a warp has lanes, most without rows, the number no power of two; one row an expert at most."""
    counts = torch.zeros(200, dtype=torch.int64)
    counts[[0, 63, 64, 131, 199]] = 1
    ends = counts.cumsum(0).tolist()
    oracle(with_form(groups(200, 8, 8, ends, 6), FORMS[0]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_gemm_triton_reads_nothing_that_is_not_its_own(dtype):
    """NaN in the expert without rows, in the rows that nobody takes, in scale and upstream past the last end."""
    a, b, ends, rows, scale, activation = with_form(groups(3, 16, 8, [2, 2, 5], 9, dtype), FORMS[4], dtype)
    a = torch.cat([a, torch.full_like(a[:3], torch.nan)])
    b = b.clone()
    b[1], scale[5:], rows[5:] = torch.nan, torch.nan, a.shape[0] - 1
    leaves = [a.requires_grad_(), b.requires_grad_(), scale.requires_grad_()]
    out = hk.grouped_gemm(a, b, ends, rows, scale, activation, backend="triton")
    assert out[:5].isfinite().all() and out[5:].eq(0).all()
    upstream = torch.ones_like(out)
    upstream[5:] = torch.nan
    for plain in (False, True):
        if plain:
            out = hk.grouped_gemm(a, b, ends, rows, backend="triton")
        found = torch.autograd.grad(out, leaves[:2] if plain else leaves, upstream)
        assert all(value.isfinite().all() for value in found)
        assert found[0][-3:].eq(0).all() and found[1][1].eq(0).all() and found[1][0].ne(0).any()
    assert not plain or len(found) == 2


def test_grouped_gemm_triton_gives_no_gradient_to_the_scale_past_the_end():
    a, b, ends, rows, scale, activation = with_form(groups(2, 8, 8, [2, 5], 9), FORMS[4])
    args = [v.float() if v.is_floating_point() else v for v in (a, b, ends, rows, scale)]
    args[4].requires_grad_()
    hk.grouped_gemm(*args, activation, backend="triton").sum().backward()
    assert args[4].grad[:5].ne(0).any() and args[4].grad[5:].eq(0).all()


def test_grouped_gemm_triton_keeps_nan_to_its_row():
    a, b, ends, *_ = with_form(groups(3, 16, 8, [2, 2, 5], 5, torch.float32), FORMS[0], torch.float32)
    a[3, 7] = torch.nan
    out = hk.grouped_gemm(a, b, ends, activation="relu2", backend="triton")
    assert out[3].isnan().all() and out[[0, 1, 2, 4]].isfinite().all()


def test_grouped_gemm_triton_takes_any_strides():
    a, b, ends, rows, scale, activation = with_form(groups(3, 16, 8, [2, 2, 5], 7), FORMS[4], torch.float32)
    args = [a.float(), b.float(), ends, rows, scale, activation]
    want = testing.run(hk.grouped_gemm, args, backend="triton")
    views = [
        (testing.strided(args[0]), testing.strided(args[1])),
        (args[0].t().contiguous().t(), args[1].permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    ]
    for left, right in views:
        got = testing.run(hk.grouped_gemm, [left, right, *args[2:]], backend="triton")
        assert all(torch.equal(got[name], want[name]) for name in want)
    wide = (
        torch.stack([ends, ends], 1)[:, 0],
        torch.stack([rows, rows], 1)[:, 0],
        torch.stack([scale] * 2, 1)[:, 0],
    )
    got = hk.grouped_gemm(*args[:2], *wide, activation, backend="triton")
    assert torch.equal(got, want["out0"])
    spread = hk.grouped_gemm(args[0], args[1][:, :1].expand(3, 16, 8), ends, rows, backend="triton")
    assert torch.equal(
        spread, hk.grouped_gemm(args[0], args[1][:, :1].repeat(1, 16, 1), ends, rows, backend="triton")
    )


def test_grouped_gemm_triton_registers_and_compiles_to_one_graph():
    args = with_form(groups(3, 16, 8, [2, 2, 5], 7, torch.float32), FORMS[4], torch.float32)
    testing.check_registration("grouped_gemm", *args, None, backend="triton")
    testing.check_fullgraph(hk.grouped_gemm, args, "triton")


def test_grouped_gemm_triton_is_never_chosen_on_the_cpu():
    a, b, ends, *_ = with_form(groups(2, 8, 8, [2, 5], 5, torch.float32), FORMS[0], torch.float32)
    text = hk.explain(hk.grouped_gemm, a, b, ends)
    assert "triton    runs in Triton's interpreter, only by name" in text and "-> triton" not in text
    assert hk.explain(hk.grouped_gemm, a, b, ends, backend="triton").startswith("grouped_gemm: triton")
    with pytest.raises(hk.BackendError, match=r"triton\]: has no implementation sm80, only the CUDA"):
        hk.grouped_gemm(a, b, ends, implementation="sm80", backend="triton")
    with pytest.raises(hk.BackendError, match=r"triton\]: computes float32 and bfloat16, got float16"):
        hk.grouped_gemm(a.half(), b.half(), ends, backend="triton")


# ---- the whole expert layer ----

# tokens, experts, top_k, width, expert_width: ragged, the smallest, no token, widths that no pack divides, every
# expert for every token
LAYERS = [(9, 5, 2, 16, 24), (1, 1, 1, 8, 8), (0, 3, 2, 8, 8), (6, 4, 3, 7, 5), (3, 2, 2, 16, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_moe_mlp_triton_matches_oracle(sizes, dtype):
    testing.check_oracle(hk.moe_mlp, mlp(*sizes), dtype, "triton", sizes[0] > 0)


def test_moe_mlp_triton_keeps_the_gradients_of_fp32_weights_in_fp32():
    x, ids, weights, up, down = mlp(9, 5, 2, 16, 24)
    args = [x.bfloat16(), ids.int(), weights.float(), up.float(), down.float()]
    testing.check_oracle(hk.moe_mlp, args, None, "triton")
    leaf = args[3].requires_grad_()
    hk.moe_mlp(*args, backend="triton").float().sum().backward()
    assert leaf.grad.dtype == torch.float32 and not torch.equal(leaf.grad, leaf.grad.bfloat16().float())


def test_moe_mlp_triton_goes_back_through_a_weight_of_zero():
    args = mlp(5, 3, 2, 16, 8)
    args[2][1:3] = 0
    testing.check_oracle(hk.moe_mlp, args, torch.float32, "triton")


def test_moe_mlp_triton_of_some_gradients_gives_those():
    args = mlp(5, 3, 2, 16, 8, torch.float32)
    upstream = torch.randn_like(args[0])

    def gradients(*wanted):
        leaves = [a.clone().requires_grad_() if i in wanted else a for i, a in enumerate(args)]
        out = hk.moe_mlp(*leaves, backend="triton")
        return torch.autograd.grad(out, [leaves[i] for i in wanted], upstream)

    for i, want in zip((0, 2, 3, 4), gradients(0, 2, 3, 4)):
        assert torch.equal(gradients(i)[0], want)


def test_moe_mlp_triton_registers_and_compiles_to_one_graph():
    args = mlp(5, 3, 2, 16, 8, torch.float32)
    testing.check_registration("moe_mlp", *args, backend="triton")
    testing.check_fullgraph(hk.moe_mlp, args, "triton")


def test_moe_mlp_triton_is_never_chosen_on_the_cpu():
    args = mlp(5, 3, 2, 16, 8, torch.float32)
    text = hk.explain(hk.moe_mlp, *args)
    assert "triton    runs in Triton's interpreter, only by name" in text and "-> triton" not in text
    with pytest.raises(
        hk.BackendError, match=r"moe_mlp\[triton\]: computes float32 and bfloat16, got float64"
    ):
        hk.moe_mlp(*mlp(5, 3, 2, 16, 8), backend="triton")


# ---- what is chosen before a launch ----


def bytes_shared(size, element):
    return size.stages * (size.n * size.k + size.k * size.m) * element


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("choose", [triton_kernels.blocks, triton_kernels.weight_blocks])
def test_blocks_fit_every_gpu(choose, element):
    for experts in (1, 8, 128, 512):
        for rows in (0, 1, 6, 48, 384, 6144, 24576, 98304, 393216):
            size = choose(rows, experts, element)
            by_expert = choose is triton_kernels.weight_blocks
            operands = (size.k * size.n + size.n * size.m) if by_expert else size.n * size.k + size.k * size.m
            assert size.stages * operands * element <= 96 * 1024
            result = size.k * size.m if by_expert else size.n * size.m
            assert result <= 64 * 32 * size.warps  # 64 sums a thread: room beside them in 255 registers
            assert all(n & (n - 1) == 0 and n >= 16 for n in size[:3])


def test_blocks_grow_with_the_rows_of_an_expert():
    assert (
        triton_kernels.blocks(6, 128, 2)
        == triton_kernels.blocks(16 * 128, 128, 2)
        == Blocks(16, 64, 128, 4, 4)
    )
    sizes = [triton_kernels.blocks(mean * 128, 128, 2).n for mean in (1, 16, 17, 32, 33, 96, 97, 3072)]
    assert sizes == [16, 16, 32, 32, 64, 64, 128, 128]
    assert triton_kernels.blocks(0, 1, 4).n == 16 and triton_kernels.blocks(17, 1, 4).n == 64


def test_blocks_of_rows_are_as_many_as_any_routing_needs():
    generator = torch.Generator().manual_seed(1)
    for experts, rows, block in [(4, 30, 16), (1, 1, 16), (128, 48, 16), (7, 1000, 128), (5, 17, 16)]:
        limit = triton_kernels.most_row_blocks(rows, experts, block)
        for _ in range(50):
            ends = torch.randint(0, rows + 1, (experts,), generator=generator).sort().values
            counts = torch.diff(torch.cat([torch.zeros(1).long(), ends, torch.tensor([rows])]))
            assert ((counts + block - 1) // block).sum() <= limit
    # the worst case is met: one row too many in every expert and past the end
    assert triton_kernels.most_row_blocks(5 * 17, 4, 16) == 10
    assert triton_kernels.most_row_blocks(0, 4, 16) == 0

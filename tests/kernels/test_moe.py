import pytest
import torch
from moe_cases import BACKENDS, DTYPES, ROWS, assert_same, check_against, mlp, routing, slots
from torch.nn import functional as F

import hebatron_kernels as hk
from hebatron_kernels import testing

# ---- the rows: moe_permute, moe_combine ----


def test_moe_permute_sorts_by_expert_then_token():
    x = torch.arange(8.0).view(4, 2)
    ids = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
    for backend in BACKENDS:
        for dtype in (torch.int64, torch.int32):
            rows, order, offsets = hk.moe_permute(x, ids.to(dtype), 4, backend=backend)
            assert order.tolist() == [1, 2, 6, 3, 5, 0, 4, 7]
            assert offsets.tolist() == [3, 5, 8, 8]
            assert order.dtype == torch.int64 and offsets.dtype == torch.int32
            assert torch.equal(rows, x[order // 2])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "width"), ROWS)
def test_moe_permute_and_combine_match_oracle(dtype, tokens, experts, top_k, width):
    x = torch.randn(tokens, width, dtype=torch.float64)
    ids, weights = slots(tokens, experts, top_k)
    rows, order, offsets = hk.moe_permute(x, ids, experts)
    slot = order.argsort().view(tokens, top_k)
    check_against(
        hk.moe_permute,
        lambda x, *_: (x[order // top_k], order, offsets),
        [x, ids, experts],
        dtype,
        tokens > 0,
    )
    check_against(
        hk.moe_combine,
        lambda rows, order, weights, *_: (rows[slot] * weights.unsqueeze(2)).sum(1),
        [rows, order, weights, tokens],
        dtype,
        tokens > 0,
    )


def test_moe_combine_undoes_moe_permute():
    x = torch.randn(30, 12)
    ids, weights = slots(30, 6, 3, torch.float32)
    weights = weights / weights.sum(1, keepdim=True)
    rows, order, _ = hk.moe_permute(testing.strided(x), ids, 6)
    torch.testing.assert_close(hk.moe_combine(testing.strided(rows), order, weights, 30), x)
    x.requires_grad_()
    hk.moe_permute(x, ids, 6)[0].sum().backward()  # a gradient of stride 0
    assert x.grad.eq(3).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_moe_rows_gradcheck(backend):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ids, weights = slots(5, 4, 2)
    b = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def whole(x, weights, b):
        rows, order, offsets = hk.moe_permute(x, ids, 4, backend=backend)
        out = hk.grouped_gemm(rows, b.transpose(1, 2), offsets, backend=backend)
        return hk.moe_combine(out, order, weights, 5, backend=backend)

    assert torch.autograd.gradcheck(whole, (x, weights.requires_grad_(), b), check_undefined_grad=False)


# ---- moe_mlp ----

# tokens, experts, top_k, width, expert width: the small training shape's widths, the model's top-6 of 128 with most
# experts empty, odd widths (the loop), one token, one expert, every expert chosen, no tokens
MLPS = [
    (37, 16, 2, 48, 32),
    (5, 128, 6, 16, 8),
    (9, 5, 3, 13, 7),
    (1, 4, 2, 16, 24),
    (8, 1, 1, 16, 16),
    (6, 4, 4, 8, 16),
    (0, 3, 2, 8, 8),
]


def plain_mlp(x, ids, weights, up, down):
    y = torch.zeros_like(x)
    for e in range(up.shape[0]):
        token, k = (ids == e).nonzero(as_tuple=True)
        hidden = F.linear(F.linear(x[token], up[e]).relu().square(), down[e])
        y = y.index_add(0, token, hidden * weights[token, k, None])
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "width", "expert_width"), MLPS)
def test_moe_mlp_matches_oracle(dtype, tokens, experts, top_k, width, expert_width):
    args = mlp(tokens, experts, top_k, width, expert_width)
    check_against(hk.moe_mlp, plain_mlp, args, dtype, tokens > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moe_mlp_gradcheck(backend):
    x, ids, weights, up, down = mlp(4, 3, 2, 3, 5)
    leaves = [t.requires_grad_() for t in (x, weights, up, down)]
    assert torch.autograd.gradcheck(
        lambda x, w, u, d: hk.moe_mlp(x, ids, w, u, d, backend=backend), leaves, check_undefined_grad=False
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_mlp_of_one_expert_for_all_leaves_the_others_exactly_zero(dtype):
    x, ids, weights, up, down = mlp(12, 4, 1, 16, 8, dtype)
    ids.fill_(2)
    others = torch.tensor([0, 1, 3])
    up[others], down[others] = torch.nan, torch.nan  # not read
    args = [x, ids.int(), weights, up, down]
    got = testing.run(hk.moe_mlp, args, backend="torch")
    assert all(got[name].isfinite().all() for name in got)
    assert got["grad3"][others].eq(0).all() and got["grad4"][others].eq(0).all()
    hidden = F.linear(x, up[2]).relu().square()
    torch.testing.assert_close(got["out0"], F.linear(hidden, down[2]) * weights, rtol=2e-2, atol=2e-2)


def test_moe_mlp_equals_its_stages():
    args = mlp(29, 7, 3, 16, 24, torch.float32)

    def stages(x, ids, weights, up, down):
        rows, order, offsets = hk.moe_permute(x, ids, up.shape[0])
        hidden = hk.grouped_gemm(rows, up.transpose(1, 2), offsets).relu().square()
        return hk.moe_combine(hk.grouped_gemm(hidden, down.transpose(1, 2), offsets), order, weights, len(x))

    assert_same(testing.run(hk.moe_mlp, args), testing.run(stages, args))


def test_moe_mlp_follows_a_permutation_of_tokens_and_of_choices():
    x, ids, weights, up, down = mlp(31, 6, 3, 16, 16, torch.float32)
    want = testing.run(hk.moe_mlp, [x, ids, weights, up, down])
    moved = torch.randperm(31)
    out = hk.moe_mlp(x[moved], ids[moved], weights[moved], up, down)
    torch.testing.assert_close(out, want["out0"][moved])
    turned = hk.moe_mlp(x, ids.flip(1), weights.flip(1), up, down)  # strided ids and weights as well
    torch.testing.assert_close(turned, want["out0"])


def test_moe_mlp_of_a_token_does_not_depend_on_its_neighbours():
    x, ids, weights, up, down = mlp(40, 6, 2, 32, 16, torch.float32)
    whole = hk.moe_mlp(x, ids, weights, up, down)
    alone = torch.cat(
        [hk.moe_mlp(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], up, down) for t in range(40)]
    )
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)
    x[7] = torch.nan
    poisoned = hk.moe_mlp(x, ids, weights, up, down)
    assert poisoned[7].isnan().all()
    assert torch.equal(poisoned[torch.arange(40) != 7], whole[torch.arange(40) != 7])


def test_moe_mlp_takes_strided_arguments_and_an_expanded_gradient():
    x, ids, weights, up, down = mlp(10, 4, 2, 16, 8, torch.float32)
    want = testing.run(hk.moe_mlp, [x, ids, weights, up, down])
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (up, down)]
    for views in ([testing.strided(up), testing.strided(down)], turned):
        got = testing.run(hk.moe_mlp, [testing.strided(x), ids, testing.strided(weights), *views])
        assert_same(got, want)
    x.requires_grad_()
    hk.moe_mlp(x, ids, weights, up, down).sum().backward()
    assert x.grad.isfinite().all()


def test_moe_mlp_gives_only_the_gradients_asked_for():
    args = mlp(10, 4, 2, 16, 8, torch.float32)
    want = testing.run(hk.moe_mlp, args)
    for i in (0, 2, 3, 4):
        leaves = [a.detach().requires_grad_(i == j) if j != 1 else a for j, a in enumerate(args)]
        out = hk.moe_mlp(*leaves)
        out.backward(torch.cos(torch.arange(160.0) * 0.7 + 1).view(10, 16))
        assert_same({f"grad{i}": leaves[i].grad}, {f"grad{i}": want[f"grad{i}"]})
    loss = hk.moe_mlp(*leaves, backend="torch").square().sum()
    (grad,) = torch.autograd.grad(loss, leaves[4], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_moe_mlp_keeps_little_for_its_backward():
    args = mlp(64, 4, 2, 32, 16, torch.float32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        hk.moe_mlp(*[a.requires_grad_() if a.is_floating_point() else a for a in args])
    floats = sum(t.numel() for t in kept.values() if t.is_floating_point())
    assert (
        floats == sum(a.numel() for a in args if a.is_floating_point()) + 128 * 16
    )  # and the pre-activation


def test_moe_mlp_gives_the_same_bits_every_time():
    args = mlp(50, 8, 2, 32, 16, torch.float32)
    first = testing.run(hk.moe_mlp, args)
    for _ in range(5):
        again = testing.run(hk.moe_mlp, args)
        assert all(torch.equal(again[name], first[name]) for name in first)


# ---- registration, compilation, messages ----


def calls(dtype, width=16):
    x, ids, weights, up, down = mlp(7, 4, 2, width, 8, dtype)
    rows, order, _ = hk.moe_permute(x, ids, 4)
    return {
        "moe_route": [*routing(7, 8, dtype), 2, 4, 2, True, 2.5],
        "moe_permute": [x, ids, 4],
        "moe_combine": [rows, order, weights, 7],
        "moe_combine_norm": [rows, order, weights, torch.rand(width, dtype=dtype) + 0.5, 1e-5, x, x + 1],
        "moe_mlp": [x, ids, weights, up, down],
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(calls(torch.float32)))
def test_moe_registration(name, backend):
    testing.check_registration(name, *calls(torch.float32)[name], backend=backend)


@pytest.mark.parametrize(("dtype", "width"), [*((d, 16) for d in DTYPES), (torch.float32, 15)])
@pytest.mark.parametrize("name", list(calls(torch.float32)))
def test_moe_compiles_to_one_graph(name, dtype, width):
    testing.check_fullgraph(getattr(hk, name), calls(dtype, width)[name], "torch")


@pytest.mark.parametrize("name", list(calls(torch.float32)))
def test_moe_reference_compiles_to_one_graph(name):
    testing.check_fullgraph(getattr(hk, name), calls(torch.float32)[name], "reference")


def test_moe_explains_its_choice():
    text = hk.explain(hk.moe_mlp, *mlp(2, 3, 1, 8, 8, torch.float32))
    assert text.startswith("moe_mlp: native")
    with pytest.raises(hk.BackendError, match=r"moe_route\[triton\]: not written for this operator"):
        hk.moe_route(*routing(2, 4), 2, backend="triton")

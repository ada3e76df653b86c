from functools import partial

import pytest
import torch
from torch.nn import functional as F

import hebatron_kernels as hk
from hebatron_kernels import testing

BACKENDS = ["torch", "reference"]
# float32, bfloat16 and float16 go to grouped_mm where the widths allow it, float64 always to the loop
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is full of NaN, inside torch's own operators as well."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def check_against(op, plain, args, dtype, grad):
    """Holds the torch form of `op` to the oracle rule, the plainest form of the same dtype being the baseline."""
    if dtype == torch.float64:
        args = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        want = testing.run(op, args, grad, backend="reference")
        return assert_same(testing.run(op, args, grad, backend="torch"), want, 1e-12)
    forms = {
        "native": partial(op, backend="torch"),
        "torch": plain,
        "reference": partial(op, backend="reference"),
    }
    testing.check_oracle(lambda *a, backend: forms[backend](*a), args, dtype, "native", grad)


def assert_same(got, want, rtol=2e-5):
    for name in want:
        scale = want[name].abs().max().item() if want[name].numel() else 0.0
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=rtol * scale, msg=name)


# ---- moe_route ----

# tokens, experts, top_k, n_group, topk_group: the small training shape, the model's, one token, one expert, every
# expert chosen, no tokens, and groups: two kept of four, one kept of two, all kept, the smallest possible
ROUTES = [
    (33, 16, 2, 1, 1),
    (21, 128, 6, 1, 1),
    (1, 5, 3, 1, 1),
    (7, 1, 1, 1, 1),
    (9, 7, 7, 1, 1),
    (0, 8, 2, 1, 1),
    (25, 24, 5, 4, 2),
    (11, 10, 3, 2, 1),
    (13, 12, 4, 3, 3),
    (5, 4, 2, 2, 1),
]


def routing(tokens, experts, dtype=torch.float64):
    return torch.randn(tokens, experts, dtype=dtype), 0.2 * torch.randn(experts, dtype=dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "n_group", "topk_group"), ROUTES)
def test_moe_route_matches_oracle(dtype, tokens, experts, top_k, n_group, topk_group, normalize):
    args = [*routing(tokens, experts), top_k, n_group, topk_group, normalize, 2.5]

    def plain(logits, bias, *_):
        ids = hk.moe_route(logits.detach(), bias, *args[2:], backend="reference")[1]
        weights = logits.sigmoid().gather(1, ids)
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20) if normalize else weights
        return weights * 2.5, ids, torch.bincount(ids.flatten(), minlength=experts)

    check_against(hk.moe_route, plain, args, dtype, tokens > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moe_route_computes_in_float32_whatever_comes_in(backend, dtype):
    logits, bias = routing(12, 9, dtype)
    got = hk.moe_route(logits, bias, 3, backend=backend)
    want = hk.moe_route(logits.float(), bias.float(), 3, backend=backend)
    assert got[0].dtype == torch.float32
    assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_moe_route_sums_to_the_scale_and_counts_every_choice():
    logits, bias = routing(50, 16, torch.float32)
    weights, ids, counts = hk.moe_route(logits, bias, 4, scale=2.5)
    torch.testing.assert_close(weights.sum(1), torch.full((50,), 2.5))
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=16))
    assert counts.sum() == 50 * 4 and ids.dtype == counts.dtype == torch.int64
    plain, same, _ = hk.moe_route(logits, bias, 4, normalize=False)
    assert torch.equal(same, ids)
    torch.testing.assert_close(plain, logits.sigmoid().gather(1, ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_moe_route_gives_ties_to_the_lowest_index(backend):
    for value in torch.randn(
        60
    ).tolist():  # 37 columns: the last five are a vector's tail in torch's fp32 sigmoid
        _, ids, _ = hk.moe_route(torch.full((2, 37), value), torch.full((37,), 0.1), 3, backend=backend)
        assert ids.tolist() == [[0, 1, 2]] * 2
    zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    assert hk.moe_route(zeros, zeros[0], 3, backend=backend)[1].tolist() == [[0, 1, 2]]
    groups = hk.moe_route(torch.zeros(1, 12), torch.zeros(12), 3, 4, 2, backend=backend)
    assert groups[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_moe_route_of_scores_that_are_all_zero_has_zero_weights(backend):
    logits = torch.full((2, 6), -200.0, requires_grad=True)
    weights, ids, _ = hk.moe_route(logits, torch.zeros(6), 3, backend=backend)
    assert weights.eq(0).all() and ids.tolist() == [[0, 1, 2]] * 2
    weights.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_moe_route_keeps_the_best_groups_only(backend):
    # sums of the best two: 0.9 + 0.1, 0.6 + 0.6, 0.7 + 0.2; the single best expert sits in a group that is dropped
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6, 0.7, 0.2]])
    weights, ids, _ = hk.moe_route(torch.logit(scores), torch.zeros(6), 2, 3, 1, backend=backend)
    assert ids.tolist() == [[2, 3]]
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5))
    assert hk.moe_route(torch.logit(scores), torch.zeros(6), 3, 3, 2, False, backend=backend)[1].tolist() == [
        [0, 2, 3]
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_moe_route_uses_the_bias_for_the_choice_only(backend):
    logits, _ = routing(6, 8, torch.float32)
    bias = torch.zeros(8)
    bias[5], bias[2] = 10.0, -torch.inf
    weights, ids, _ = hk.moe_route(logits, bias, 2, normalize=False, backend=backend)
    assert (ids[:, 0] == 5).all() and not (ids == 2).any()
    torch.testing.assert_close(weights[:, 0], logits[:, 5].sigmoid())
    # -inf inside a kept group is still before every expert of a dropped group
    only = torch.full((8,), -torch.inf)
    only[4:6] = 1.0
    assert set(hk.moe_route(logits, only, 4, 2, 1, backend=backend)[1][0].tolist()) == {4, 5, 6, 7}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_moe_route_keeps_nan_to_its_token_and_ids_in_range(backend, groups):
    logits, bias = routing(5, 12, torch.float32)
    clean = hk.moe_route(logits, bias, 3, *groups, backend=backend)
    bad = logits.clone()
    bad[1], bad[2, 7], bad[3, 4], bad[4, 6] = torch.nan, torch.nan, torch.inf, -torch.inf
    weights, ids, counts = hk.moe_route(bad, bias, 3, *groups, backend=backend)
    assert weights[1].isnan().all() and weights[2].isnan().all()
    assert ids[1].tolist() == [0, 1, 2] and ids[2, 0] == 7
    assert weights[3:].isfinite().all() and torch.equal(weights[0], clean[0][0])
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 12 for row in ids.tolist())
    assert counts.sum() == 15


def test_moe_route_of_a_token_does_not_depend_on_its_neighbours():
    logits, bias = routing(41, 13, torch.float32)
    weights, ids, _ = hk.moe_route(logits, bias, 3)
    for t in (0, 17, 40):
        alone = hk.moe_route(logits[t : t + 1], bias, 3)
        assert torch.equal(alone[0][0], weights[t]) and torch.equal(alone[1][0], ids[t])


def test_moe_route_takes_strided_logits():
    logits, bias = routing(9, 10, torch.float32)
    for view in (testing.strided(logits), logits.t().contiguous().t()):
        assert all(
            torch.equal(a, b) for a, b in zip(hk.moe_route(view, bias, 2), hk.moe_route(logits, bias, 2))
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("normalize", "groups"), [(True, (1, 1)), (False, (1, 1)), (True, (3, 2))])
def test_moe_route_gradcheck(backend, normalize, groups):
    # 0.4 between logits: gradcheck's steps of 1e-6 must not change the choice
    logits = (torch.rand(4, 6).argsort(1).double() * 0.4 - 1).requires_grad_()
    bias = torch.zeros(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: hk.moe_route(x, bias, 2, *groups, normalize, 2.5, backend=backend)[0], logits
    )


def test_moe_route_gives_the_bias_no_gradient():
    logits, bias = routing(4, 6, torch.float32)
    bias.requires_grad_()
    assert not hk.moe_route(logits, bias, 2)[0].requires_grad
    weights, ids, counts = hk.moe_route(logits.requires_grad_(), bias, 2)
    assert not ids.requires_grad and not counts.requires_grad
    weights.sum().backward()
    assert bias.grad is None and logits.grad.isfinite().all()


# ---- the rows: moe_permute, grouped_gemm, moe_combine ----


def slots(tokens, experts, top_k, dtype=torch.float64):
    """Distinct experts for each token and positive weights."""
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    return ids.contiguous(), torch.rand(tokens, top_k, dtype=dtype) + 0.1


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


# tokens, experts, top_k, width: odd sizes, the vector's edges, one token, one expert, all chosen, no tokens
ROWS = [
    (9, 5, 2, 7),
    (33, 16, 2, 48),
    (1, 3, 1, 16),
    (6, 1, 1, 5),
    (4, 4, 4, 8),
    (0, 3, 2, 8),
    (40, 128, 6, 32),
]


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


# experts, width, outputs, offsets, rows: ragged; empty first, middle and last; all to one; none at all; rows past
# the end; widths that are not multiples of 16 bytes; one expert
GROUPS = [
    (4, 16, 24, [3, 5, 9, 14], 14),
    (5, 8, 16, [0, 4, 4, 7, 7], 7),
    (3, 16, 8, [0, 11, 11], 11),
    (3, 16, 8, [0, 0, 0], 0),
    (3, 16, 8, [0, 0, 0], 5),
    (4, 16, 24, [2, 2, 6, 7], 12),
    (3, 7, 24, [2, 5, 9], 9),
    (3, 16, 5, [2, 5, 9], 11),
    (1, 1, 1, [1], 1),
    (2, 113, 1023, [1, 6], 6),
]


def groups(experts, width, outputs, offsets, rows, dtype=torch.float64):
    a = torch.randn(rows, width, dtype=dtype)
    b = torch.randn(experts, outputs, width, dtype=dtype) / width**0.5
    return a, b, torch.tensor(offsets, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("stored", ["outputs last", "width last"])
@pytest.mark.parametrize(("experts", "width", "outputs", "offsets", "rows"), GROUPS)
def test_grouped_gemm_matches_oracle(dtype, stored, experts, width, outputs, offsets, rows):
    a, b, ends = groups(experts, width, outputs, offsets, rows)
    b = b.transpose(1, 2) if stored == "width last" else b.transpose(1, 2).contiguous()

    def plain(a, b, _):
        pairs = zip([0, *offsets], offsets)
        parts = [a[begin:end] @ b[e] for e, (begin, end) in enumerate(pairs)]
        return torch.cat([*parts, a.new_zeros(rows - offsets[-1], outputs)])

    check_against(hk.grouped_gemm, plain, [a, b, ends], dtype, rows > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_gemm_never_reads_past_the_end(backend, dtype):
    a, b, ends = groups(3, 16, 8, [2, 2, 5], 9, dtype)
    a[5:], b[1] = torch.nan, torch.nan
    a.requires_grad_(), b.requires_grad_()
    out = hk.grouped_gemm(a, b.transpose(1, 2), ends, backend=backend)
    assert out[:5].isfinite().all() and out[5:].eq(0).all()
    upstream = torch.ones_like(out)
    upstream[5:] = torch.nan
    out.backward(upstream)
    assert a.grad[:5].isfinite().all() and a.grad[5:].eq(0).all()
    assert b.grad.isfinite().all() and b.grad[1].eq(0).all() and b.grad[0].ne(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_gemm_takes_any_strides_and_an_expanded_gradient(dtype):
    a, stored, ends = groups(4, 16, 24, [3, 5, 9, 14], 14, dtype)
    b = stored.transpose(1, 2).contiguous()
    want = testing.run(hk.grouped_gemm, [a, b, ends], backend="torch")
    views = [
        (testing.strided(a), testing.strided(b)),
        (a.t().contiguous().t(), b.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
        (testing.strided(a.t().contiguous()).t(), b.repeat_interleave(8, 2)[..., ::8]),
    ]
    for left, right in views:
        got = testing.run(hk.grouped_gemm, [left, right, ends], backend="torch")
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    spread = hk.grouped_gemm(a, b[:, :1].expand(4, 16, 24), ends)
    torch.testing.assert_close(spread, hk.grouped_gemm(a, b[:, :1].repeat(1, 16, 1), ends))
    a.requires_grad_(), stored.requires_grad_()
    hk.grouped_gemm(a, stored.transpose(1, 2), ends).sum().backward()
    torch.testing.assert_close(a.grad[0], stored[0].sum(0).detach())
    view = stored.detach().transpose(1, 2).requires_grad_()
    (grad,) = torch.autograd.grad(hk.grouped_gemm(a, view, ends).sum(), view)
    assert grad.stride() == view.stride()  # no copy on its way to the stored weights


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


def mlp(tokens, experts, top_k, width, expert_width, dtype=torch.float64):
    ids, weights = slots(tokens, experts, top_k, dtype)
    up = torch.randn(experts, expert_width, width, dtype=dtype) / width**0.5
    down = torch.randn(experts, width, expert_width, dtype=dtype) / expert_width**0.5
    return [torch.randn(tokens, width, dtype=dtype), ids, weights, up, down]


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
    (grad,) = torch.autograd.grad(hk.moe_mlp(*leaves).square().sum(), leaves[4], create_graph=True)
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
    rows, order, offsets = hk.moe_permute(x, ids, 4)
    return {
        "moe_route": [*routing(7, 8, dtype), 2, 4, 2, True, 2.5],
        "moe_permute": [x, ids, 4],
        "grouped_gemm": [rows, up.transpose(1, 2), offsets],
        "moe_combine": [rows, order, weights, 7],
        "moe_mlp": [x, ids, weights, up, down],
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(calls(torch.float32)))
def test_moe_registration(name, backend):
    testing.check_registration(name, *calls(torch.float32)[name], backend=backend)


def test_moe_products_of_the_torch_form_are_registered():
    a, b, ends = groups(3, 16, 8, [2, 2, 5], 5, torch.float32)
    for width in (16, 15):  # grouped_mm and the loop
        left = a[:, :width].contiguous()
        torch.library.opcheck(torch.ops.hebatron._torch_gemm, (left, b[:, :, :width].transpose(1, 2), ends))
        torch.library.opcheck(torch.ops.hebatron._torch_weight_gemm, (left, a, ends))


@pytest.mark.parametrize(("dtype", "width"), [*((d, 16) for d in DTYPES), (torch.float32, 15)])
@pytest.mark.parametrize("name", list(calls(torch.float32)))
def test_moe_compiles_to_one_graph(name, dtype, width):
    testing.check_fullgraph(getattr(hk, name), calls(dtype, width)[name], "torch")


@pytest.mark.parametrize("name", list(calls(torch.float32)))
def test_moe_reference_compiles_to_one_graph(name):
    testing.check_fullgraph(getattr(hk, name), calls(torch.float32)[name], "reference")


def test_moe_explains_its_choice():
    text = hk.explain(hk.moe_mlp, *mlp(2, 3, 1, 8, 8, torch.float32))
    assert text.startswith("moe_mlp: torch")
    with pytest.raises(hk.BackendError, match=r"moe_route\[triton\]: not written for this operator"):
        hk.moe_route(*routing(2, 4), 2, backend="triton")


GOOD = {
    "moe_route": dict(logits_TE=torch.ones(3, 8), bias_E=torch.ones(8), top_k=2),
    "moe_permute": dict(x_TD=torch.ones(3, 4), ids_TK=torch.zeros(3, 2, dtype=torch.int64), num_experts=5),
    "grouped_gemm": dict(
        a_ND=torch.ones(6, 4), b_EKN=torch.ones(2, 4, 3), offsets_E=torch.tensor([2, 6], dtype=torch.int32)
    ),
    "moe_combine": dict(
        rows_ND=torch.ones(6, 4), order_N=torch.arange(6), weights_TK=torch.ones(3, 2), num_tokens=3
    ),
    "moe_mlp": dict(
        x_TD=torch.ones(3, 4),
        ids_TK=torch.zeros(3, 2, dtype=torch.int64),
        weights_TK=torch.ones(3, 2),
        up_EFD=torch.ones(5, 6, 4),
        down_EDF=torch.ones(5, 4, 6),
    ),
}
META = torch.ones(1, device="meta")
BAD = [
    ("moe_route", dict(logits_TE=torch.ones(3)), r"logits_TE must have shape \(\*, \*\), got float32\[3\]"),
    ("moe_route", dict(logits_TE=torch.ones(3, 8).long()), "logits_TE must have dtype float64 .*, got int64"),
    ("moe_route", dict(bias_E=torch.ones(7)), r"bias_E must have shape \(8\), got float32\[7\]"),
    ("moe_route", dict(bias_E=META.expand(8)), "bias_E must be on cpu like the first argument, got meta"),
    ("moe_route", dict(top_k=0), "top_k must be between 1 and the 8 experts of the groups kept, got 0"),
    ("moe_route", dict(top_k=9), "top_k must be between 1 and the 8 experts of the groups kept, got 9"),
    (
        "moe_route",
        dict(top_k=5, n_group=2),
        "top_k must be between 1 and the 4 experts of the groups kept, got 5",
    ),
    ("moe_route", dict(n_group=3), "n_group must divide 8 experts into groups of at least 2, got 3"),
    ("moe_route", dict(n_group=8), "n_group must divide 8 experts into groups of at least 2, got 8"),
    ("moe_route", dict(n_group=0), "n_group must divide 8 experts into groups of at least 2, got 0"),
    ("moe_route", dict(n_group=2, topk_group=3), "topk_group must be between 1 and n_group = 2, got 3"),
    ("moe_permute", dict(x_TD=torch.ones(3)), r"x_TD must have shape \(\*, \*\)"),
    ("moe_permute", dict(ids_TK=torch.ones(3, 2)), "ids_TK must have dtype int64 or int32, got float32"),
    (
        "moe_permute",
        dict(ids_TK=torch.zeros(4, 2).long()),
        r"ids_TK must have shape \(3, \*\), got int64\[4, 2\]",
    ),
    ("moe_permute", dict(ids_TK=torch.zeros(3, 0).long()), "ids_TK must name at least one expert per token"),
    ("moe_permute", dict(ids_TK=torch.full((3, 2), 5)), "ids_TK must be between 0 and 4, got 5"),
    ("moe_permute", dict(ids_TK=torch.full((3, 2), -1)), "ids_TK must be between 0 and 4, got -1"),
    ("moe_permute", dict(num_experts=0), "num_experts must be > 0, got 0"),
    ("moe_permute", dict(ids_TK=META.long().expand(3, 2)), "ids_TK must be on cpu like the first argument"),
    ("grouped_gemm", dict(a_ND=torch.ones(6)), r"a_ND must have shape \(\*, \*\)"),
    (
        "grouped_gemm",
        dict(b_EKN=torch.ones(2, 5, 3)),
        r"b_EKN must have shape \(\*, 4, \*\), got float32\[2, 5, 3\]",
    ),
    ("grouped_gemm", dict(b_EKN=torch.ones(2, 4, 3).double()), "b_EKN must have dtype float32, got float64"),
    ("grouped_gemm", dict(b_EKN=torch.ones(2, 4, 0)), "b_EKN must have widths > 0"),
    (
        "grouped_gemm",
        dict(b_EKN=torch.ones(0, 4, 3), offsets_E=torch.ones(0).int()),
        "b_EKN must have at least one",
    ),
    ("grouped_gemm", dict(offsets_E=torch.tensor([2, 6])), "offsets_E must have dtype int32, got int64"),
    ("grouped_gemm", dict(offsets_E=torch.ones(3).int()), r"offsets_E must have shape \(2\), got int32\[3\]"),
    (
        "grouped_gemm",
        dict(offsets_E=torch.tensor([4, 2]).int()),
        r"offsets_E must rise from 0 .*, got \[4, 2\]",
    ),
    (
        "grouped_gemm",
        dict(offsets_E=torch.tensor([4, 7]).int()),
        r"at most 6 \(the number of rows\), got \[4, 7\]",
    ),
    (
        "grouped_gemm",
        dict(offsets_E=torch.tensor([-1, 6]).int()),
        r"offsets_E must rise from 0 .*, got \[-1, 6\]",
    ),
    (
        "moe_combine",
        dict(rows_ND=torch.ones(5, 4)),
        r"rows_ND must have shape \(6, \*\), got float32\[5, 4\]",
    ),
    ("moe_combine", dict(order_N=torch.arange(5)), r"order_N must have shape \(6\), got int64\[5\]"),
    ("moe_combine", dict(order_N=torch.arange(6).int()), "order_N must have dtype int64, got int32"),
    ("moe_combine", dict(weights_TK=torch.ones(3, 0)), "weights_TK must have at least one expert per token"),
    ("moe_combine", dict(num_tokens=4), r"weights_TK must have shape \(4, \*\), got float32\[3, 2\]"),
    (
        "moe_mlp",
        dict(x_TD=torch.ones(3, 4).half()),
        "x_TD must have dtype float64 or float32 or bfloat16, got float16",
    ),
    (
        "moe_mlp",
        dict(up_EFD=torch.ones(5, 6, 3)),
        r"up_EFD must have shape \(\*, \*, 4\), got float32\[5, 6, 3\]",
    ),
    ("moe_mlp", dict(up_EFD=torch.ones(5, 0, 4)), "up_EFD must have widths > 0"),
    (
        "moe_mlp",
        dict(up_EFD=torch.ones(0, 6, 4), down_EDF=torch.ones(0, 4, 6)),
        "up_EFD must have at least one",
    ),
    (
        "moe_mlp",
        dict(down_EDF=torch.ones(5, 6, 4)),
        r"down_EDF must have shape \(5, 4, 6\), got float32\[5, 6, 4\]",
    ),
    (
        "moe_mlp",
        dict(down_EDF=torch.ones(5, 4, 6).bfloat16()),
        "down_EDF must have dtype float32, got bfloat16",
    ),
    ("moe_mlp", dict(ids_TK=torch.full((3, 2), 9)), "ids_TK must be between 0 and 4, got 9"),
    (
        "moe_mlp",
        dict(weights_TK=torch.ones(3, 3)),
        r"weights_TK must have shape \(3, 2\), got float32\[3, 3\]",
    ),
    ("moe_mlp", dict(up_EFD=META.expand(5, 6, 4)), "up_EFD must be on cpu like the first argument, got meta"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), BAD)
def test_moe_names_a_bad_argument(name, wrong, message):
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        getattr(hk, name)(**{**GOOD[name], **wrong})


@pytest.mark.parametrize("name", list(GOOD))
def test_moe_takes_the_good_arguments(name):
    assert getattr(hk, name)(**GOOD[name]) is not None

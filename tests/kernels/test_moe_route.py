import pytest
import torch
from moe_cases import BACKENDS, ROUTES, check_against, routing

import hebatron_kernels as hk
from hebatron_kernels import testing

EVERY = [*BACKENDS, "native", "emulator"]


@pytest.fixture(autouse=True)
def _loaded(request):
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("backend") == "emulator":
        request.getfixturevalue("emulator")


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


@pytest.mark.parametrize("backend", EVERY)
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


@pytest.mark.parametrize("backend", EVERY)
def test_moe_route_of_scores_that_are_all_zero_has_zero_weights(backend):
    logits = torch.full((2, 6), -200.0, requires_grad=True)
    weights, ids, _ = hk.moe_route(logits, torch.zeros(6), 3, backend=backend)
    assert weights.eq(0).all() and ids.tolist() == [[0, 1, 2]] * 2
    weights.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", EVERY)
def test_moe_route_keeps_the_best_groups_only(backend):
    # sums of the best two: 0.9 + 0.1, 0.6 + 0.6, 0.7 + 0.2; the single best expert sits in a group that is dropped
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6, 0.7, 0.2]])
    weights, ids, _ = hk.moe_route(torch.logit(scores), torch.zeros(6), 2, 3, 1, backend=backend)
    assert ids.tolist() == [[2, 3]]
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5))
    assert hk.moe_route(torch.logit(scores), torch.zeros(6), 3, 3, 2, False, backend=backend)[1].tolist() == [
        [0, 2, 3]
    ]


@pytest.mark.parametrize("backend", EVERY)
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


@pytest.mark.parametrize("backend", EVERY)
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

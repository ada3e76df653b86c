"""The expert layer in C++: the oracle rule on every ISA, and what the torch form does not promise (bits)."""

import pytest
import torch
from moe_cases import mlp, routing

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

DTYPES = [torch.float32, torch.bfloat16]

# tokens, experts, top_k, width, expert width: a panel is 32 or 64 columns and a strip 6 rows, so both edges of each;
# odd widths (half a step of k in bf16), one column, most experts empty, one token, one expert with several blocks of
# 384 rows, every expert chosen, no tokens
MLPS = [
    (37, 16, 2, 48, 32),
    (13, 5, 3, 65, 63),
    (29, 3, 2, 33, 129),
    (7, 4, 2, 1, 1),
    (5, 128, 6, 16, 8),
    (1, 4, 2, 96, 17),
    (800, 2, 1, 24, 40),
    (6, 4, 4, 8, 16),
    (0, 3, 2, 8, 8),
]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "width", "expert_width"), MLPS)
def test_moe_mlp_native_matches_oracle(isa, dtype, tokens, experts, top_k, width, expert_width):
    with testing.use_isa(isa):
        args = mlp(tokens, experts, top_k, width, expert_width)
        testing.check_oracle(hk.moe_mlp, args, dtype, "native", tokens > 0)


@pytest.mark.parametrize("isa", testing.isas())
def test_moe_mlp_native_errs_no_more_than_the_torch_form_over_long_sums(isa):
    """Three chains of 512 steps forward and in the weights' gradients: one chain would err twice as much."""
    args = mlp(1100, 1, 1, 1100, 9, torch.float32)
    with testing.use_isa(isa):
        got = testing.run(hk.moe_mlp, args, backend="native")
    base = testing.run(hk.moe_mlp, args, backend="torch")
    exact = testing.run(
        hk.moe_mlp, [a.double() if a.is_floating_point() else a for a in args], backend="torch"
    )
    for name, want in exact.items():
        error, allowed = ((t[name].double() - want).square().mean().sqrt() for t in (got, base))
        assert error <= 2 * allowed, name


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_moe_mlp_native_of_a_token_does_not_depend_on_the_batch_to_the_bit(isa, dtype, batch):
    x, ids, weights, up, down = mlp(450, 3, 2, 70, 90, dtype)
    with testing.use_isa(isa):
        whole = hk.moe_mlp(x, ids, weights, up, down, backend="native")
        parts = zip(*(t[:128].split(batch) for t in (x, ids, weights)))
        alone = torch.cat([hk.moe_mlp(*part, up, down, backend="native") for part in parts])
    assert torch.equal(alone, whole[:128])


@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_mlp_native_gives_the_same_bits_250_times_with_and_without_gradient(dtype):
    args = mlp(50, 8, 2, 48, 80, dtype)
    first = testing.run(hk.moe_mlp, args, backend="native")
    for _ in range(125):
        again = testing.run(hk.moe_mlp, args, backend="native")
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert torch.equal(hk.moe_mlp(*args, backend="native"), first["out0"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_mlp_native_does_not_depend_on_the_number_of_threads(dtype):
    args = mlp(150, 6, 2, 48, 80, dtype)
    one = testing.run(hk.moe_mlp, args, backend="native")
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            more = testing.run(hk.moe_mlp, args, backend="native")
            assert all(torch.equal(more[name], one[name]) for name in one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", testing.isas())
def test_moe_mlp_native_rounds_fp32_weights_at_their_use_and_not_their_gradients(isa):
    x, ids, weights, up, down = mlp(60, 5, 2, 48, 72, torch.float32)
    x = x.bfloat16()
    with testing.use_isa(isa):
        masters = testing.run(hk.moe_mlp, [x, ids, weights, up, down], backend="native")
        rounded = testing.run(hk.moe_mlp, [x, ids, weights, up.bfloat16(), down.bfloat16()], backend="native")
    for name in ("out0", "grad0", "grad2"):
        assert torch.equal(masters[name], rounded[name]), name
    for name in ("grad3", "grad4"):
        assert masters[name].dtype == torch.float32
        assert torch.equal(masters[name].bfloat16(), rounded[name]), name
    for backend in ("torch", "reference"):
        other = testing.run(hk.moe_mlp, [x, ids, weights, up, down], backend=backend)
        for name, value in other.items():
            assert value.dtype == masters[name].dtype
            scale = value.abs().max().item()
            torch.testing.assert_close(masters[name], value, rtol=2e-2, atol=2e-2 * scale)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_mlp_native_reads_no_expert_without_tokens(isa, dtype):
    x, ids, weights, up, down = mlp(12, 4, 1, 16, 8, dtype)
    ids.fill_(2)
    others = torch.tensor([0, 1, 3])
    up[others], down[others] = torch.nan, torch.nan
    with testing.use_isa(isa):
        got = testing.run(hk.moe_mlp, [x, ids.int(), weights, up, down], backend="native")
    assert all(got[name].isfinite().all() for name in got)
    for name in ("grad3", "grad4"):
        assert got[name][others].eq(0).all() and got[name][2].ne(0).any()


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_mlp_native_keeps_nan_to_its_token(isa, dtype):
    args = mlp(20, 3, 2, 33, 65, dtype)
    with testing.use_isa(isa):
        clean = hk.moe_mlp(*args, backend="native")
        args[0][7, 32] = torch.nan  # the last of an odd row: in bf16 it stands alone in its step
        got = hk.moe_mlp(*args, backend="native")
    others = torch.arange(20) != 7
    assert got[7].isnan().all() and torch.equal(got[others], clean[others])


@pytest.mark.parametrize("isa", testing.isas())
def test_moe_mlp_native_takes_strided_arguments(isa):
    args = mlp(10, 4, 2, 17, 9, torch.bfloat16)
    x, ids, weights, up, down = args
    views = [testing.strided(x), ids.t().contiguous().t(), testing.strided(weights)]
    with testing.use_isa(isa):
        want = testing.run(hk.moe_mlp, args, backend="native")
        got = testing.run(hk.moe_mlp, [*views, testing.strided(up), testing.strided(down)], backend="native")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_moe_mlp_native_gives_only_the_gradients_asked_for():
    args = mlp(10, 4, 2, 16, 8, torch.float32)
    want = testing.run(hk.moe_mlp, args, backend="native")
    upstream = torch.cos(torch.arange(160, dtype=torch.float64) * 0.7 + 1).view(10, 16).float()
    for i in (0, 2, 3, 4):
        leaves = [a.detach().requires_grad_(i == j) if j != 1 else a for j, a in enumerate(args)]
        hk.moe_mlp(*leaves, backend="native").backward(upstream)
        assert torch.equal(leaves[i].grad, want[f"grad{i}"])


def test_moe_mlp_native_refuses_what_it_cannot_read():
    x, ids, weights, up, down = mlp(4, 3, 2, 6, 5, torch.float32)
    with pytest.raises(hk.BackendError, match=r"moe_mlp\[native\]: needs a contiguous last dimension"):
        hk.moe_mlp(x, ids, weights, up.transpose(1, 2).contiguous().transpose(1, 2), down, backend="native")
    with pytest.raises(
        hk.BackendError, match=r"moe_mlp\[native\]: computes float32 and bfloat16, got float64"
    ):
        hk.moe_mlp(x.double(), ids, weights, up.double(), down.double(), backend="native")
    assert hk.explain(hk.moe_mlp, x, ids, weights, up, down).startswith("moe_mlp: native")
    assert hk.explain(hk.moe_route, x, torch.zeros(6), 2).startswith("moe_route: native")


def numbers(**wrong):
    x, ids, weights, up, down = mlp(4, 3, 2, 6, 5, torch.float32)
    from hebatron_kernels.moe import native

    return {**native._mlp_numbers(x, ids, weights, up, down), "hidden": None, "y": x.clone(), **wrong}


# what compiled code, which checks no values, could hand to C++
BAD = [
    (dict(ids=torch.full((4, 2), 3)), "ids_TK must be experts from 0 on, got 3"),
    (dict(ids=torch.full((4, 2), -1)), "ids_TK must be experts from 0 on, got -1"),
    (dict(tokens=-1), "tokens must be >= 0, got -1"),
    (dict(top_k=0), "top_k must be > 0, got 0"),
    (dict(tokens=2**30, top_k=2), r"tokens \* top_k must be below 2\^31, tokens, got 1073741824"),
    (dict(experts=0), "experts must be > 0, got 0"),
    (dict(width=0), "width must be > 0, got 0"),
    (dict(expert_width=0), "expert_width must be > 0, got 0"),
    (dict(workers=0), "workers must be > 0, got 0"),
    (dict(weight_dtype="bfloat16"), "weights of fp32 tokens must be fp32, dtype, got 1"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_moe_mlp_native_checks_its_numbers(wrong, message):
    with pytest.raises(ValueError, match=f"^moe_mlp: {message}"):
        _native.call("moe_mlp_fwd", **numbers(**wrong))


def test_moe_mlp_native_checks_its_workspace():
    given = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in numbers().items()}
    with pytest.raises(ValueError, match="moe_mlp: workspace is too small, got 0"):
        _native.cpu_module.moe_mlp_fwd(**given)


# ---- moe_route ----

ROUTES = [
    (33, 16, 2, 1, 1),
    (21, 128, 6, 1, 1),
    (9, 7, 7, 1, 1),
    (0, 8, 2, 1, 1),
    (25, 24, 5, 4, 2),
    (5, 4, 2, 2, 1),
]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "n_group", "topk_group"), ROUTES)
def test_moe_route_native_matches_oracle(isa, dtype, normalize, tokens, experts, top_k, n_group, topk_group):
    args = [*routing(tokens, experts), top_k, n_group, topk_group, normalize, 2.5]
    with testing.use_isa(isa):
        testing.check_oracle(hk.moe_route, args, dtype, "native", tokens > 0)


@pytest.mark.parametrize("isa", testing.isas())
def test_moe_route_native_equals_the_torch_form_to_the_bit(isa):
    """300,000 scores: the fp64 sigmoids differ in their last bit, the fp32 ones then in one of about 10^8."""
    with testing.use_isa(isa):
        for groups in ((1, 1), (8, 3)):
            logits, bias = routing(2344, 128, torch.float32)
            logits[::3] *= 20
            got = hk.moe_route(logits, bias, 6, *groups, True, 2.5, backend="native")
            want = hk.moe_route(logits, bias, 6, *groups, True, 2.5, backend="torch")
            assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("isa", testing.isas())
def test_moe_route_native_at_the_ends_of_the_exponential(isa):
    values = [
        0.0,
        -0.0,
        88.0,
        -88.0,
        709.0,
        -709.0,
        745.0,
        -745.0,
        1e30,
        -1e30,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    logits = torch.tensor([values, values[::-1]])
    with testing.use_isa(isa):
        got = hk.moe_route(logits, torch.zeros(13), 13, normalize=False, backend="native")
    want = hk.moe_route(logits, torch.zeros(13), 13, normalize=False, backend="torch")
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)


def test_moe_route_native_does_not_depend_on_threads_or_strides():
    logits, bias = routing(41, 13, torch.float32)
    before = torch.get_num_threads()
    want = testing.run(hk.moe_route, [logits, bias, 3], backend="native")
    try:
        torch.set_num_threads(3)
        got = testing.run(hk.moe_route, [testing.strided(logits), bias, 3], backend="native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_moe_route_native_checks_its_numbers():
    from hebatron_kernels.moe import native

    logits, bias = routing(3, 8, torch.float32)
    out = dict(weights=torch.empty(3, 2), ids=torch.empty(3, 2).long(), counts=torch.empty(8).long())
    for wrong, message in [
        (dict(tokens=-1), "tokens must be >= 0, got -1"),
        (dict(groups=3), "groups must divide the experts, got 3"),
        (dict(groups=8), "groups must have at least 2 experts, groups, got 8"),
        (dict(kept_groups=2), "kept_groups must be between 1 and the groups, got 2"),
        (dict(top_k=9), "top_k must be between 1 and the experts kept, got 9"),
        (dict(workers=0), "workers must be > 0, got 0"),
    ]:
        given = {**native._route_numbers(logits, bias, 2, 1, 1, True, 1.0), **out, **wrong}
        with pytest.raises(ValueError, match=f"^moe_route: {message}"):
            _native.call("moe_route_fwd", **given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_native_registration_and_fullgraph(dtype):
    calls = {
        "moe_route": [*routing(7, 8, dtype), 2, 4, 2, True, 2.5],
        "moe_mlp": mlp(7, 4, 2, 16, 8, dtype),
    }
    for name, args in calls.items():
        testing.check_registration(name, *args, backend="native", dtype=dtype)
        testing.check_fullgraph(getattr(hk, name), args, "native")

"""The expert layer's CUDA kernels on a GPU."""

import pytest
import torch
from gpu_cases import (
    assert_same_bits,
    at,
    check_graph,
    check_never_waits,
    check_oracle,
    check_pointer_errors,
    check_stream,
)

import hebatron_kernels as hk

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [BF16, FP32]


def ids_and_weights(tokens, experts, top_k):
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k].contiguous()
    return ids, torch.rand(tokens, top_k, dtype=torch.float64) + 0.1


def moved(args, dtype=None):
    """To the GPU, floats in this dtype."""
    floats = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in args]
    cast = [a.to(dtype) if f and dtype else a for a, f in zip(args, floats)]
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in cast]


def both_ways(op, args):
    leaves = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    ]
    out = op(*leaves, backend="native")
    outputs = [out] if isinstance(out, torch.Tensor) else [o for o in out if o.is_floating_point()]
    wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    targets = [o for o in outputs if o.requires_grad]
    if not targets:  # nothing is kept for a backward
        return outputs
    grads = torch.autograd.grad(targets, wanted, [torch.ones_like(o) for o in targets], allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]


# tokens, experts, top_k, groups, kept groups: the smallest, the model's, more tokens than the grid has warps, Super's
# top-22 of 512, groups
ROUTES = {
    "smallest": (1, 1, 1, 1, 1),
    "model": (1000, 128, 6, 1, 1),
    "long": (70_001, 128, 6, 1, 1),
    "super": (300, 512, 22, 1, 1),
    "groups": (500, 256, 8, 8, 4),
    "none": (0, 8, 2, 1, 1),
}


def route_args(tokens, experts, top_k, groups, kept):
    return [torch.randn(tokens, experts), 0.2 * torch.randn(experts), top_k, groups, kept, True, 2.5]


@pytest.mark.parametrize("name", [name for name in ROUTES if name != "long"])
def test_moe_route_matches_oracle(place, name):
    check_oracle(
        place, at(place, hk.moe_route), route_args(*ROUTES[name]), FP32, "native", ROUTES[name][0] > 0
    )


@pytest.mark.parametrize("name", ROUTES)
def test_moe_route_chooses_what_the_cpu_does_among_many_equals(gpu, name):
    logits, bias, *others = route_args(*ROUTES[name])
    args = [(logits * 4).round() / 4, (bias * 4).round() / 4, *others]
    want, got = hk.moe_route(*args), hk.moe_route(*moved(args), backend="native")
    assert torch.equal(got[1].cpu(), want[1]) and torch.equal(got[2].cpu(), want[2])


# tokens, experts, top_k, width: the smallest, the model's, around a block's 2,048 slots, no whole pack, most experts
SIZES = {
    "smallest": (1, 1, 1, 8),
    "model": (300, 128, 6, 2688),
    "odd": (683, 7, 3, 113),
    "super": (99, 512, 22, 1024),
    "none": (0, 3, 2, 8),
}


def row_args(tokens, experts, top_k, width):
    ids, weights = ids_and_weights(tokens, experts, top_k)
    x = torch.randn(tokens, width, dtype=torch.float64)
    order = torch.argsort(ids.flatten(), stable=True)
    return x, ids, x[order // top_k] + 0.1, order, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_moe_permute_matches_oracle(place, dtype, name):
    x, ids, *_ = row_args(*SIZES[name])
    check_oracle(place, at(place, hk.moe_permute), [x, ids, SIZES[name][1]], dtype, "native", len(x) > 0)


@pytest.mark.parametrize(("experts", "top_k"), [(128, 6), (512, 22), (1, 6)])
def test_moe_permute_is_a_stable_sort_of_65536_tokens(gpu, experts, top_k):
    ids = torch.randint(experts, (65536, top_k))
    _, order, offsets = hk.moe_permute(torch.ones(65536, 8).cuda(), ids.cuda(), experts, backend="native")
    assert torch.equal(order.cpu(), torch.argsort(ids.flatten(), stable=True))
    assert torch.equal(offsets.cpu(), torch.bincount(ids.flatten(), minlength=experts).cumsum(0).int())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_moe_combine_matches_oracle(place, dtype, name):
    x, _, rows, order, weights = row_args(*SIZES[name])
    check_oracle(
        place, at(place, hk.moe_combine), [rows, order, weights, len(x)], dtype, "native", len(x) > 0
    )
    norm = 1 + 0.1 * torch.randn(x.shape[1], dtype=torch.float64)
    args = [rows, order, weights, norm, 1e-5, x.cos(), x]
    check_oracle(place, at(place, hk.moe_combine_norm), args, dtype, "native", len(x) > 0)


@pytest.mark.parametrize("padding", [3, 8])  # rows that start on no pack, and on one
def test_moe_combine_takes_strided_rows(place, padding):
    _, _, rows, order, weights = row_args(19, 5, 3, 264)
    call = at(place, hk.moe_combine, padding)
    check_oracle(place, call, [rows, order, weights, 19], BF16, "native")


# tokens, experts, top_k, width, expert width: the smallest, the model's widths, one expert for all, 22 choices
LAYERS = {
    "smallest": (1, 1, 1, 8, 8),
    "model": (200, 16, 6, 2688, 1856),
    "one takes all": (300, 1, 1, 264, 136),
    "most": (40, 128, 22, 136, 72),
    "none": (0, 3, 2, 8, 8),
}


def mlp_args(tokens, experts, top_k, width, expert_width):
    ids, weights = ids_and_weights(tokens, experts, top_k)
    up = torch.randn(experts, expert_width, width, dtype=torch.float64) / width**0.5
    down = torch.randn(experts, width, expert_width, dtype=torch.float64) / expert_width**0.5
    return [torch.randn(tokens, width, dtype=torch.float64), ids, weights, up, down]


@pytest.mark.parametrize("name", LAYERS)
def test_moe_mlp_matches_oracle(place, name):
    with torch.device(place.device):
        args = mlp_args(*LAYERS[name])
    check_oracle(place, at(place, hk.moe_mlp), args, BF16, "native", LAYERS[name][0] > 0)


def test_moe_mlp_keeps_the_gradients_of_fp32_weights_in_fp32(place):
    x, ids, weights, up, down = mlp_args(50, 6, 2, 264, 136)
    args = [x.to(BF16), ids, weights.float(), up.float(), down.float()]
    check_oracle(place, at(place, hk.moe_mlp), args, None, "native")


def few(*args, backend):
    """The layer as it decodes: nothing is kept for a backward, so that one launch serves up to 128 tokens."""
    with torch.no_grad():
        return hk.moe_mlp(*args, backend=backend)


# tokens, experts, top_k, width, expert width: the smallest; the model's widths, one token and many; its most tokens;
# several groups of 8 tokens an expert
FEW = {
    "smallest": (1, 1, 1, 8, 8),
    "one": (1, 16, 6, 2688, 1856),
    "model": (40, 16, 6, 2688, 1856),
    "most": (128, 128, 6, 136, 72),
    "groups": (32, 2, 2, 136, 72),
}


@pytest.mark.parametrize("name", FEW)
def test_moe_decode_matches_oracle(place, name):
    with torch.device(place.device):
        args = mlp_args(*FEW[name])
    check_oracle(place, at(place, few), args, BF16, "native", grad=False)


# the operators, and the layer of few tokens: their bits, streams, graphs and pointers

CALLS = {
    "route": (hk.moe_route, lambda: moved(route_args(*ROUTES["model"]))),
    "permute": (hk.moe_permute, lambda: [*moved(row_args(*SIZES["model"])[:2], BF16), 128]),
    "combine": (hk.moe_combine, lambda: [*moved(row_args(*SIZES["model"])[2:], BF16), 300]),
    "mlp": (hk.moe_mlp, lambda: moved(mlp_args(200, 16, 6, 264, 136), BF16)),
    "decode": (few, lambda: moved(mlp_args(30, 16, 6, 264, 136), BF16)),
}
POINTERS = {
    "route": ["logits", "bias", "weights", "ids", "counts"],
    "permute": ["ids", "x", "rows", "order", "position", "offsets"],
    "combine": ["rows", "order", "weights", "y"],
    "mlp": ["x", "ids", "weights", "up", "down", "y"],
    "decode": ["x", "ids", "weights", "up", "down", "y"],
}


@pytest.mark.parametrize("name", CALLS)
def test_moe_gives_the_same_bits_every_time(gpu, name):
    op, make = CALLS[name]
    args = make()
    want = both_ways(op, args)
    for _ in range(5):
        assert_same_bits(both_ways(op, args), want)


@pytest.mark.parametrize("name", CALLS)
def test_moe_runs_on_the_current_stream(gpu, name, proves):
    proves("streams")
    op, make = CALLS[name]
    args = make()
    check_stream(lambda: op(*args, backend="native"), args[0])
    check_stream(lambda: both_ways(op, args), args[0])


@pytest.mark.parametrize("name", CALLS)
def test_moe_replays_from_a_graph(gpu, name, proves):
    proves("graphs")
    op, make = CALLS[name]
    args = make()
    check_graph(lambda: op(*args, backend="native"), args[0])
    check_graph(lambda: both_ways(op, args), args[0])


@pytest.mark.parametrize("name", ["mlp", "decode"])
def test_moe_replays_with_another_routing(gpu, name, proves):
    """The sizes of the experts live on the device: a graph must follow them."""
    proves("graphs")
    op, make = CALLS[name]
    args = make()
    both_ways(op, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(op, args)
    args[1].copy_(args[1].flip(0))
    graph.replay()
    got = [t.clone() for t in captured]
    assert_same_bits(got, both_ways(op, args))


@pytest.mark.parametrize("name", CALLS)
def test_moe_never_waits_for_the_gpu(gpu, name, proves):
    proves("streams")
    op, make = CALLS[name]
    args = make()
    check_never_waits(lambda: both_ways(op, args))


@pytest.mark.parametrize("name", CALLS)
def test_moe_refuses_pointers_it_cannot_follow(gpu, name, monkeypatch, proves):
    proves("errors")
    op, make = CALLS[name]
    args = make()
    function = "moe_mlp_fwd" if name == "decode" else f"moe_{name}_fwd"
    check_pointer_errors(monkeypatch, function, POINTERS[name], lambda: op(*args, backend="native"))

"""The causal convolution's CUDA kernels on a GPU."""

import pytest
import torch
from conv_cases import FORMS, make
from gpu_cases import (
    assert_same_bits,
    at,
    check_graph,
    check_never_waits,
    check_oracle,
    check_pointer_errors,
    check_stream,
    need_memory,
)

import hebatron_kernels as hk

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
# tokens, channels, taps, ends of the sequences: the smallest, the model's channels, ends everywhere, the most taps, and
# states alone
SHAPES = {
    "smallest": (1, 8, 4, None),
    "model": (150, 6144, 4, [0, 3, 64, 64, 128, 150]),
    "odd": (113, 17, 4, [0, 1, 1, 3, 40, 113]),
    "most taps": (41, 6, 8, [0, 3, 20, 41]),
    "none": (0, 8, 4, [0, 0, 0]),
}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_conv_matches_oracle(place, dtype, form, name):
    check_oracle(place, at(place, hk.causal_conv1d), make(*SHAPES[name], *form), dtype, "native")


@pytest.mark.parametrize("padding", [3, 8])  # rows that start on no pack, and on one
def test_conv_takes_strided_rows(place, padding):
    x, *others = make(40, 264)

    def of_rows(x, *args, backend):
        wide = torch.nn.functional.pad(x, (padding, padding), value=torch.nan)
        return hk.causal_conv1d(wide[:, padding:-padding], *args, backend=backend)

    check_oracle(place, at(place, of_rows), [x, *others], BF16, "native")


def moved(args, dtype=BF16):
    floats = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in args]
    cast = [a.to(dtype) if f else a for a, f in zip(args, floats)]
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in cast]


def both_ways(args):
    leaves = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    ]
    outputs = list(hk.causal_conv1d(*leaves, backend="native"))
    wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])]


def update(args):
    x, weight, bias, activation, _, _ = args
    state = torch.zeros(*x.shape, weight.shape[1] - 1, dtype=x.dtype, device=x.device)
    return [hk.causal_conv1d_update(x, state, weight, bias, activation, backend="native"), state]


def model_args(tokens=3000):
    return moved(make(tokens, 6144, ends=[0, 70, 1000, 1000, tokens]))


def test_conv_token_by_token_is_prefill_to_the_bit(gpu):
    x, weight, bias, activation, _, state = moved(make(20, 6144))
    whole, last = hk.causal_conv1d(x, weight, bias, activation, None, state, backend="native")
    rows = [
        hk.causal_conv1d_update(x[t : t + 1], state, weight, bias, activation, backend="native")
        for t in range(20)
    ]
    assert_same_bits([torch.cat(rows), state], [whole, last])


def test_conv_gives_the_same_bits_every_time(gpu):
    args = model_args()
    want = both_ways(args)
    for _ in range(5):
        assert_same_bits(both_ways(args), want)


def test_conv_runs_on_the_current_stream(gpu, proves):
    proves("streams")
    args = model_args()
    check_stream(lambda: hk.causal_conv1d(*args, backend="native"), args[0])
    check_stream(lambda: both_ways(args), args[0])
    check_stream(lambda: update(args), args[0])


def test_conv_replays_from_a_graph(gpu, proves):
    proves("graphs")
    args = model_args()
    check_graph(lambda: hk.causal_conv1d(*args, backend="native"), args[0])
    check_graph(lambda: both_ways(args), args[0])
    check_graph(lambda: update(args), args[0])


def test_conv_replays_with_other_documents(gpu, proves):
    """Where the documents begin lives on the device: a graph must follow it."""
    proves("graphs")
    args = model_args()
    both_ways(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(args)
    args[4].copy_(torch.tensor([0, 500, 501, 2999, 3000]))
    graph.replay()
    got = [t.clone() for t in captured]
    assert_same_bits(got, both_ways(args))


def test_conv_never_waits_for_the_gpu(gpu, proves):
    proves("streams")
    args = model_args()
    check_never_waits(lambda: both_ways(args))
    alone = [*args[:4], None, None]  # one sequence: its ends are not made on the host either
    check_never_waits(lambda: both_ways(alone))


def test_conv_refuses_pointers_it_cannot_follow(gpu, monkeypatch, proves):
    proves("errors")
    args = moved(make(30, 64, ends=[0, 9, 30]))
    pointers = ["x", "past", "weight", "bias", "cu_seqlens", "y", "last"]
    check_pointer_errors(
        monkeypatch, "causal_conv1d_fwd", pointers, lambda: hk.causal_conv1d(*args, backend="native")
    )
    pointers = ["x", "state", "weight", "bias", "y"]
    check_pointer_errors(monkeypatch, "causal_conv1d_update", pointers, lambda: update(args))


def test_conv_beyond_two_to_the_31_elements(gpu):
    tokens, channels = 360_000, 6144  # 2.2e9 elements
    need_memory(4.5 * 4)
    x = torch.empty(tokens, channels, dtype=BF16, device="cuda").normal_()
    weight, bias = torch.randn(channels, 4, device="cuda"), torch.randn(channels, device="cuda")
    got, _ = hk.causal_conv1d(x, weight, bias, "silu", backend="native")
    for begin in (3, tokens // 2, tokens - 200):
        past = x[begin - 3 : begin].T[None].contiguous()
        part = slice(begin, begin + 200)
        want, _ = hk.causal_conv1d(x[part].clone(), weight, bias, "silu", None, past, backend="native")
        assert_same_bits(got[part].clone(), want)

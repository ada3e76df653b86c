"""Attention's CUDA kernels on a GPU."""

import pytest
import torch
from attention_cases import packed, paged
from gpu_cases import (
    assert_same_bits,
    check_graph,
    check_never_waits,
    check_oracle,
    check_pointer_errors,
    check_stream,
    need_memory,
)

import hebatron_kernels as hk

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def moved(args, device="cuda", dtype=BF16):
    """To the device, floats in this dtype."""
    tensors = [isinstance(a, torch.Tensor) for a in args]
    return [a.to(device, dtype if a.is_floating_point() else None) if t else a for a, t in zip(args, tensors)]


# ---- attention_decode ----

# lengths, blocks of the table, block size, heads, kv heads, head dim: the smallest; the model's heads, lengths around a
# warp's 16 keys and a block's 64; 20 heads a kv head; the largest head dim; so many keys that a sequence is 132 parts
# in 11 groups; many sequences
DECODES = {
    "smallest": ([0], 1, 1, 1, 1, 8),
    "model": ([0, 15, 16, 63, 64, 700], 50, 16, 32, 2, 128),
    "ratios": ([33, 900], 300, 5, 40, 2, 64),
    "wide": ([130, 7], 60, 7, 4, 2, 256),
    "long": ([40_000], 128, 512, 32, 2, 128),
    "batch": ([9 * n for n in range(40)], 24, 16, 32, 2, 128),
}


def decode_args(lengths, blocks, block_size, heads, kv_heads, head_dim):
    args, _ = paged(lengths, block_size, heads, kv_heads, head_dim, torch.float32)
    args[3].nan_to_num_(1e3)
    table = torch.full((len(lengths), blocks), 10**6, dtype=torch.int32)
    used = args[4][:, :blocks]
    table[:, : used.shape[1]] = used
    args[4] = table
    return args


def decoded(place):
    def call(*args, backend):
        tested = backend == "native"
        there = moved(args, place.device, args[0].dtype)
        there[3] = there[3].clone()
        return hk.attention_decode(*there, backend=place.backend if tested else backend).cpu()

    return call


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", DECODES)
def test_attention_decode_matches_oracle(place, name, window):
    args = [*decode_args(*DECODES[name]), None, window]
    check_oracle(place, decoded(place), args, BF16, "native", grad=False)


def test_attention_decode_writes_its_own_rows_alone(gpu):
    args = moved(decode_args(*DECODES["model"]))
    there, want = args[3].clone(), args[3].clone()
    hk.attention_decode(*args[:3], there, *args[4:], backend="native")
    for n, length in enumerate(DECODES["model"][0]):
        block, row = args[4][n, length // 16], length % 16
        want[0, block, row], want[1, block, row] = args[1][n], args[2][n]
    assert torch.equal(there, want)


@pytest.mark.parametrize("name", ["model", "long", "batch"])
def test_attention_decode_gives_the_same_bits_every_time(gpu, name):
    args = moved(decode_args(*DECODES[name]))
    want = hk.attention_decode(*args, backend="native")
    for _ in range(20):
        assert_same_bits(hk.attention_decode(*args, backend="native"), want)


@pytest.mark.parametrize("name", ["model", "long"])
def test_attention_decode_runs_on_the_current_stream(gpu, name, proves):
    proves("streams")
    args = moved(decode_args(*DECODES[name]))
    check_stream(lambda: hk.attention_decode(*args, backend="native"), args[0])


def test_attention_decode_replays_from_a_graph_with_other_lengths(gpu, proves):
    """The lengths live on the device: a graph must follow them."""
    proves("graphs")
    args = moved(decode_args(*DECODES["long"]))
    check_graph(lambda: hk.attention_decode(*args, backend="native"), args[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hk.attention_decode(*args, backend="native")
    for length in (39_999, 700, 0):
        args[5].fill_(length)
        graph.replay()
        got = captured.clone()
        assert_same_bits(got, hk.attention_decode(*args, backend="native"))


def test_attention_decode_never_waits_for_the_gpu(gpu, proves):
    proves("streams")
    args = moved(decode_args(*DECODES["model"]))
    check_never_waits(lambda: hk.attention_decode(*args, backend="native"))


def test_attention_decode_reads_a_cache_of_more_than_2_to_the_31_elements(gpu):
    need_memory(10)
    args = moved(decode_args(*DECODES["model"]))
    want = hk.attention_decode(*args[:3], args[3].clone(), *args[4:], backend="native")
    blocks = args[3].shape[1]
    far = torch.empty(2, 2**31 // (16 * 2 * 128) + blocks, *args[3].shape[2:], device="cuda", dtype=BF16)
    far[:, -blocks:] = args[3]
    table = args[4] + (far.shape[1] - blocks)
    assert_same_bits(hk.attention_decode(*args[:3], far, table, args[5], backend="native"), want)


def test_attention_decode_refuses_pointers_it_cannot_follow(gpu, monkeypatch, proves):
    proves("errors")
    args = moved(decode_args(*DECODES["model"]))
    pointers = ["q", "k_new", "v_new", "keys", "values", "block_table", "lengths", "o"]
    call = lambda: hk.attention_decode(*args, backend="native")  # noqa: E731
    check_pointer_errors(monkeypatch, "attention_decode", pointers, call)


# ---- attention_prefill ----

# queries, keys, heads, kv heads, head dim, window: the smallest; the model's heads past a tile, a chunk behind its
# keys; 5 heads a kv head; sequences of no queries, no keys, one token; windows. Head dim 128 is served by the kernel of
# its own that Hopper has, others by the portable one
PREFILLS = {
    "smallest": ([1], [1], 1, 1, 8, None),
    "hopper, smallest": ([1], [1], 1, 1, 128, None),
    "hopper": ([300, 40], [300, 333], 32, 2, 128, None),
    "hopper, ragged": ([0, 5, 130, 3, 1], [4, 0, 400, 3, 1], 4, 2, 128, 200),
    "ratios": ([90, 70], [90, 95], 10, 2, 64, 50),
    "ragged": ([0, 5, 130, 3, 1], [4, 0, 200, 3, 1], 4, 2, 72, 100),
}


FORMS = ["ratios", "hopper"]


def prefill_args(name):
    lengths_q, lengths_k, heads, kv_heads, head_dim, window = PREFILLS[name]
    if (
        name.startswith("hopper")
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() != (9, 0)
    ):
        pytest.skip("needs compute capability 9.0")
    args = packed(lengths_q, lengths_k, torch.float32, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return [*args, True, None, window]


def prefilled(place):
    def call(*args, backend):
        there = place.backend if backend == "native" else backend
        return hk.attention_prefill(*moved(args, place.device, args[0].dtype), backend=there).cpu()

    return call


def both_ways(args):
    leaves = [a.detach().requires_grad_() for a in args[:3]]
    out = hk.attention_prefill(*leaves, *args[3:], backend="native")
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("name", PREFILLS)
def test_attention_prefill_matches_oracle(place, name, dtype):
    check_oracle(place, prefilled(place), prefill_args(name), dtype, "native", grad=False)


@pytest.mark.parametrize("head_dim", [136, 256])
def test_attention_prefill_matches_oracle_at_wide_heads(place, head_dim):
    args = [*packed([150], None, torch.float32, heads=2, kv_heads=1, head_dim=head_dim), True, None, None]
    check_oracle(place, prefilled(place), args, BF16, "native", grad=False)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("name", PREFILLS)
def test_attention_prefill_gradients_match_oracle(place, name, dtype):
    # of one key the gradients to q and k are a difference of equals, all rounding
    check_oracle(
        place, prefilled(place), prefill_args(name), dtype, "native", grad=not name.endswith("smallest")
    )


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("with_gradients", [False, True], ids=["result", "gradients"])
def test_attention_prefill_gives_the_same_bits_every_time(gpu, name, with_gradients):
    args = moved(prefill_args(name))
    call = both_ways if with_gradients else lambda a: hk.attention_prefill(*a, backend="native")
    want = call(args)
    for _ in range(5):
        assert_same_bits(call(args), want)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("with_gradients", [False, True], ids=["result", "gradients"])
def test_attention_prefill_runs_on_the_current_stream_and_never_waits(gpu, name, with_gradients, proves):
    proves("streams")
    args = moved(prefill_args(name))
    call = both_ways if with_gradients else lambda a: hk.attention_prefill(*a, backend="native")
    check_stream(lambda: call(args), args[0])
    check_never_waits(lambda: call(args))
    check_never_waits(
        lambda: call([*args[:3], None, None, False, None, None])
    )  # the ends are made on the GPU


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("with_gradients", [False, True], ids=["result", "gradients"])
def test_attention_prefill_replays_from_a_graph_with_other_lengths(gpu, name, with_gradients, proves):
    """The lengths live on the device: a graph must follow them."""
    proves("graphs")
    args = moved(prefill_args(name))
    call = both_ways if with_gradients else lambda a: hk.attention_prefill(*a, backend="native")
    check_graph(lambda: call(args), args[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(args)
    ends = [int(cu[-1]) for cu in args[3:5]]
    for first_q, first_k in ((10, ends[1] - 9), (0, ends[1]), (ends[0], 7)):
        args[3][1], args[4][1] = first_q, first_k
        graph.replay()
        got = [t.clone() for t in (captured if with_gradients else [captured])]
        assert_same_bits(got, call(args) if with_gradients else [call(args)])


def test_attention_prefill_takes_rows_past_2_to_the_31_elements(gpu):
    need_memory(12)
    tokens = 2**31 // (34 * 128) + 400
    fused = torch.zeros(tokens, 34, 128, device="cuda", dtype=BF16)
    fused[-300:] = torch.randn(300, 34, 128, device="cuda", dtype=BF16)
    ends = torch.tensor([0, tokens - 300, tokens], device="cuda", dtype=torch.int32)
    got = hk.attention_prefill(*fused.split([32, 1, 1], dim=1), ends, window=64, backend="native")
    last = (x.contiguous() for x in fused[-300:].split([32, 1, 1], dim=1))
    assert fused.numel() > 2**31
    assert_same_bits(got[-300:], hk.attention_prefill(*last, window=64, backend="native"))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("with_gradients", [False, True], ids=["result", "gradients"])
def test_attention_prefill_refuses_pointers_it_cannot_follow(gpu, monkeypatch, name, with_gradients, proves):
    proves("errors")
    args = moved(prefill_args(name))
    pointers, op = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "o", "lse"], "attention_prefill_fwd"
    if with_gradients:
        op, pointers = "attention_prefill_bwd", [*pointers, "grad_o", "grad_q", "grad_k", "grad_v"]
    call = (
        (lambda: both_ways(args))
        if with_gradients
        else (lambda: hk.attention_prefill(*args, backend="native"))
    )
    check_pointer_errors(monkeypatch, op, pointers, call)

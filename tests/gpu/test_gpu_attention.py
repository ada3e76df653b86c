"""Attention's CUDA kernels on a GPU."""

import pytest
import torch
from attention_cases import paged
from gpu_cases import (
    assert_same_bits,
    check_graph,
    check_never_waits,
    check_pointer_errors,
    check_stream,
    need_memory,
)

import hebatron_kernels as hk
from hebatron_kernels import testing

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
    testing.check_oracle(decoded(place), args, BF16, "native", grad=False)


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

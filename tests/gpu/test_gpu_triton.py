"""The experts' Triton form on a GPU: values with gradients, streams, graphs, no waiting, sizes beyond 2^31."""

import pytest
import torch
from gpu_cases import (
    assert_same_bits,
    at,
    check_graph,
    check_never_waits,
    check_oracle,
    check_stream,
    need_memory,
)
from test_gpu_grouped_gemm import BF16, LARGE, PROBLEMS, arguments
from test_gpu_moe import LAYERS, mlp_args, moved

import hebatron_kernels as hk

pytestmark = pytest.mark.gpu


def call_of(counts, tail, width, outputs, whole=True, dtype=BF16):
    args = arguments(counts, tail, width, outputs, whole, True, "cuda", dtype)
    return args, lambda: hk.grouped_gemm(*args, backend="triton")


@pytest.mark.parametrize("whole", [False, True], ids=["product", "whole"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_grouped_gemm_triton_matches_oracle(on_triton, problem, dtype, whole):
    args = arguments(*PROBLEMS[problem], whole, device="cuda")
    check_oracle(on_triton, at(on_triton, hk.grouped_gemm), args, dtype, "native")


# mean rows of an expert: one problem for every size of the blocks
@pytest.mark.parametrize("mean", [5, 25, 70, 300])
@pytest.mark.parametrize("stored", ["width last", "outputs last"])
def test_grouped_gemm_triton_matches_oracle_in_every_block(on_triton, mean, stored):
    args = arguments([0, 2 * mean, 1, 2 * mean - 1, mean], 3, 200, 328)
    if stored == "outputs last":
        args[1] = args[1].contiguous()
    check_oracle(on_triton, at(on_triton, hk.grouped_gemm), args, BF16, "native")


def test_grouped_gemm_triton_takes_strided_rows(on_triton):
    check_oracle(on_triton, at(on_triton, hk.grouped_gemm, 8), arguments(*PROBLEMS["ragged"]), BF16, "native")


def test_grouped_gemm_triton_reads_nothing_that_is_not_its_own(on_triton):
    args, call = call_of(*PROBLEMS["ragged"])
    want = call()
    a, b, offsets, taken, scale, activation = args
    end = int(offsets[-1])
    empty = torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0
    b = torch.where(empty[:, None, None], torch.nan, b)
    a = torch.cat([a, torch.full_like(a[:7], torch.nan)])
    scale[end:], taken[end:] = torch.nan, a.shape[0] - 1
    got = hk.grouped_gemm(a, b, offsets, taken, scale, activation, backend="triton")
    assert_same_bits(got, want)
    assert not got[end:].any()


def both_ways(args):
    leaves = [v.detach().requires_grad_() if v is not None and v.is_floating_point() else v for v in args[:5]]
    out = hk.grouped_gemm(*leaves, args[5], backend="triton")
    wanted = [v for v in leaves if v is not None and v.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))]


def test_grouped_gemm_triton_gives_the_same_bits_every_time(on_triton):
    args, _ = call_of([3000, 0, 3, 200], 0, 256, 512)
    want = both_ways(args)
    for _ in range(5):
        assert_same_bits(both_ways(args), want)


def test_grouped_gemm_triton_runs_on_the_current_stream(on_triton, proves):
    proves("streams")
    args, call = call_of([150, 0, 3, 200], 0, 256, 512)
    check_stream(call, args[0])


def test_grouped_gemm_triton_never_waits_for_the_gpu(on_triton, proves):
    proves("streams")
    args, call = call_of([150, 0, 3, 200], 0, 256, 512)
    check_never_waits(call)
    check_never_waits(lambda: both_ways(args))


def test_grouped_gemm_triton_replays_from_a_graph(on_triton, proves):
    proves("graphs")
    args, call = call_of([150, 0, 3, 200], 0, 256, 512)
    check_graph(call, args[0])


def test_grouped_gemm_triton_replays_with_another_routing(on_triton, proves):
    proves("graphs")
    args, call = call_of([150, 0, 3, 200], 0, 256, 512)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    args[2].copy_(torch.tensor([0, 340, 341, 353]))
    graph.replay()
    got = captured.clone()
    assert_same_bits(got, call())


@pytest.mark.parametrize("large", LARGE)
def test_grouped_gemm_triton_beyond_two_to_the_31_elements(on_triton, large):
    rows, source, width, outputs, experts = LARGE[large]
    need_memory(14)
    a = torch.empty(source, width, dtype=BF16, device="cuda").normal_()
    b = torch.empty(experts, outputs, width, dtype=BF16, device="cuda").normal_().transpose(1, 2)
    offsets = torch.linspace(rows / experts, rows, experts, device="cuda").round().int()
    taken = torch.randint(source, (rows,), dtype=torch.int32, device="cuda")
    taken[-1] = source - 1
    got = hk.grouped_gemm(a, b, offsets, taken, backend="triton")
    for begin in (0, rows // 2, rows - 300):
        part = slice(begin, begin + 300)
        ends = (offsets.clamp(part.start, part.stop) - part.start).int()
        want = hk.grouped_gemm(a[taken[part].long()], b, ends, backend="torch")
        torch.testing.assert_close(got[part], want, rtol=2**-7, atol=2**-7 * want.abs().max().item())


# the expert layer, whose products these are


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_moe_mlp_triton_matches_oracle(on_triton, name, dtype):
    with torch.device("cuda"):
        args = mlp_args(*LAYERS[name])
    check_oracle(on_triton, at(on_triton, hk.moe_mlp), args, dtype, "native", LAYERS[name][0] > 0)


def layer_calls():
    args = moved(mlp_args(200, 16, 6, 264, 136), BF16)

    def back():
        leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
        out = hk.moe_mlp(*leaves, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, [leaves[i] for i in (0, 2, 3, 4)], out.detach())]

    return args, [lambda: hk.moe_mlp(*args, backend="triton"), back]


def test_moe_mlp_triton_gives_the_same_bits_every_time(on_triton):
    _, calls = layer_calls()
    for call in calls:
        want = call()
        for _ in range(5):
            assert_same_bits(call(), want)


def test_moe_mlp_triton_runs_on_the_current_stream_and_never_waits(on_triton, proves):
    proves("streams")
    args, calls = layer_calls()
    for call in calls:
        check_stream(call, args[0])
        check_never_waits(call)


def test_moe_mlp_triton_replays_from_a_graph(on_triton, proves):
    proves("graphs")
    args, calls = layer_calls()
    for call in calls:
        check_graph(call, args[0])

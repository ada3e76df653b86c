"""linear_cross_entropy on a GPU: torch's products around csrc/cuda/loss.cu."""

from functools import partial

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
    need_memory,
)
from loss_cases import REDUCTIONS, make

import hebatron_kernels as hk
from hebatron_kernels import _native
from hebatron_kernels.loss import native

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
# tokens, width, entries: the smallest, rows that start on no pack, packs, more entries than a block takes at once
SHAPES = {"smallest": (1, 8, 8), "odd": (50, 33, 113), "packs": (130, 264, 4096), "many": (9, 64, 131072)}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_loss_matches_oracle(place, dtype, reduction, name):
    args = [*make(*SHAPES[name]), -100, reduction]
    check_oracle(place, at(place, hk.linear_cross_entropy), args, dtype, "native")


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_loss_in_chunks_and_slabs_matches_oracle(place, dtype, monkeypatch):
    for name, value in (("CHUNK_LOGITS", 1), ("CHUNK_TOKENS", 16), ("SLAB_ENTRIES", 24)):
        monkeypatch.setattr(native, name, value)
    args = [*make(50, 40, 113), -100, "mean"]
    check_oracle(place, at(place, hk.linear_cross_entropy), args, dtype, "native")


def args_of(name="packs"):
    return [a.cuda() for a in make(*SHAPES[name], dtype=BF16)]


def both_ways(args, reduction="mean"):
    leaves = [args[0].detach().requires_grad_(), args[1].detach().requires_grad_()]
    loss = hk.linear_cross_entropy(*leaves, args[2], reduction=reduction, backend="native")
    return [loss, *torch.autograd.grad(loss.sum(), leaves)]


def test_loss_gives_the_same_bits_every_time(gpu):
    args = args_of()
    want = both_ways(args)
    for _ in range(5):
        assert_same_bits(both_ways(args), want)


def test_loss_runs_on_the_current_stream(gpu, proves):
    proves("streams")
    args = args_of()
    check_stream(lambda: both_ways(args), args[0])


def test_loss_replays_from_a_graph(gpu, proves):
    proves("graphs")
    args = args_of()
    check_graph(lambda: hk.linear_cross_entropy(*args, backend="native"), args[0])
    check_graph(lambda: both_ways(args), args[0])


def test_loss_never_waits_for_the_gpu(gpu, proves):
    proves("streams")
    args = args_of()
    check_never_waits(lambda: both_ways(args))


def test_loss_survives_a_wrong_target(gpu, proves):
    proves("errors")
    x, weight, targets = args_of()
    targets[1:3] = torch.tensor([4096, -3])
    found = hk.linear_cross_entropy(x, weight, targets, reduction="none", backend="native")
    assert found[1:3].isnan().all() and found[3:].isfinite().all()


def test_loss_refuses_pointers_it_cannot_follow(gpu, monkeypatch, proves):
    proves("errors")
    args = args_of()
    pointers = ["logits", "targets", "losses", "lse"]
    call = partial(hk.linear_cross_entropy, *args, backend="native")
    check_pointer_errors(monkeypatch, "cross_entropy_fwd", pointers, call)
    pointers = ["logits", "targets", "lse", "upstream"]
    check_pointer_errors(monkeypatch, "cross_entropy_bwd", pointers, lambda: both_ways(args))


def test_loss_beyond_two_to_the_31_logits(gpu):
    rows, entries = 17_000, 131_072  # 2.2e9
    need_memory(10)
    logits = torch.empty(rows, entries, device="cuda").normal_()
    targets = torch.randint(entries, (rows,), device="cuda")
    losses, lse, upstream = torch.empty(3, rows, device="cuda")
    upstream.fill_(1.0)
    numbers = dict(rows=rows, entries=entries, ignore_index=-100, logits_stride=entries, targets_stride=1)
    tensors = dict(logits=logits, targets=targets, lse=lse)
    _native.call("cross_entropy_fwd", **numbers, **tensors, losses=losses)
    want = torch.nn.functional.cross_entropy(logits[-50:], targets[-50:], reduction="none")
    torch.testing.assert_close(losses[-50:], want)
    grad = torch.softmax(logits[-50:], 1) - torch.nn.functional.one_hot(targets[-50:], entries)
    _native.call("cross_entropy_bwd", **numbers, **tensors, first=0, dtype="bfloat16", upstream=upstream)
    torch.testing.assert_close(logits[-50:].view(BF16)[:, :entries].float(), grad, rtol=2**-7, atol=1e-6)

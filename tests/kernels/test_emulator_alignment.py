"""Tensors that start anywhere, as slices of others do: a CUDA kernel takes them or its operator says why it does not.

On a GPU a vector at an address that is no multiple of its size ends the context; the checked build reports it."""

import conv_cases
import loss_cases
import moe_cases
import pytest
import ssd_cases
import torch
from attention_cases import packed

import hebatron_kernels as hk
from hebatron_kernels import testing

pytestmark = pytest.mark.usefixtures("emulator")

BF16, FP32 = torch.bfloat16, torch.float32


def from_one_on(value):
    """The same values, contiguous, behind one element more."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)


def norm():
    return [torch.randn(5, 48), torch.randn(48), 1e-5, torch.randn(5, 48), torch.randn(5, 48), 16]


def combine():
    ids, weights = moe_cases.slots(6, 5, 2)
    return [torch.randn(12, 16), ids.flatten().argsort(stable=True), weights, 6]


# Sizes that whole packs fit, so that only the addresses are in their way.
PROBLEMS = {
    "norm": (hk.rms_norm, norm),
    "conv": (hk.causal_conv1d, lambda: conv_cases.make(9, 16)),
    "scan": (hk.ssd_scan, lambda: ssd_cases.make(5, 2, 8, 1, 8)),
    "route": (hk.moe_route, lambda: [*moe_cases.routing(5, 16), 2]),
    "combine": (hk.moe_combine, combine),
    "experts": (hk.moe_mlp, lambda: moe_cases.mlp(5, 4, 2, 16, 8)),
    "attention": (hk.attention_prefill, lambda: packed([5, 3])),
    "loss": (hk.linear_cross_entropy, lambda: loss_cases.make(5, 16, 24)),
}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_take_tensors_that_start_anywhere_or_say_why_not(checked, name, dtype):
    op, make = PROBLEMS[name]
    torch.manual_seed(3)
    args = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in make()]
    moved = [from_one_on(a) for a in args]
    if op is hk.moe_mlp and dtype == FP32:
        return  # bf16 alone
    try:
        got = testing.run(op, moved, backend="emulator")
    except hk.BackendError as reason:
        assert "start on 16 bytes" in str(reason)
        return
    want = testing.run(op, args, backend="emulator")
    for key in want:  # single elements in place of packs: another order of the sums
        torch.testing.assert_close(got[key], want[key], rtol=2 * torch.finfo(dtype).eps, atol=1e-5, msg=key)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_one_token_states_take_tensors_that_start_anywhere(checked, dtype):
    torch.manual_seed(4)
    state, rows = torch.randn(2, 4, 8, 16), [torch.randn(2, 4, 8), torch.randn(2, 4), -torch.rand(4)]
    rows += [torch.randn(2, 2, 16), torch.randn(2, 2, 16), torch.randn(4), torch.randn(4)]
    rows = [a.to(dtype) if i in (0, 3, 4) else a for i, a in enumerate(rows)]
    found = [
        hk.ssd_update(f(state.clone()), *map(f, rows), backend="emulator") for f in (from_one_on, torch.clone)
    ]
    torch.testing.assert_close(*found)
    x, past = torch.randn(3, 16).to(dtype), torch.randn(3, 16, 3).to(dtype)
    weight = torch.randn(16, 4)
    found = [
        hk.causal_conv1d_update(f(x), f(past), f(weight), None, "silu", backend="emulator")
        for f in (from_one_on, torch.clone)
    ]
    assert torch.equal(*found)


def test_scan_takes_one_token_of_odd_rows_and_gradients_that_start_anywhere(checked):
    x, dt, A, B, C, D, bias, limit, _, initial = ssd_cases.cast(ssd_cases.make(1, 2, 8, 1, 8), BF16)
    wide = torch.randn(1, 2 * 8 + 2 * 8 + 1).bfloat16()  # of one row the stride, 33, says nothing
    wide[0, :16], wide[0, 16:24], wide[0, 24:32] = x.flatten(), B.flatten(), C.flatten()
    views = [wide[:, :16].view(1, 2, 8), wide[:, 16:24].view(1, 1, 8), wide[:, 24:32].view(1, 1, 8)]

    def gradients(x, B, C, place):
        leaves = [v.detach().requires_grad_() for v in (x, B, C, initial)]
        y, last = hk.ssd_scan(
            leaves[0], dt, A, *leaves[1:3], D, bias, limit, None, leaves[3], backend="emulator"
        )
        upstream = [place(torch.ones_like(y)), place(torch.ones_like(last))]
        return [y.detach(), *torch.autograd.grad([y, last], leaves, upstream)]

    for got, want in zip(gradients(*views, from_one_on), gradients(x, B, C, torch.clone), strict=True):
        assert torch.equal(got, want)

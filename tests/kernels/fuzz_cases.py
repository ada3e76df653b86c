"""Random problems (fuzz_problems.py) held to the oracle rule.

`python tests/kernels/fuzz_cases.py OP SEED [END]` holds one problem, or those from SEED to END, to it; a failing test
prints the line that does it again.
"""

import sys

import torch
from fuzz_problems import BF16, GENERATORS, Draw

import hebatron_kernels as hk
from hebatron_kernels import testing


def update_conv(x, state, *others, backend):
    state = state.clone()
    return hk.causal_conv1d_update(x, state, *others, backend=backend), state


def update_ssd(state, *others, backend):
    state = state.clone()
    return hk.ssd_update(state, *others, backend=backend), state


def decode(q, k, v, cache, *others, backend):
    cache = cache.clone()
    return hk.attention_decode(q, k, v, cache, *others, backend=backend), cache


def mlp_packed(x, ids, weights, up, down, backend):
    if backend != "native":
        return hk.moe_mlp(x, ids, weights, up, down, backend=backend)
    ahead = [hk.moe_pack(w, x.dtype) for w in (up, down)]
    return hk.moe_mlp_packed(x, ids, weights, *ahead, *up.shape[:2], backend=backend)


def product_packed(x, weight, backend):
    if backend != "native":
        return hk.linear(x, weight, backend=backend)
    return hk.linear_packed(x, hk.linear_pack(weight, x.dtype), weight.shape[0], backend=backend)


# those that have no gradient, and the copies of what they change in place
CALLS = {
    "causal_conv1d_update": update_conv,
    "ssd_update": update_ssd,
    "attention_decode": decode,
    "moe_mlp_packed": mlp_packed,
    "linear_packed": product_packed,
}
ON_CUDA_ONLY = ("moe_permute", "moe_combine", "moe_combine_norm")  # no native form on the CPU
# Rounding steps of the largest value, for problems of few elements (testing.check_oracle). In fp32 a sum that cancels
# needs more of them, and so does the torch form, which has no baseline beside it in the bound; still 2e-6 in fp32.
FLOOR_BF16, FLOOR = 4.0, 16.0
# Times the floor where a number is rounded in the middle: the logarithm of the sum, kept in fp32 (up to 70 in these
# problems: half a step of it is 32 of a probability's), and the combined row that a norm divides by its own size
# (of one slot the weight cancels, but for its rounding). A loss near zero is the logarithm of a sum that holds a 1.
WIDER = {"linear_cross_entropy": 2, "moe_combine_norm": 4}
SIZES = {"linear_cross_entropy": 1.0}


def problem(name, seed):
    torch.manual_seed(seed)
    return GENERATORS[name](Draw(f"{name} {seed}"))


def chosen(name, args):
    """The automatic backend. The packed forms have no other."""
    if name.endswith("_packed"):
        return "native"
    others = [None] * (hk.OPERATORS[name].arity - len(args))
    return hk.OPERATORS[name].choose([*args, *others], None)


class _SameUpstream(torch.autograd.Function):
    """Hands every dtype, the oracle's fp64 too, the same upstream gradient: multiples of 1 / 64 up to 50 / 64."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        steps = torch.arange(grad.numel()).view(grad.shape) * 37 % 101 - 50
        return (steps / 64).to(grad.dtype)


def same_upstream(op):
    def call(*args, backend):
        out = op(*args, backend=backend)
        outputs = [out] if isinstance(out, torch.Tensor) else out
        return [_SameUpstream.apply(o) if o.requires_grad else o for o in outputs]

    return call


def dtypes(args):
    return [a.dtype for a in args if isinstance(a, torch.Tensor)]


def check(name, seed):
    args = problem(name, seed)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    try:
        call, grad = CALLS.get(name) or same_upstream(getattr(hk, name)), name not in CALLS
        backend = chosen(name, args)
        floor = FLOOR_BF16 if backend == "native" and any(dtype == BF16 for dtype in dtypes(args)) else FLOOR
        floor *= WIDER.get(name, 1)
        testing.check_oracle(call, args, None, backend, grad, floor=floor, size=SIZES.get(name, 0.0))
        for value, was in zip(args, before):
            assert not isinstance(was, torch.Tensor) or torch.equal(value, was), "an argument was written to"
    except Exception as error:
        given = [[*a.shape, a.dtype, a.stride()] if isinstance(a, torch.Tensor) else a for a in args]
        again = f"python tests/kernels/fuzz_cases.py {name} {seed}"
        raise AssertionError(f"{name}: seed {seed}: {error}\n  of {given}\n  again: {again}") from error


if __name__ == "__main__":
    first, *end = map(int, sys.argv[2:])
    torch.set_num_threads(1)
    failed = 0
    for number in range(first, *end or [first + 1]):
        try:
            check(sys.argv[1], number)
        except AssertionError as error:
            failed += 1
            print(error)
    sys.exit(f"{failed} failed" if failed else 0)

"""What the tests of emulated kernels share."""

import torch

from hebatron_kernels import testing

ORDERS = [dict(mode="eager"), *(dict(mode="random", seed=seed) for seed in (1, 2, 3))]


def same_bits(op, args, grad=True):
    """The results of the lazy order, which every other order must give to the bit."""
    want = testing.run(op, args, grad, backend="emulator")
    for order in ORDERS:
        with testing.emulate(**order):
            got = testing.run(op, args, grad, backend="emulator")
        for name in want:
            assert torch.equal(got[name], want[name]), f"{name} differs in {order}"

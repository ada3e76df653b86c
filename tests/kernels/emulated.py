"""What the tests of emulated kernels share."""

import torch

from hebatron_kernels import testing

ORDERS = [dict(mode="eager"), *(dict(mode="random", seed=seed) for seed in (1, 2, 3))]


def same_bits_in_every_order(call):
    """The result of the lazy order, a tensor, several or several by name, is that of every other order to the bit."""

    def results():
        found = call()
        if isinstance(found, torch.Tensor):
            found = [found]
        return found if isinstance(found, dict) else dict(enumerate(found))

    want = results()
    for order in ORDERS:
        with testing.emulate(**order):
            got = results()
        for name in want:
            assert torch.equal(got[name], want[name]), f"{name} differs in {order}"


def same_bits(op, args, grad=True):
    same_bits_in_every_order(lambda: testing.run(op, args, grad, backend="emulator"))

"""Problems of the causal convolution that its tests share."""

import torch

# bias, activation, initial state
FORMS = [(True, "silu", True), (False, None, False), (True, "silu", False)]


def make(tokens=23, channels=10, taps=4, ends=None, bias=True, activation="silu", initial=True):
    torch.manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    sequences = 1 if ends is None else len(ends) - 1
    state = noise(sequences, channels, taps - 1) if initial else None
    vector = noise(channels) if bias else None
    return [noise(tokens, channels), noise(channels, taps), vector, activation, cu_seqlens, state]


def single(args):
    return [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]

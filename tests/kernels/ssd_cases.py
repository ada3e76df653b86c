"""What the tests of the state-space scan share."""

import math

import torch

ROWS = (0, 1, 3, 4)  # the arguments of ssd_scan with a row per token: x, dt, B, C


def make(tokens=50, heads=4, head_dim=3, groups=2, state=5, ends=None, D=True, bias=True, initial=True):
    torch.manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    sequences = 1 if ends is None else len(ends) - 1
    return [
        noise(tokens, heads, head_dim),
        noise(tokens, heads) - 1,
        -4 * torch.rand(heads, dtype=torch.float64) - 0.1,
        noise(tokens, groups, state),
        noise(tokens, groups, state),
        noise(heads) if D else None,
        noise(heads) if bias else None,
        (0.0, math.inf),
        cu_seqlens,
        noise(sequences, heads, head_dim, state) if initial else None,
    ]


def cast(args, dtype):
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def assert_close(got, want, limit):
    """Every output and gradient within `limit` of its largest value. The gradients of A, D and dt_bias are sums over
    the tokens that cancel: theirs is the sum of the sizes of dt_bias's terms, which are the gradients of dt."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        scale = exact.abs().max().item() if exact.numel() else 0.0
        if name in ("grad2", "grad5", "grad6") and want["grad1"].numel():
            scale = max(scale, want["grad1"].abs().sum(0).max().item())
        torch.testing.assert_close(got[name].double(), exact.double(), rtol=0, atol=limit * scale, msg=name)

"""What the tests of the expert operators share."""

from functools import partial

import torch

from hebatron_kernels import testing

BACKENDS = ["torch", "reference"]
# float32, bfloat16 and float16 go to grouped_mm where the widths allow it, float64 always to the loop
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def check_against(op, plain, args, dtype, grad):
    """Holds the torch form of `op` to the oracle rule, the plainest form of the same dtype being the baseline."""
    if dtype == torch.float64:
        args = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        want = testing.run(op, args, grad, backend="reference")
        return assert_same(testing.run(op, args, grad, backend="torch"), want, 1e-12)
    forms = {
        "native": partial(op, backend="torch"),
        "torch": plain,
        "reference": partial(op, backend="reference"),
    }
    testing.check_oracle(lambda *a, backend: forms[backend](*a), args, dtype, "native", grad)


def assert_same(got, want, rtol=2e-5):
    for name in want:
        scale = want[name].abs().max().item() if want[name].numel() else 0.0
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=rtol * scale, msg=name)


def routing(tokens, experts, dtype=torch.float64):
    return torch.randn(tokens, experts, dtype=dtype), 0.2 * torch.randn(experts, dtype=dtype)


def slots(tokens, experts, top_k, dtype=torch.float64):
    """Distinct experts for each token and positive weights."""
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    return ids.contiguous(), torch.rand(tokens, top_k, dtype=dtype) + 0.1

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


def mlp(tokens, experts, top_k, width, expert_width, dtype=torch.float64):
    ids, weights = slots(tokens, experts, top_k, dtype)
    up = torch.randn(experts, expert_width, width, dtype=dtype) / width**0.5
    down = torch.randn(experts, width, expert_width, dtype=dtype) / expert_width**0.5
    return [torch.randn(tokens, width, dtype=dtype), ids, weights, up, down]


def groups(experts, width, outputs, offsets, rows, dtype=torch.float64):
    """a, the weights stored (experts, outputs, width), the ends."""
    a = torch.randn(rows, width, dtype=dtype)
    b = torch.randn(experts, outputs, width, dtype=dtype) / width**0.5
    return a, b, torch.tensor(offsets, dtype=torch.int32)


# gathered, scaled, activation: the plain form, each alone, and what an expert layer uses
FORMS = [
    (False, False, None),
    (True, False, None),
    (False, True, None),
    (False, False, "relu2"),
    (True, True, "relu2"),
]


def with_form(args, form, dtype=torch.float64):
    """[a, b, ends, rows, scale, activation]: gathered, a has other rows than the result, some of them used often."""
    a, stored, ends = args
    gathered, scaled, activation = form
    count = a.shape[0]
    rows = None
    if gathered:
        a = torch.randn(count // 2 + 1, a.shape[1], dtype=dtype)
        rows = torch.randint(0, a.shape[0], (count,), dtype=torch.int32)
    scale = torch.rand(count, dtype=dtype) - 0.3 if scaled else None
    return [a, stored.transpose(1, 2), ends, rows, scale, activation]


# tokens, experts, top_k, n_group, topk_group: the small training shape, the model's, one token, one expert, every
# expert chosen, no tokens, and groups: two kept of four, one kept of two, all kept, the smallest possible
ROUTES = [
    (33, 16, 2, 1, 1),
    (21, 128, 6, 1, 1),
    (1, 5, 3, 1, 1),
    (7, 1, 1, 1, 1),
    (9, 7, 7, 1, 1),
    (0, 8, 2, 1, 1),
    (25, 24, 5, 4, 2),
    (11, 10, 3, 2, 1),
    (13, 12, 4, 3, 3),
    (5, 4, 2, 2, 1),
]

# tokens, experts, top_k, width: odd sizes, the vector's edges, one token, one expert, all chosen, no tokens
ROWS = [
    (9, 5, 2, 7),
    (33, 16, 2, 48),
    (1, 3, 1, 16),
    (6, 1, 1, 5),
    (4, 4, 4, 8),
    (0, 3, 2, 8),
    (40, 128, 6, 32),
]

# tokens, experts, top_k, width, expert width for the CUDA kernels, which take widths in multiples of 8: the small
# training shape, most experts empty, one token, one expert, every expert chosen, no tokens, 22 choices, tiles of
# several experts
MLPS_OF_8 = [
    (37, 16, 2, 48, 32),
    (5, 128, 6, 16, 8),
    (1, 4, 2, 16, 24),
    (8, 1, 1, 16, 16),
    (6, 4, 4, 8, 16),
    (0, 3, 2, 8, 8),
    (9, 24, 22, 16, 8),
    (150, 3, 2, 72, 136),
]

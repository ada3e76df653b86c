"""linear_cross_entropy, forward and backward: the C++ kernel against the torch form and torch's own.

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_loss.py [--only TEXT ...] [--out FILE.json]

The limit is the peak of products, measured between the rivals in the same run. Three products count, the least that
the gradients need: a form that makes the logits again in the backward does four. Correctness is checked before timing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Case, run
from torch import Tensor
from torch.nn import functional as F

import hebatron_kernels as hk
from hebatron_kernels import testing

# tokens, width, entries: the quickstart's model, a larger tokenizer, the real vocabulary at the real width
SHAPES = [
    (1024, 192, 4096, torch.float32),
    (1024, 192, 8192, torch.float32),
    (512, 768, 8192, torch.bfloat16),
    (512, 2688, 131072, torch.bfloat16),
]


def make(tokens: int, width: int, entries: int, dtype: torch.dtype) -> list[Tensor]:
    x, weight = torch.randn(tokens, width), torch.randn(entries, width) * width**-0.5
    return [x.to(dtype), weight.to(dtype), torch.randint(entries, (tokens,))]


def rivals(args: list[Tensor], grad: bool) -> dict[str, Callable[[], object]]:
    x, weight, targets = args
    leaves = [x.requires_grad_(grad), weight.requires_grad_(grad)]

    def timed(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(loss(), leaves)) if grad else loss

    return {
        "native": timed(lambda: hk.linear_cross_entropy(x, weight, targets, backend="native")),
        "torch form": timed(lambda: hk.linear_cross_entropy(x, weight, targets, backend="torch")),
        "all logits": timed(lambda: F.cross_entropy((x @ weight.T).float(), targets)),
    }


def cases() -> list[Case]:
    found = []
    for tokens, width, entries, dtype in SHAPES:
        limit = str(dtype).removeprefix("torch.")
        for grad in (False, True):
            name = f"linear_cross_entropy {limit} {tokens} x {width} x {entries}"
            name += " forward+backward" if grad else " forward"
            work = (3 if grad else 1) * 2 * tokens * width * entries
            moved = (3 if grad else 1) * (tokens + entries) * width * dtype.itemsize

            def calls(shape=(tokens, width, entries, dtype), grad=grad):
                return rivals(make(*shape), grad)

            found.append(Case(name, calls, work, moved, limit))
    return found


def check() -> None:
    for tokens, width, entries, dtype in SHAPES:
        small = make(min(tokens, 60), width, min(entries, 1200), torch.float64)
        testing.check_oracle(hk.linear_cross_entropy, [*small, -100, "mean"], dtype, "native")


if __name__ == "__main__":
    run(__doc__, cases, check)

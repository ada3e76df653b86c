"""rms_norm at the model's shapes: the C++ kernel against the torch form and F.rms_norm, as shares of a measured copy.

    OMP_PROC_BIND=true OMP_PLACES=cores python bench/bench_norm.py [--only TEXT ...] [--out FILE.json]

The limit is DRAM: each figure counts the bytes that must move once and is divided by the rate of a copy of a buffer
as large as the widest case, measured between the others in the same run. Correctness is checked before timing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Case, run
from torch.nn import functional as F

import hebatron_kernels as hk
from hebatron_kernels import testing

# form, width, group: the norm before a mixer, the same with the residual sum, Mamba-2's gated norm (8 groups of 512)
ROWS = 4096
FORMS = [("plain", 2688, None), ("residual", 2688, None), ("gated", 4096, 512)]


def make(form: str, rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor | float | None]:
    x, other = torch.randn(2, rows, width).to(dtype)
    weight = 1 + 0.1 * torch.randn(width)
    return [
        x,
        weight.to(dtype),
        1e-5,
        other if form == "residual" else None,
        other if form == "gated" else None,
    ]


def rivals(args: list, group: int | None, grad: bool) -> dict[str, Callable[[], object]]:
    def timed(backend: str) -> Callable[[], object]:
        if not grad:
            return lambda: hk.rms_norm(*args, group, backend=backend)
        leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        wanted = [a for a in leaves if isinstance(a, torch.Tensor)]
        upstream = [torch.randn_like(args[0]) for _ in range(1 if args[3] is None else 2)]

        def both_ways() -> object:
            out = hk.rms_norm(*leaves, group, backend=backend)
            return torch.autograd.grad(
                [out] if isinstance(out, torch.Tensor) else list(out), wanted, upstream
            )

        return both_ways

    found = {"native": timed("native"), "torch form": timed("torch")}
    if args[3] is None and args[4] is None and not grad:
        found["F.rms_norm"] = lambda: F.rms_norm(args[0], (args[0].shape[1],), args[1], args[2])
    return found


def cases() -> list[Case]:
    found = []
    for form, width, group in FORMS:
        for dtype in (torch.bfloat16, torch.float32):
            for grad in (False, True):
                tensors = {"plain": 2, "residual": 4, "gated": 3}[form]
                if grad:  # forward, then the inputs and grad_y again, and the gradients written
                    tensors += {"plain": 3, "residual": 6, "gated": 5}[form]
                values = ROWS * width
                name = f"rms_norm {form} {str(dtype).removeprefix('torch.')} {ROWS}x{width}"
                name += " forward+backward" if grad else " forward"

                def calls(form=form, width=width, group=group, dtype=dtype, grad=grad):
                    return rivals(make(form, ROWS, width, dtype), group, grad)

                found.append(Case(name, calls, 4 * values, tensors * values * dtype.itemsize))
    return found


def check() -> None:
    for form, width, group in FORMS:
        for dtype in (torch.bfloat16, torch.float32):
            testing.check_oracle(hk.rms_norm, [*make(form, 64, width, torch.float64), group], dtype, "native")


if __name__ == "__main__":
    run(__doc__, cases, check)

"""The Triton kernels' cases for bench/gpu_sanitize.py: launched through torch, which computes nothing on the GPU but
one sum of small tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from gpu_sanitize_ssd import draws, grads_of_tokens, one_token
from numpy.typing import NDArray


def compare(name: str, got: Any, want: Any, dtype: Any) -> None:
    import torch

    error = ((got.cpu().float() - want).abs().max() / want.abs().max()).item()
    if not error <= (2e-2 if dtype == torch.bfloat16 else 1e-4):  # a misplaced value, not rounding
        raise AssertionError(f"{name}: error {error:.2e} of the largest value")


def grouped_gemm(device: str) -> Iterator[str]:
    """Every size of the blocks, both layouts of b, forward and gradients."""
    import torch

    from hebatron_kernels.moe import triton_kernels as kernels

    torch.manual_seed(0)
    sizes = [(torch.bfloat16, mean) for mean in (8, 25, 70, 130)] + [
        (torch.float32, mean) for mean in (8, 40)
    ]
    for dtype, mean in sizes:
        for by_output in (True, False):
            counts, tail, width, outputs = [0, 1, 2 * mean + 5, 0, 2 * mean], 3, 136, 264
            rows, source = sum(counts) + tail, 50
            a = torch.randn(source, width).to(dtype)
            stored = (len(counts), outputs, width) if by_output else (len(counts), width, outputs)
            b, ends = (torch.randn(stored) * width**-0.5).to(dtype), torch.tensor(counts).cumsum(0).int()
            taken, scale = torch.randint(source, (rows,)).int(), torch.rand(rows) + 0.5
            grad = torch.randn(rows, outputs).to(dtype)
            # moved as they are stored: torch's own kernels run nowhere
            a_, b_, ends_, taken_, scale_, grad_ = (t.to(device) for t in (a, b, ends, taken, scale, grad))
            b_, b = (t.transpose(1, 2) if by_output else t for t in (b_, b))
            out = kernels.product(a_, b_, ends_, taken_, scale_, "relu2")
            grad_h, grad_scale = kernels.product_grad(grad_, a_, b_, ends_, taken_, scale_, "relu2")
            grad_b = kernels.weight_grad(a_, grad_, ends_, taken_)
            chosen, experts = a[taken.long()].float(), torch.bucketize(torch.arange(rows), ends, right=True)
            used = experts < len(counts)
            h = torch.einsum("nk,nkm->nm", chosen, b.float()[experts.clamp(max=len(counts) - 1)])
            h, g = h * used[:, None], grad.float() * used[:, None]
            one_hot = torch.nn.functional.one_hot(experts, len(counts) + 1)[:, :-1].float()
            wanted = {
                "out": (out, h.relu() ** 2 * scale[:, None]),
                "grad_h": (grad_h, 2 * h.relu() * g * scale[:, None]),
                "grad_scale": (grad_scale, (g * h.relu() ** 2).sum(1)),
                "grad_b": (grad_b, torch.einsum("ne,nk,nm->ekm", one_hot, chosen, g)),
            }
            for name, (got, want) in wanted.items():
                compare(name, got, want, dtype)
            yield f"{dtype} {mean} rows an expert{' by output' if by_output else ''}"


class Rounded:
    """What `draws` asks of its caller: the values that a dtype can hold."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def rounded(self, values: NDArray[Any]) -> NDArray[Any]:
        import torch

        return torch.from_numpy(values).to(self.dtype).float().numpy()


def on_device(device: str, dtype: Any, values: NDArray[Any], name: str = "") -> Any:
    import torch

    return torch.from_numpy(values).to(dtype if name in ("x", "B", "C") else torch.float32).to(device)


def ssd_scan(device: str) -> Iterator[str]:
    """Both sizes of the blocks of a dtype; empty sequences, one token, a chunk and more, two heads of a group."""
    import torch

    from hebatron_kernels.ssd import triton_ops

    random = np.random.default_rng(0)
    sizes = [
        ((2, 24, 1, 40), torch.bfloat16),
        ((2, 72, 1, 136), torch.bfloat16),
        ((2, 24, 1, 40), torch.float32),
    ]
    for shape, dtype in sizes:
        ends, numpy_of = [0, 1, 1, 80], Rounded(dtype)
        tokens, sequences = ends[-1], len(ends) - 1
        given = draws(numpy_of, random, tokens, shape)
        states = (sequences, *given["x"].shape[1:], shape[3])
        initial, grad_last = (random.standard_normal(states).astype(np.float32) for _ in range(2))
        grad_y = numpy_of.rounded(random.standard_normal(given["x"].shape).astype(np.float32))

        put = partial(on_device, device, dtype)
        wide = {name: put(given[name], name) for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")}
        cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(device)
        args = (*wide.values(), (0.0, math.inf), cu_seqlens, put(initial), 64)
        y, last = triton_ops.ssd_scan(*args)
        want, ended = np.zeros(given["x"].shape, np.float32), initial.astype(np.float64)
        for q, (begin, end) in enumerate(pairwise(ends)):
            for t in range(begin, end):
                want[t], ended[q] = one_token(ended[q], t, given)
        compare("y", y, torch.from_numpy(want), dtype)
        compare("last", last, torch.from_numpy(ended), dtype)
        grads = triton_ops.ssd_scan_bwd([put(grad_y, "x"), put(grad_last)], *args)
        exact = grads_of_tokens(given, ends, initial, grad_y, grad_last)
        for name, got in zip([*wide, "initial"], grads, strict=True):
            compare(f"grad_{name}", got, torch.from_numpy(exact[name]), dtype)
        yield f"{dtype} {tokens} tokens in {sequences} sequences, {shape}"


CASES: dict[str, Callable[[str], Iterator[str]]] = {"moe/triton": grouped_gemm, "ssd/triton": ssd_scan}

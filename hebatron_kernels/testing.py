"""What the operators' tests share: the oracle rule, comparison of a backend with its reference, the ISAs present.

The oracle rule: a result may err from the fp64 reference by at most twice what the torch form errs at the same dtype,
plus a noise term measured from the data (how far the reference itself moves when its inputs are rounded differently,
and how far rounding its result to the dtype moves it). Both the largest and the root-mean-square error must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _native

Args = Sequence[Any]


def isas() -> list[str]:
    """The ISAs of the _cpu module that this machine runs, weakest first."""
    return [] if _native.cpu_module is None else _native.cpu_module.available_isas()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """The native CPU kernels of one ISA."""
    assert _native.cpu_module is not None
    before = _native.cpu_module.current_isa()
    _native.cpu_module.set_isa(name)
    try:
        yield
    finally:
        _native.cpu_module.set_isa(before)


def _cast(args: Args, dtype: torch.dtype) -> list[Any]:
    """Every floating tensor in this dtype with the strides it came in, detached."""

    def cast(a: Tensor) -> Tensor:
        return torch.empty_strided(a.shape, a.stride(), dtype=dtype, device=a.device).copy_(a.detach())

    return [cast(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [r for r in result if isinstance(r, Tensor)]


def run(op: Callable[..., Any], args: Args, grad: bool = True, **kwargs: Any) -> dict[str, Tensor]:
    """The outputs `out0, out1, ...` and, with grad, the gradients `grad<i>` of every floating argument i under fixed
    upstream gradients (a smooth function of the element's index, so that every element weighs differently)."""
    leaves = [
        a.detach().requires_grad_(grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]
    outputs = _outputs(op(*leaves, **kwargs))
    found = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    targets = [o for o in outputs if o.requires_grad]
    if grad and targets:
        upstream = [
            torch.cos(torch.arange(o.numel(), dtype=torch.float64) * 0.7 + 1).reshape(o.shape).to(o)
            for o in targets
        ]
        wanted = {i: a for i, a in enumerate(leaves) if isinstance(a, Tensor) and a.requires_grad}
        grads = torch.autograd.grad(targets, list(wanted.values()), upstream, allow_unused=True)
        for i, g in zip(wanted, grads):
            found[f"grad{i}"] = torch.zeros_like(wanted[i]) if g is None else g
    return found


def _perturbed(args: Args, dtype: torch.dtype, seed: int) -> list[Any]:
    """Every floating argument (as fp64) moved by up to half a rounding step of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    moved = []
    for a in args:
        if isinstance(a, Tensor) and a.is_floating_point():
            shift = torch.rand(a.shape, generator=generator, dtype=torch.float64) - 0.5
            a = a.double() * (1 + shift * torch.finfo(dtype).eps)
        moved.append(a)
    return moved


def _errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    if want.numel() == 0:
        return 0.0, 0.0
    difference = (got.double() - want.double()).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def _same_non_finite(name: str, got: Tensor, want: Tensor) -> None:
    for kind, test in (("NaN", torch.isnan), ("inf", torch.isinf)):
        wrong = test(got) != test(want)
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {kind} differs at {index}: {got[index].item()} for {want[index].item()}"
            )


def check_oracle(
    op: Callable[..., Any],
    args: Args,
    dtype: torch.dtype,
    backend: str,
    grad: bool = True,
    factor: float = 2.0,
    **kwargs: Any,
) -> None:
    """Holds one backend of `op` to the oracle rule, in every output and every gradient.

    Args:
        op: a public operator (takes backend=).
        args: its arguments; floating tensors are cast to `dtype` with their strides kept.
        dtype: the dtype under test.
        backend: the backend under test. For "torch" itself the torch-form term is left out of the bound.
        grad: compare gradients as well.
        factor: 2 by the rule; anything else needs a reason where it is used.
    """
    rounded = _cast(args, dtype)
    got = run(op, rounded, grad, backend=backend, **kwargs)
    oracle = run(op, _cast(rounded, torch.float64), grad, backend="reference", **kwargs)
    baseline = got if backend == "torch" else run(op, rounded, grad, backend="torch", **kwargs)
    moved = [run(op, _perturbed(rounded, dtype, s), grad, backend="reference", **kwargs) for s in (1, 2)]
    assert got.keys() == oracle.keys(), f"{sorted(got)} for {sorted(oracle)}"
    for name, want in oracle.items():
        _same_non_finite(name, got[name], want)
        if not want.is_floating_point():
            assert torch.equal(got[name], want), f"{name}: differs from the oracle"
            continue
        finite = torch.isfinite(want)
        parts = [t[finite] for t in (got[name], want, baseline[name], moved[0][name], moved[1][name])]
        mine, exact, torch_form, first, second = parts
        error = _errors(mine, exact)
        base = (0.0, 0.0) if backend == "torch" else _errors(torch_form, exact)
        rounding = _errors(exact.to(got[name].dtype), exact)
        shift = [max(pair) for pair in zip(_errors(first, exact), _errors(second, exact))]
        for kind, e, b, r, s in zip(("max", "rms"), error, base, rounding, shift):
            bound = factor * b + 2 * r + 4 * s
            if not e <= bound:
                difference = (got[name].double() - want).abs().where(finite, torch.zeros(()).double())
                index = tuple(torch.unravel_index(difference.argmax(), want.shape))
                raise AssertionError(
                    f"{name}: {kind} error {e:.3e} over the bound {bound:.3e} (torch form {b:.3e}, rounding {r:.3e}, "
                    f"noise {s:.3e}); worst at {[int(i) for i in index]}: {got[name][index].item()} for "
                    f"{want[index].item()}"
                )


def check_registration(op_name: str, *args: Any, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """torch.library.opcheck of the private op and, where there is one, of its backward."""
    from ._dispatch import OPERATORS

    operator = OPERATORS[op_name]
    values = _cast(args, dtype)
    torch.library.opcheck(operator.private, (*values, backend))
    if operator.differentiable:
        outputs = _outputs(operator.private(*values, backend))
        grads = [torch.ones_like(o) for o in outputs]
        backward = getattr(torch.ops.hebatron, f"_{op_name}_bwd").default
        torch.library.opcheck(backward, (grads, *values, backend))


def check_fullgraph(
    op: Callable[..., Any], args: Args, backend: str, grad: bool = True, **kwargs: Any
) -> None:
    """One graph, forward and backward, with the results of the eager call to 1e-5 of their scale."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    eager = run(op, args, grad, backend=backend, **kwargs)
    traced = run(compiled, args, grad, backend=backend, **kwargs)
    for name, want in eager.items():
        if want.is_floating_point():
            scale = want.abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(traced[name], want, rtol=1e-5, atol=1e-5 * scale, msg=name)
        else:
            assert torch.equal(traced[name], want), name


def strided(x: Tensor, extra: int = 3) -> Tensor:
    """The same values as a slice of a wider tensor: rows strided, last dimension contiguous, storage offset 1."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + extra), float("nan"), dtype=x.dtype)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]

"""Which implementation serves a call, and the door every opaque one goes through.

A noun's folder holds one module per backend; each has a function with the public operator's name and positional
arguments, and may have two more:
  supports_<op>(*args) -> None | reason      missing: supports everything
  <op>_bwd(grads, *args) -> list of gradients, one for each floating tensor argument that is not None, in order
An operator made with `fake_keep` may have, in place of <op>_bwd, a forward that keeps tensors for its backward:
  <op>_keep(*args) -> (*results, *kept)      called only when a gradient is needed
  <op>_keep_bwd(grads, kept, wanted, *args) -> list as above; an empty tensor where wanted[i] is False
A form that reads values of the GPU on the host says so in host_reads_<op>(*args) -> None | what; without it a form
promises to read none, so that it can be captured in a CUDA graph. `reference` always reads.
A native one with CUDA kernels has one more, kernels_<op>(*args): the files of csrc/cuda that may run; a triton one has
unproven_<op>(*args) -> None | reason: why it is not chosen unasked. Both ask the evidence table.
`torch` is a differentiable composite and is called as it is, so autograd and Inductor see through it. The others go
through the private op hebatron::_<op>, whose backward hebatron::_<op>_bwd calls <op>_bwd or, where that is missing,
torch.autograd.grad over the implementation itself (`reference`) or over the torch form (the others). `emulator` is the
native module of an operator that has a CUDA kernel, each of its functions run by _native.emulated.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._check import BackendError

BACKENDS = ("native", "triton", "torch", "reference", "emulator")
AUTOMATIC = ("native", "triton", "torch")  # strongest first; reference and emulator only by name

_library = torch.library.Library("hebatron", "DEF")
_forced: str | None = None
_reading: list[str] | None = None  # of host_reads
_environment: str | None = os.environ.get("HEBATRON_BACKEND") or None
OPERATORS: dict[str, Operator] = {}


def _known(backend: str, origin: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


if _environment is not None:
    _known(_environment, "HEBATRON_BACKEND")


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Every operator called inside uses this backend (None: automatic). A backend= argument is stronger."""
    global _forced
    before = _forced
    _forced = None if backend is None else _known(backend, "use_backend: backend")
    try:
        yield
    finally:
        _forced = before


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Collects which operators called inside read values of the GPU on the host, as "<op>[<backend>]: <what>".

    Such a call waits for the GPU and cannot be captured in a CUDA graph; an empty list says that all can.
    """
    global _reading
    before, _reading = _reading, []
    try:
        yield _reading
    finally:
        _reading = before


def named_backend(argument: str | None = None) -> str | None:
    """The backend that a call must use: the argument, use_backend, HEBATRON_BACKEND; None: automatic."""
    return next((b for b in (argument, _forced, _environment) if b is not None), None)


class Operator:
    """One operator: its implementations by backend, and the private op and autograd above the opaque ones.

    Args:
        name: the public function's name.
        arguments: schema of the arguments, in the public order, e.g. "Tensor x, Tensor? gate, float eps".
        returns: schema of the result; the implementations may return None for an output the schema makes a Tensor
            (it travels as an empty tensor), and the caller gets None back.
        modules: the noun's implementation modules by backend; "emulator" is the native one again where it has CUDA.
        fake: shapes of the results from the arguments, for torch.compile.
        fake_keep: shapes of what the backward is handed beside the arguments, where a form keeps any.
        keep_results: whether that begins with the results themselves.
        fake_gradients: the gradients of such a form from the arguments; missing: contiguous ones.
        differentiable: False for the operators that update a state in place or read packed weights.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        returns: str,
        modules: dict[str, ModuleType],
        fake: Callable[..., Any],
        differentiable: bool = True,
        fake_keep: Callable[..., tuple[Tensor, ...]] | None = None,
        keep_results: bool = False,
        fake_gradients: Callable[..., list[Tensor]] | None = None,
    ) -> None:
        self.name, self.modules = name, modules
        self.differentiable, self.keep_results = differentiable, keep_results
        self.forwards: dict[str, Callable[..., Any]] = {b: self._form(b, name) for b in modules}
        self.arity = len(inspect.signature(self.forwards["reference"]).parameters)
        _library.define(f"_{name}({arguments}, str backend) -> {returns}")
        _library.impl(f"_{name}", self._opaque_forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hebatron::_{name}", lambda *a: fake(*a[:-1]), lib=_library)
        self.private = getattr(torch.ops.hebatron, f"_{name}").default
        if differentiable:
            _library.define(f"_{name}_bwd(Tensor[] grads, {arguments}, str backend) -> Tensor[]")
            _library.impl(f"_{name}_bwd", self._opaque_backward, "CompositeExplicitAutograd")
            torch.library.register_fake(f"hebatron::_{name}_bwd", _fake_gradients, lib=_library)
            self.function = _autograd_function(
                self.private, getattr(torch.ops.hebatron, f"_{name}_bwd").default
            )
        if fake_keep is not None:
            self.keeping = self._keeping_function(arguments, returns, fake, fake_keep, fake_gradients)
        OPERATORS[name] = self

    def _form(self, backend: str, name: str) -> Any:
        """A function of the backend's module, or None where it is not written."""
        function = getattr(self.modules[backend], name, None)
        return partial(_native.emulated, function) if function and backend == "emulator" else function

    def _keeping_function(
        self,
        arguments: str,
        returns: str,
        fake: Callable[..., Any],
        fake_keep: Callable[..., Any],
        fake_gradients: Callable[..., list[Tensor]] | None,
    ) -> type[torch.autograd.Function]:
        """The private ops of a form that keeps tensors for its backward, and the function above them."""
        forward, backward = f"_{self.name}_keep", f"_{self.name}_keep_bwd"

        def run(*args: Any) -> list[Tensor]:
            return list(self._form(args[-1], f"{self.name}_keep")(*args[:-1]))

        def run_backward(
            grads: list[Tensor], kept: list[Tensor], wanted: list[bool], *args: Any
        ) -> list[Tensor]:
            return self._form(args[-1], f"{self.name}_keep_bwd")(grads, kept, wanted, *args[:-1])

        def fake_forward(*args: Any) -> list[Tensor]:
            out = fake(*args[:-1])
            return [*(out if isinstance(out, tuple) else (out,)), *fake_keep(*args[:-1])]

        def fake_backward(grads: object, kept: object, wanted: list[bool], *args: Any) -> list[Tensor]:
            found = _fake_gradients([], *args) if fake_gradients is None else fake_gradients(*args[:-1])
            return [g if w else g.new_empty(0) for g, w in zip(found, wanted)]

        _library.define(f"{forward}({arguments}, str backend) -> Tensor[]")
        _library.impl(forward, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hebatron::{forward}", fake_forward, lib=_library)
        _library.define(
            f"{backward}(Tensor[] grads, Tensor[] kept, bool[] wanted, {arguments}, str backend) -> Tensor[]"
        )
        _library.impl(backward, run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hebatron::{backward}", fake_backward, lib=_library)
        ops = torch.ops.hebatron
        return _autograd_function(
            getattr(ops, forward).default,
            getattr(ops, backward).default,
            returns.count("Tensor"),
            self.keep_results,
        )

    def _opaque_forward(self, *args: Any) -> Any:
        out = self.forwards[args[-1]](*args[:-1])
        if not isinstance(out, tuple):
            return out
        like = next(a for a in args if isinstance(a, Tensor))
        return tuple(like.new_empty(0) if o is None else o for o in out)

    def _opaque_backward(self, grads: list[Tensor], *args: Any) -> list[Tensor]:
        *inputs, backend = args
        handwritten = self._form(backend, f"{self.name}_bwd")
        if handwritten is not None:
            return handwritten(grads, *inputs)
        forward = self.forwards["reference" if backend == "reference" else "torch"]
        with torch.enable_grad(), _autograd_dispatch():
            leaves = [a.detach().requires_grad_() if _is_float(a) else a for a in inputs]
            out = forward(*leaves)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        pairs = [(o, g) for o, g in zip(outputs, grads) if o is not None and o.requires_grad]
        wanted = [a for a in leaves if _is_float(a)]
        if not pairs:
            raise RuntimeError(
                f"{self.name}[{backend}]: no result depends on the inputs; autograd recorded nothing"
            )
        out_tensors, out_grads = zip(*pairs)
        found = torch.autograd.grad(out_tensors, wanted, out_grads, allow_unused=True)
        return _unaliased(wanted, found, grads)

    def refusal(self, backend: str, args: Sequence[Any]) -> str | None:
        """Why this backend cannot serve these arguments, or None."""
        if backend not in self.modules:
            return "not written for this operator"
        supports = self._form(backend, f"supports_{self.name}")
        return None if supports is None else supports(*args)

    def passed_over(self, backend: str, args: Sequence[Any]) -> str | None:
        """Why the automatic choice does not take this backend, or None."""
        if backend not in AUTOMATIC:
            return self.refusal(backend, args) or "supported, only by name"
        reason = self.refusal(backend, args)
        if reason is None and backend == "triton":
            reason = self._form(backend, f"unproven_{self.name}")(*args)
        elif reason is None and backend == "native" and args[0].is_cuda:
            kernels = self._form(backend, f"kernels_{self.name}")
            reason = (
                "torch's own products, only by name"
                if kernels is None
                else _native.unproven(kernels(*args), args[0].get_device())
            )
        return reason

    def host_read(self, backend: str, args: Sequence[Any]) -> str | None:
        """What this backend reads of the GPU on the host, or None."""
        if backend == "reference":
            return "loops over values on the host"
        reads = self._form(backend, f"host_reads_{self.name}")
        return None if reads is None else reads(*args)

    def choose(self, args: Sequence[Any], backend: str | None) -> str:
        """The backend of this call: the argument, use_backend, HEBATRON_BACKEND, then the first that supports it."""
        named = named_backend(backend)
        if named is not None:
            reason = self.refusal(_known(named, f"{self.name}: backend"), args)
            if reason is not None:
                raise BackendError(f"{self.name}[{named}]: {reason}")
            return named
        for candidate in AUTOMATIC:
            if candidate in self.modules and self.passed_over(candidate, args) is None:
                return candidate
        raise BackendError(f"{self.name}: no automatic backend serves these arguments; see explain()")

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        if len(args) != self.arity:
            raise TypeError(f"{self.name}: takes {self.arity} arguments, got {len(args)}")
        choice = self.choose(args, backend)
        if _reading is not None:
            reads = self.host_read(choice, args)
            if reads is not None:
                _reading.append(f"{self.name}[{choice}]: {reads}")
        wants_grad = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if wants_grad and not self.differentiable:
            raise ValueError(f"{self.name}: arguments must not require a gradient (it has no derivative)")
        if choice == "torch":
            return without_autocast(self.forwards["torch"], args)
        if not wants_grad:
            return self.private(*args, choice)
        keeps = self._form(choice, f"{self.name}_keep") is not None
        return (self.keeping if keeps else self.function).apply(*args, choice)


@contextmanager
def _autograd_dispatch() -> Iterator[None]:
    """Records a graph even where the caller runs below autograd, as compiled inference graphs do: there enable_grad
    alone records nothing and every gradient would come out as zero."""
    key = torch._C.DispatchKey.AutogradFunctionality
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def without_autocast(forward: Callable[..., Any], args: Sequence[Any]) -> Any:
    """An operator keeps the precision it documents: autocast would run its fp32 sums in bf16."""
    device = next(a.device.type for a in args if isinstance(a, Tensor))
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return forward(*args)
    with torch.autocast(device, enabled=False):
        return forward(*args)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _unaliased(wanted: list[Tensor], found: Sequence[Tensor | None], grads: list[Tensor]) -> list[Tensor]:
    """Contiguous gradients that share no memory with each other or with the incoming ones, as an op's results must
    not: autograd hands both terms of a sum the same tensor."""
    taken = {g.untyped_storage().data_ptr() for g in grads}
    results = []
    for value, gradient in zip(wanted, found):
        if gradient is None:
            results.append(torch.zeros_like(value, memory_format=torch.contiguous_format))
            continue
        gradient = gradient.contiguous()
        storage = gradient.untyped_storage().data_ptr()
        results.append(gradient.clone() if storage in taken else gradient)
        taken.add(storage)
    return results


def _fake_gradients(grads: list[Tensor], *args: Any) -> list[Tensor]:
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a in args if _is_float(a)]


def _autograd_function(
    forward_op: Any, backward_op: Any, results: int = 0, keep_results: bool = False
) -> type[torch.autograd.Function]:
    """The autograd of a private op; with `results` it returns a list, what follows them being kept."""

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.others = [None if isinstance(a, Tensor) else (a,) for a in args]
            tensors = [a for a in args if isinstance(a, Tensor)]
            out = forward_op(*args)
            kept = out[0 if keep_results else results :] if results else []
            ctx.save_for_backward(*tensors, *kept)
            if results:
                out = out[0] if results == 1 else tuple(out[:results])
            if not isinstance(out, Tensor):  # Dynamo refuses the call beside a single output
                ctx.mark_non_differentiable(*[o for o in out if not o.is_floating_point()])
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # create_graph: the private op has no derivative, and a graph without it would be silently wrong
                raise RuntimeError(
                    f"{forward_op.name()}: has gradients of first order only; use backend='torch'"
                )
            saved = iter(ctx.saved_tensors)
            args = [next(saved) if other is None else other[0] for other in ctx.others]
            upstream = [g.contiguous() for g in grads]
            if not results:
                found = iter(backward_op(upstream, *args))
                return tuple(next(found) if _is_float(a) else None for a in args)
            needs = ctx.needs_input_grad
            wanted = [need for a, need in zip(args, needs) if _is_float(a)]
            found = iter(backward_op(upstream, list(saved), wanted, *args))
            slots = [next(found) if _is_float(a) else None for a in args]
            return tuple(value if need else None for value, need in zip(slots, needs))

    return Opaque


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> str:
    """Says which backend a call would use and why each stronger one would not.

    Args:
        op: a public operator or its name.
        args, kwargs: its arguments, as in the call.

    Returns:
        One line per backend, the chosen one marked with an arrow.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in OPERATORS:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(OPERATORS))}, got {name!r}")
    operator = OPERATORS[name]
    named = kwargs.pop("backend", None)
    bound = inspect.signature(operator.forwards["torch"]).bind(*args, **kwargs)
    bound.apply_defaults()
    values = list(bound.arguments.values())
    try:
        choice: str | None = operator.choose(values, named)
    except BackendError:
        choice = None
    lines = [f"{name}: {choice or 'no backend'}"]
    for backend in BACKENDS:
        note = operator.passed_over(backend, values) or "supported"
        lines.append(f"  {'->' if backend == choice else '  '} {backend:<9} {note}")
    return "\n".join(lines)

"""What the operators' tests share: the oracle rule, comparison of a backend with its reference, the ISAs present, and
the emulator of the CUDA kernels (docs/emulator.md).

The oracle rule: a result may err from the fp64 reference by at most twice what the torch form errs at the same dtype,
plus a noise term measured from the data (how far the reference itself moves when its inputs are rounded differently,
and how far rounding its result to the dtype moves it). Both the largest and the root-mean-square error must hold.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._check import BackendError

Args = Sequence[Any]
ROOT = Path(__file__).resolve().parent.parent


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
            torch.cos(torch.arange(o.numel(), dtype=torch.float64, device=o.device) * 0.7 + 1)
            .reshape(o.shape)
            .to(o)
            for o in targets
        ]
        wanted = {i: a for i, a in enumerate(leaves) if isinstance(a, Tensor) and a.requires_grad}
        grads = torch.autograd.grad(targets, list(wanted.values()), upstream, allow_unused=True)
        for i, g in zip(wanted, grads):
            found[f"grad{i}"] = torch.zeros_like(wanted[i]) if g is None else g
    return found


def _exact(args: Args) -> list[Any]:
    return [a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def _perturbed(args: Args, seed: int) -> list[Any]:
    """Every floating argument (as fp64) moved by up to half a rounding step of its dtype."""
    generators = {
        d: torch.Generator(d).manual_seed(seed) for d in {a.device for a in args if isinstance(a, Tensor)}
    }
    moved = []
    for a in args:
        if isinstance(a, Tensor) and a.is_floating_point():
            generator = generators[a.device]
            shift = torch.rand(a.shape, generator=generator, dtype=torch.float64, device=a.device) - 0.5
            a = a.double() * (1 + shift * torch.finfo(a.dtype).eps)
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
    dtype: torch.dtype | None,
    backend: str,
    grad: bool = True,
    factor: float = 2.0,
    floor: float = 0.0,
    size: float = 0.0,
    **kwargs: Any,
) -> None:
    """Holds one backend of `op` to the oracle rule, in every output and every gradient.

    Args:
        op: a public operator (takes backend=).
        args: its arguments; floating tensors are cast to `dtype` with their strides kept.
        dtype: the dtype under test; None leaves every tensor as it is, of whatever dtypes.
        backend: the backend under test. For "torch" itself the torch-form term is left out of the bound.
        grad: compare gradients as well.
        factor: 2 by the rule; anything else needs a reason where it is used.
        floor: what is allowed beside, for problems of few elements, where the other terms may all be small by chance:
            so many rounding steps (of the coarsest tensor given) of the result's largest value, and so many of fp32 of
            the largest gradient, the upstream's 1 among them, for gradients whose terms cancel.
        size: the floor takes an output's largest value to be this at least: what its terms are where they cancel.
    """
    rounded = list(args) if dtype is None else _cast(args, dtype)
    got = run(op, rounded, grad, backend=backend, **kwargs)
    oracle = run(op, _exact(rounded), grad, backend="reference", **kwargs)
    baseline = got if backend == "torch" else run(op, rounded, grad, backend="torch", **kwargs)
    moved = [run(op, _perturbed(rounded, s), grad, backend="reference", **kwargs) for s in (1, 2)]
    step = floor * max(
        torch.finfo(a.dtype).eps for a in rounded if isinstance(a, Tensor) and a.is_floating_point()
    )
    sizes = [oracle[n].abs().max().item() for n in oracle if n.startswith("grad") and oracle[n].numel()]
    largest = max([1.0, *sizes])
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
        least = step * exact.abs().max().item() if exact.numel() else 0.0
        if name.startswith("grad"):
            least += min(floor * torch.finfo(torch.float32).eps, step) * largest
        else:
            least = max(least, step * size)
        for kind, e, b, r, s in zip(("max", "rms"), error, base, rounding, shift):
            bound = factor * b + 2 * r + 4 * s + least
            if not e <= bound:
                difference = (got[name].double() - want).abs().where(finite, 0.0)
                index = tuple(torch.unravel_index(difference.argmax(), want.shape))
                raise AssertionError(
                    f"{name}: {kind} error {e:.3e} over the bound {bound:.3e} (torch form {b:.3e}, rounding {r:.3e}, "
                    f"noise {s:.3e}, floor {least:.3e}); worst at {[int(i) for i in index]}: {got[name][index].item()} "
                    f"for {want[index].item()}"
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
        if operator._form(backend, f"{op_name}_keep") is not None:
            forward = getattr(torch.ops.hebatron, f"_{op_name}_keep").default
            backward = getattr(torch.ops.hebatron, f"_{op_name}_keep_bwd").default
            torch.library.opcheck(forward, (*values, backend))
            kept = forward(*values, backend)[0 if operator.keep_results else len(outputs) :]
            for wanted in (True, False):
                needs = [wanted for a in values if isinstance(a, Tensor) and a.is_floating_point()]
                torch.library.opcheck(backward, (grads, kept, needs, *values, backend))


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


def _tool(name: str) -> str | None:
    """Beside this Python first: an environment that is not activated has its tools there."""
    here = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([here, os.environ.get("PATH", "")]))


def emulator_lacks() -> str | None:
    """What this machine lacks to build the emulator, or None."""
    if not (ROOT / "tests/emulator/CMakeLists.txt").exists() or not (ROOT / "csrc/cuda").is_dir():
        return f"the source tree (tests/emulator and csrc), looked for in {ROOT}"
    chosen = os.environ.get("CXX")
    if not any(_tool(name) for name in ([chosen] if chosen else ["c++", "g++", "clang++"])):
        return f"a C++ compiler ({chosen or 'c++, g++ or clang++'})"
    for tool in ("cmake", "ninja"):
        if _tool(tool) is None:
            return f"{tool} (pip install {tool})"
    return None if find_spec("pybind11") else "pybind11 (pip install pybind11)"


def build_emulator(checked: bool, target: str = "_emu") -> Path:
    """The folder in which a target of tests/emulator/CMakeLists.txt now stands, up to date."""
    lacks = emulator_lacks()
    if lacks is not None:
        raise BackendError(f"load_emulator: needs {lacks}")
    import fcntl  # POSIX only, as the emulator is

    import pybind11

    build = ROOT / "build" / f"emulator-{sys.implementation.cache_tag}-{'checked' if checked else 'plain'}"
    options = [
        f"-DHEBATRON_EMULATOR_CHECKED={'ON' if checked else 'OFF'}",
        f"-DHEBATRON_PYBIND11_INCLUDE={pybind11.get_include()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        *([f"-DCMAKE_CXX_COMPILER={os.environ['CXX']}"] if os.environ.get("CXX") else []),
    ]
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building it
        stamp, wanted = build / "options.txt", "\n".join([str(ROOT), *options])
        if not stamp.exists() or stamp.read_text() != wanted:
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            _build_step("-S", str(ROOT / "tests/emulator"), "-B", str(build), "-G", "Ninja", *options)
            stamp.write_text(wanted)
        _build_step("--build", str(build), "--target", target, "--parallel", str(os.cpu_count() or 1))
    return build


@cache
def _emulator(checked: bool) -> ModuleType:
    return _native.load_extension("_emu", build_emulator(checked) / f"_emu{EXTENSION_SUFFIXES[0]}")


def _build_step(*arguments: str) -> None:
    done = subprocess.run([str(_tool("cmake")), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"load_emulator: the build failed\n{(done.stdout + done.stderr)[-8000:]}")


def load_emulator(checked: bool = False) -> None:
    """Makes backend="emulator" run the CUDA kernels of this source tree on CPU tensors.

    Builds the module on the first call in a process (into build/, only what changed) and loads it. A later call may
    switch to the other build.

    Args:
        checked: the build that follows every memory access of the kernels and reports data races, accesses out of
            bounds and undefined behaviour as errors; slower.

    Raises:
        BackendError: the source tree, the compiler, CMake, ninja or pybind11 is missing, or the build failed.
    """
    _native.emulator_module = _emulator(checked)


@contextmanager
def emulate(
    mode: str = "lazy", seed: int = 0, sms: int = 3, checked: bool | None = None, **others: int
) -> Iterator[None]:
    """The emulator's options for the calls inside; afterwards they are what they were before.

    Args:
        mode: when copies and products in flight are done: "eager" at once, "lazy" as late as the waits allow,
            "random" at moments that the seed chooses.
        seed: of the random mode and of the order of the threads.
        sms: multiprocessors of the emulated GPU.
        checked: the build to use inside; None is the one loaded, and the plain one where none is.
        others: compute_capability (90 for sm_90), bytes_shared, max_resident_threads.
    """
    before = _native.emulator_module
    if checked is not None or before is None:
        load_emulator(bool(checked))
    module = _native.emulator_module
    assert module is not None
    options = module.options()
    try:
        module.configure(mode=mode, seed=seed, sms=sms, **others)
        yield
    finally:
        module.configure(**options)
        _native.emulator_module = before

"""The only importer of the compiled modules. Tensors cross as integers; Python allocates outputs and workspaces.

_cpu and _cuda are chosen by the device of the tensors. _emu is the CUDA source compiled for the CPU (tests/emulator):
while `emulated` runs a function, CPU tensors count as CUDA tensors and go to it.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # first: the native module then shares the OpenMP runtime torch has loaded
from torch import Tensor

from . import _evidence
from ._check import BackendError
from ._memory import empty


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"hebatron_kernels.{name}"), ""
    except ImportError as error:
        return None, str(error)


cpu_module, cpu_missing = _load("_cpu")
if cpu_module is not None:
    cpu_module.current_isa()  # a wrong HEBATRON_ISA is an error here, not at some later call
cuda_module, cuda_missing = _load("_cuda")
# asked once: compiled code cannot trace a call of the module
digests: dict[str, str] = {}
toolkit = 0
if cuda_module is not None and hasattr(cuda_module, "kernels"):
    digests = {kernel: built["digest"] for kernel, built in cuda_module.kernels().items()}
    toolkit = cuda_module.toolkit()

emulator_module: ModuleType | None = None  # testing.load_emulator
emulating = False

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def load_extension(name: str, path: Path) -> ModuleType:
    """A compiled module from a folder of its own; the same name may be loaded from several. The folder is part of the
    module's name: pybind11 would give back the first of two with the same one."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not a module of this Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated(function: Callable[..., Any], *args: Any) -> Any:
    """Runs a function of a native.py with the emulator as the GPU."""
    global emulating
    before, emulating = emulating, True
    try:
        return function(*args)
    finally:
        emulating = before


def on_cuda(value: Tensor) -> bool:
    """Whether this tensor's operators are CUDA kernels, on a GPU or in the emulator."""
    return emulating or value.is_cuda


def refusal(first: Tensor, *others: Tensor | None, cuda: bool = False) -> str | None:
    """Why the native module cannot take these floating tensors (device, dtype, row layout), or None.

    `cuda` says whether the operator has a CUDA kernel.
    """
    device = first.device.type
    if emulating:
        if emulator_module is None:
            return "call hebatron_kernels.testing.load_emulator() first"
        if device != "cpu":
            return f"runs CUDA kernels on CPU tensors, got {device}"
    elif device == "cuda":
        if not cuda:
            return "no CUDA kernel is written for this operator"
        if cuda_module is None:
            return f"the _cuda module is not built (HEBATRON_CUDA=on pip install -e .): {cuda_missing}"
    elif device != "cpu":
        return f"no native module for device {device}"
    elif cpu_module is None:
        return f"the _cpu module is not built (pip install -e .): {cpu_missing}"
    for value in (first, *others):
        if value is None:
            continue
        if value.dtype not in DTYPES:
            return f"computes float32 and bfloat16, got {str(value.dtype).removeprefix('torch.')}"
        if value.numel() and value.stride(-1) != 1 and value.shape[-1] > 1:
            return f"needs a contiguous last dimension, got strides {tuple(value.stride())}"
    return None


def unaligned(**tensors: Tensor) -> str | None:
    """Which of these has rows that do not start on 16 bytes, or None."""
    for name, tensor in tensors.items():
        steps = [step for step, n in zip(tensor.stride()[:-1], tensor.shape) if n > 1]
        # while compiling a tensor has no address yet: the kernel checks it again
        start = 0 if torch.compiler.is_compiling() else tensor.data_ptr() // tensor.element_size()
        if any(step % (16 // tensor.element_size()) for step in [*steps, start]):
            return f"needs the rows of {name} to start on 16 bytes, got strides {tuple(tensor.stride())}"
    return None


def aligned(tensor: Tensor) -> Tensor:
    """It, or a copy of it, on 16 bytes: autograd hands over gradients that start anywhere, and CUDA's kernels that
    move 16 bytes at a time take no other."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@torch.compiler.assume_constant_result
def arch_of(device: int) -> str:
    """The architecture of this GPU, "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def unproven(kernels: Sequence[str], device: int) -> str | None:
    """Why `auto` leaves CUDA kernels alone that could serve: one of these files has not passed on this kind of GPU."""
    arch = arch_of(device)
    for kernel in kernels:
        if kernel not in digests:
            return f"the _cuda module is without {kernel}; rebuild: HEBATRON_CUDA=on pip install -e ."
        reason = _evidence.unproven(kernel, arch, digest=digests[kernel], toolkit=toolkit)
        if reason is not None:
            return f"{reason}, only by name"
    return None


def wrote(*tensors: Tensor) -> None:
    """Tells autograd that a kernel changed these tensors, so that a graph which saved them refuses to go on."""
    torch.autograd.graph.increment_version(tensors)


def dtype_name(value: Tensor) -> str:
    return DTYPES[value.dtype]


class _Scratch(threading.local):
    """A thread's workspace for the small calls of decoding, which would spend longer on having one made."""

    BYTES = 2**20
    tensor: Tensor | None = None


_scratch = _Scratch()


def call(op: str, **kwargs: Any) -> None:
    """Runs one native operator on the device of its tensors: on the CPU, on the current stream of their GPU, or in
    the emulator. Tensors among the arguments cross as pointers; the workspace the operator asks for is made here."""
    first: Tensor | None = None
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            if first is None:
                first, index = value, value.get_device()  # of the GPU; -1 on the CPU
                if emulating:
                    return _emulate(op, kwargs)
            elif value.get_device() != index:
                raise ValueError(
                    f"{op}: {name} must be on {first.device} like the others, got {value.device}"
                )
            kwargs[name] = value.data_ptr()
    assert first is not None  # every operator has one
    if index >= 0:
        stream = torch.cuda.current_stream(first.device).cuda_stream
        run = partial(
            _function(cuda_module, cuda_missing, op, "_or_size"), **kwargs, device=index, stream=stream
        )
        needed = run()
        if needed:
            workspace = first.new_empty((needed,), dtype=torch.uint8)
            run(workspace=workspace.data_ptr(), bytes_workspace=needed)
        return
    function = _function(cpu_module, cpu_missing, op, "_or_size")
    threads = torch.get_num_threads()
    exact = torch.are_deterministic_algorithms_enabled()  # tests: fresh, poisoned, not a byte too long
    scratch = None if exact else _scratch.tensor
    if scratch is None:
        needed = function(**kwargs, threads=threads)
    else:
        needed = function(
            **kwargs, threads=threads, workspace=scratch.data_ptr(), bytes_workspace=_Scratch.BYTES
        )
    if needed:
        bytes_workspace = needed if exact else max(needed, _Scratch.BYTES)
        workspace = empty((bytes_workspace,), torch.uint8)
        if bytes_workspace == _Scratch.BYTES and not exact:
            _scratch.tensor = workspace
        function(**kwargs, threads=threads, workspace=workspace.data_ptr(), bytes_workspace=needed)


def _function(module: ModuleType | None, missing: str, op: str, form: str = "") -> Callable[..., int]:
    if module is None:
        raise BackendError(f"{op}: {missing}")
    found: Callable[..., int] | None = getattr(module, op + form, None)
    if found is None:
        raise BackendError(f"{op}: {module.__name__} is older than this code; rebuild: pip install -e .")
    return found


def _emulate(op: str, kwargs: dict[str, Any]) -> None:
    missing = "call hebatron_kernels.testing.load_emulator() first"
    run, size = (_function(emulator_module, missing, op, form) for form in ("", "_workspace"))
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    kwargs = kwargs | {name: value.data_ptr() for name, value in tensors.items()}
    bytes_workspace = size(**kwargs)
    if bytes_workspace:
        tensors["workspace"] = torch.empty((bytes_workspace,), dtype=torch.uint8)
        kwargs |= {"workspace": tensors["workspace"].data_ptr(), "bytes_workspace": bytes_workspace}
    assert emulator_module is not None
    with _only(tensors, emulator_module):
        run(**kwargs, device=0)


@contextmanager
def _only(tensors: dict[str, Tensor], module: ModuleType) -> Iterator[None]:
    """The kernels may touch these tensors, from the first element to the last, and nothing else."""
    try:
        for name, value in tensors.items():
            if value.numel():
                elements = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride()))
                module.allow_memory(value.data_ptr(), elements * value.element_size(), name)
        yield
    finally:
        module.forget_memory()


def build_info() -> dict[str, str]:
    """Each native module: what it was compiled for and what this machine uses of it, or why it is absent."""
    if cpu_module is None:
        cpu = f"not built (pip install -e .): {cpu_missing}"
    else:
        available = set(cpu_module.available_isas())
        isas = [isa if isa in available else f"({isa})" for isa in cpu_module.compiled_isas()]
        cpu = f"{cpu_module.current_isa()} chosen of {', '.join(isas)}; in brackets: not on this CPU"
    if cuda_module is None:
        cuda = f"not built (HEBATRON_CUDA=on pip install -e .): {cuda_missing}"
    else:
        baseline = "cutlass/grouped_gemm" in cuda_module.kernels()
        cutlass = "with CUTLASS" if baseline else "no CUTLASS (HEBATRON_CUTLASS_DIR)"
        built = f"{cuda_module.compiled_archs()}; {cuda_module.device_count()} devices; {cutlass}"
        cuda = f"{built}; {_evidence.summary(digests, toolkit)}"
    return {"_cpu": cpu, "_cuda": cuda}

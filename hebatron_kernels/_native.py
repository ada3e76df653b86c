"""The only importer of the compiled modules. Tensors cross as integers; Python allocates outputs and workspaces."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch  # first: the native module then shares the OpenMP runtime torch has loaded
from torch import Tensor

from ._check import BackendError


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"hebatron_kernels.{name}"), ""
    except ImportError as error:
        return None, str(error)


cpu_module, cpu_missing = _load("_cpu")
if cpu_module is not None:
    cpu_module.current_isa()  # a wrong HEBATRON_ISA is an error here, not at some later call
cuda_module, cuda_missing = _load("_cuda")

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def refusal(first: Tensor, *others: Tensor | None, cuda: bool = False) -> str | None:
    """Why the native module cannot take these floating tensors (device, dtype, row layout), or None.

    `cuda` says whether the operator has a CUDA kernel.
    """
    if first.device.type == "cuda":
        if not cuda:
            return "no CUDA kernel is written for this operator"
        if cuda_module is None:
            return f"the _cuda module is not built (HEBATRON_CUDA=on pip install -e .): {cuda_missing}"
    elif first.device.type != "cpu":
        return f"no native module for device {first.device.type}"
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


def unproven(args: Sequence[Any]) -> str | None:
    """Why `auto` leaves a native kernel alone that could serve: no CUDA kernel of ours has run on a GPU yet."""
    if any(isinstance(a, Tensor) and a.device.type == "cuda" for a in args):
        return "never run on hardware, only by name"
    return None


def pointer(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def wrote(*tensors: Tensor) -> None:
    """Tells autograd that a kernel changed these tensors, so that a graph which saved them refuses to go on."""
    for value in tensors:
        torch.autograd.graph.increment_version(value)


def dtype_name(value: Tensor) -> str:
    return DTYPES[value.dtype]


def call(op: str, device: torch.device | None = None, **kwargs: Any) -> None:
    """Runs one native operator with the workspace it asks for, on the CPU or on the current stream of `device`."""
    on_gpu = device is not None and device.type == "cuda"
    module = cuda_module if on_gpu else cpu_module
    if module is None:
        raise BackendError(f"{op}[native]: {cuda_missing if on_gpu else cpu_missing}")
    bytes_workspace = getattr(module, f"{op}_workspace")(**kwargs)
    workspace = torch.empty(bytes_workspace, dtype=torch.uint8, device=device) if bytes_workspace else None
    where: dict[str, int] = {"threads": torch.get_num_threads()}
    if on_gpu:
        stream = torch.cuda.current_stream(device)
        where = {"device": stream.device_index, "stream": stream.cuda_stream}
    getattr(module, op)(**kwargs, **where, workspace=pointer(workspace) or 0, bytes_workspace=bytes_workspace)


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
        cuda = f"{cuda_module.compiled_archs()}; {cuda_module.device_count()} devices"
    return {"_cpu": cpu, "_cuda": cuda}

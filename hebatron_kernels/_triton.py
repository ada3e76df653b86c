"""What the nouns' Triton forms share: whether this machine can run them, and on which hardware they have run.

Triton is no dependency and is not imported here: torch's CUDA builds bring it, its CPU build does not. A noun's
triton_ops.py imports its kernels, and with them Triton, at the first call.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import _evidence, _native

DTYPES = (torch.float32, torch.bfloat16)
NOUNS = ("moe", "ssd")  # with a Triton form


def _installed() -> str:
    """Triton's version, "" where it is absent; torch's nightly builds call theirs pytorch-triton."""
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


version = _installed()  # here, as compiled code cannot trace it
# Triton's own switch, which it reads when it is imported: kernels then run in Python on the CPU.
interpreting = os.environ.get("TRITON_INTERPRET") == "1"


def refusal(first: Tensor) -> str | None:
    """Why Triton kernels cannot take tensors like this one, or None."""
    if not version:
        return "Triton is not installed (torch's CUDA builds bring it; pip install triton)"
    if first.dtype not in DTYPES:
        return f"computes float32 and bfloat16, got {str(first.dtype).removeprefix('torch.')}"
    if first.is_cuda:
        if interpreting:
            return "TRITON_INTERPRET=1 is set, under which kernels run on the CPU"
        arch = _native.arch_of(first.get_device())
        return None if int(arch.removeprefix("sm_")) >= 80 else f"needs compute capability 8.0, got {arch}"
    if first.device.type != "cpu":
        return f"no Triton kernels for device {first.device.type}"
    return None if interpreting else "needs a GPU (or TRITON_INTERPRET=1, for tests), got a tensor on the CPU"


def compiler() -> str:
    """What the evidence table calls the compiler: another minor version of Triton makes other code."""
    return "Triton " + ".".join(version.split(".")[:2])


@cache
def digest(noun: str) -> str:
    """Of what a noun's Triton form is, without comments, docstrings and layout."""
    trees = []
    for name in ("triton_ops.py", "triton_kernels.py"):
        tree = ast.parse(Path(__file__).parent.joinpath(noun, name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:]
        trees.append(ast.dump(tree))
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()[:16]


def kernel(noun: str) -> str:
    """The name of a noun's Triton form in the evidence table."""
    return f"{noun}/triton"


@torch.compiler.assume_constant_result
def unproven(noun: str, device: int) -> str | None:
    """Why `auto` leaves this noun's Triton form alone, or None: the rule that holds for CUDA kernels holds here too."""
    if device < 0:
        return "runs in Triton's interpreter, only by name"
    arch = _native.arch_of(device)
    reason = _evidence.unproven(kernel(noun), arch, digest=digest(noun), toolkit=compiler())
    return None if reason is None else f"{reason}, only by name"

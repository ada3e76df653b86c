"""Argument checks shared by the operators. Every message: `<op>: <arg> must <condition>, got <value>`."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A named backend cannot serve this call; the message says why."""


def refuse(op: str, arg: str, condition: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {arg} must {condition}, got {got}")


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return repr(value)


def tensor(
    op: str, arg: str, value: object, *shape: int | None, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """`value` is a tensor of this shape (None = any size) and one of these dtypes."""
    if not isinstance(value, Tensor):
        refuse(op, arg, "be a tensor", type(value).__name__)
    fits = value.dim() == len(shape) and all(w is None or w == n for w, n in zip(shape, value.shape))
    if not fits:
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        refuse(op, arg, f"have shape ({wanted})", describe(value))
    if value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        refuse(op, arg, f"have dtype {names}", describe(value))


def same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    for arg, value in others.items():
        if value is not None and value.device != first.device:
            refuse(op, arg, f"be on {first.device} like the first argument", value.device)


def same_dtype(op: str, first: Tensor, **others: Tensor | None) -> None:
    for arg, value in others.items():
        if value is not None and value.dtype != first.dtype:
            refuse(op, arg, f"have dtype {first.dtype} like the first argument", value.dtype)


def cu_seqlens(op: str, value: Tensor | None, tokens: int, arg: str = "cu_seqlens") -> None:
    """int32 (Q+1,), from 0 to `tokens`, never falling. The values are read only on the CPU: on a GPU that would
    synchronise, and a wrong value there is the caller's."""
    if value is None:
        return
    tensor(op, arg, value, None, dtypes=(torch.int32,))
    if value.numel() < 1:
        refuse(op, arg, "have at least one entry", describe(value))
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = value.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(b < a for a, b in pairwise(ends)):
        shown = ends if len(ends) <= 12 else [*ends[:6], "...", *ends[-5:]]
        refuse(op, arg, f"rise from 0 to {tokens} (the number of tokens)", shown)


def sequences(cu: Tensor | None) -> int:
    """The number of sequences that cu_seqlens names; None is one sequence."""
    return 1 if cu is None else cu.numel() - 1


def integer(op: str, **values: int) -> None:
    """bool is no integer here."""
    for arg, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            refuse(op, arg, "be an integer", repr(value))


def positive(op: str, **values: float) -> None:
    for arg, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            refuse(op, arg, "be a number", repr(value))
        if not value > 0:
            refuse(op, arg, "be > 0", value)
        if isinstance(value, float) and value == math.inf:
            refuse(op, arg, "be finite", value)


def truth(op: str, **values: bool) -> None:
    for arg, value in values.items():
        if not isinstance(value, bool):
            refuse(op, arg, "be True or False", repr(value))

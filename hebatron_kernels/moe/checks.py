"""Checks that the expert operators share; messages as in _check."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check

IDS = (torch.int64, torch.int32)


def host_readable(value: Tensor) -> bool:
    """Values are checked only on the CPU: on a GPU that would synchronise, and a wrong value is the caller's."""
    return value.device.type == "cpu" and value.numel() > 0 and not torch.compiler.is_compiling()


def ids(op: str, ids_TK: Tensor, tokens: int, experts: int | None) -> None:
    check.tensor(op, "ids_TK", ids_TK, tokens, None, dtypes=IDS)
    if ids_TK.shape[1] == 0:
        check.refuse(op, "ids_TK", "name at least one expert per token", check.describe(ids_TK))
    if experts is not None:
        in_range(op, "ids_TK", ids_TK, experts)


def in_range(op: str, arg: str, value: Tensor, limit: int) -> None:
    if host_readable(value):
        low, high = (int(bound) for bound in torch.aminmax(value))
        if low < 0 or high >= limit:
            check.refuse(op, arg, f"be between 0 and {limit - 1}", low if low < 0 else high)


def widths(op: str, arg: str, value: Tensor) -> None:
    if 0 in value.shape[1:]:
        check.refuse(op, arg, "have widths > 0", check.describe(value))

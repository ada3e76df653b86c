"""Weights in the order in which the CPU kernels read them. M outputs, K inner, E experts; a matrix is one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, _native

HEADER_BYTES = 64
PANEL_LANES = 16
STORED = (torch.bfloat16, torch.float32)


def packed_elements(experts: int, outputs: int, inner: int, dtype: torch.dtype) -> int:
    """Elements of the packed form of (experts, outputs, inner) weights (struct MoePackArgs of csrc/hebatron/ops.h)."""
    unit = 4 // dtype.itemsize
    per_expert = -(-inner // unit) * unit * (-(-outputs // PANEL_LANES) * PANEL_LANES)
    return HEADER_BYTES // dtype.itemsize + experts * per_expert


def pack(weight_EMK: Tensor, dtype: torch.dtype) -> Tensor:
    experts, outputs, inner = weight_EMK.shape
    packed = _native.empty((packed_elements(experts, outputs, inner, dtype),), dtype, reuse=False)
    _native.call(
        "moe_pack",
        experts=experts,
        n=outputs,
        k=inner,
        unpack=0,
        dtype=_native.DTYPES[dtype],
        weight_dtype=_native.dtype_name(weight_EMK),
        weights=weight_EMK,
        expert_stride=weight_EMK.stride(0),
        stride=weight_EMK.stride(1),
        packed=packed,
        unpacked=None,
    )
    return packed


def unpack(packed: Tensor, experts: int, outputs: int, inner: int) -> Tensor:
    weight_EMK = torch.empty(experts, outputs, inner, dtype=packed.dtype)
    _native.call(
        "moe_pack",
        experts=experts,
        n=outputs,
        k=inner,
        unpack=1,
        dtype=_native.dtype_name(packed),
        weight_dtype=_native.dtype_name(packed),
        weights=None,
        expert_stride=0,
        stride=0,
        packed=packed,
        unpacked=weight_EMK,
    )
    return weight_EMK


def check(
    op: str,
    arg: str,
    packed: Tensor,
    dtype: torch.dtype | None,
    experts: int,
    outputs: int,
    inner: int,
) -> None:
    """`dtype` None is any in which weights are packed."""
    _check.positive(op, experts=experts, outputs=outputs, inner=inner)
    _check.integer(op, experts=experts, outputs=outputs, inner=inner)
    _check.tensor(op, arg, packed, None, dtypes=STORED if dtype is None else (dtype,))
    if packed.device.type != "cpu":  # its first bytes are read there
        _check.refuse(op, arg, "be on cpu", packed.device)
    elements = packed_elements(experts, outputs, inner, packed.dtype)
    if packed.shape[0] != elements or not packed.is_contiguous():
        wanted = f"be the packed form of ({experts}, {outputs}, {inner}) weights, {elements} elements"
        _check.refuse(op, arg, wanted, _check.describe(packed))


def moe_pack(weight_EMK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The experts' weights in the order in which the CPU kernels read them, for `moe_mlp_packed`.

    Args:
        weight_EMK: (E experts, M outputs, K inner), fp32 or bf16 on the CPU, contiguous in the last dimension.
        dtype: bfloat16 or float32, of the packed form and of the tokens it will serve; None: that of the weights.

    Returns:
        (elements,) in `dtype`: 64 bytes that describe it, then the panels. It is made for the vectors of this machine:
        move it by `moe_unpack`, not by copying its bytes.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendError: the native CPU module cannot take the weights.
    """
    op = "moe_pack"
    _check.tensor(op, "weight_EMK", weight_EMK, None, None, None, dtypes=STORED)
    if 0 in weight_EMK.shape:
        _check.refuse(op, "weight_EMK", "have no empty dimension", _check.describe(weight_EMK))
    dtype = weight_EMK.dtype if dtype is None else dtype
    if dtype not in STORED or (dtype == torch.float32 and weight_EMK.dtype != dtype):
        _check.refuse(op, "dtype", "be bfloat16, or float32 for float32 weights", dtype)
    cuda = _native.on_cuda(weight_EMK)
    reason = "packs for the CPU kernels only" if cuda else _native.refusal(weight_EMK)
    if reason is not None:
        raise _check.BackendError(f"{op}: {reason}")
    return pack(weight_EMK.detach(), dtype)


def moe_unpack(packed: Tensor, experts: int, outputs: int, inner: int) -> Tensor:
    """The (experts, outputs, inner) weights that `moe_pack` packed, in the dtype they were packed in.

    Raises:
        ValueError: `packed` is not the packed form of weights of these sizes.
    """
    check("moe_unpack", "packed", packed, None, experts, outputs, inner)
    return unpack(packed, experts, outputs, inner)


def linear_pack(weight_MD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A matrix in the order in which the CPU kernels read it, for `linear_packed`; see `moe_pack`.

    Args:
        weight_MD: (M outputs, D inputs), fp32 or bf16 on the CPU, contiguous in the last dimension.
        dtype: bfloat16 or float32, of the packed form and of the tokens it will serve; None: that of the weight.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendError: the native CPU module cannot take the weight.
    """
    _check.tensor("linear_pack", "weight_MD", weight_MD, None, None)
    return moe_pack(weight_MD[None], dtype)


def linear_unpack(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The (outputs, inputs) matrix that `linear_pack` packed, in the dtype it was packed in.

    Raises:
        ValueError: `packed` is not the packed form of a matrix of this size.
    """
    return moe_unpack(packed, 1, outputs, inputs)[0]

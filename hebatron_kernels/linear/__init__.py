"""The dense projections: a product with a matrix, whose weights may be packed ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import _packing
from .._dispatch import Operator
from . import native, reference, torch_ops

__all__ = ["linear", "linear_packed"]

_linear = Operator(
    "linear",
    "Tensor x, Tensor weight",
    "Tensor",
    {"native": native, "emulator": native, "torch": torch_ops, "reference": reference},
    lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
    fake_keep=lambda *_: (),
)
_linear_packed = Operator(
    "linear_packed",
    "Tensor x, Tensor packed, int outputs",
    "Tensor",
    {"torch": torch_ops, "reference": reference, "native": native},
    lambda x, packed, outputs: x.new_empty(x.shape[0], outputs),
    differentiable=False,
)


def linear(x_TD: Tensor, weight_MD: Tensor, *, backend: str | None = None) -> Tensor:
    """y = x weight^T.

    Args:
        x_TD: (T tokens, D inputs), any floating dtype.
        weight_MD: (M outputs, D), any floating dtype: fp32 master weights are rounded to the dtype of x on their way
            into the product.

    Returns:
        y_TM: (T, M) in the dtype of x, summed in fp32 (fp64 for fp64 x).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To x and weight. In the native form that of an fp32 weight is summed and stored in fp32, whatever the dtype
        of x; torch rounds it to the dtype of x.

    Backends:
        native: C++, fp32 and bf16 on the CPU; a token's result does not depend on the tokens beside it. On CUDA
        cuBLASLt through torch, only by name. emulator: as native on CUDA, on CPU tensors. torch: F.linear with the
        weight cast.

    Source:
        the projections of every transformer; csrc/cpu/linear.cpp for the order of the sums.
    """
    op = "linear"
    check.tensor(op, "x_TD", x_TD, None, None)
    check.tensor(op, "weight_MD", weight_MD, None, x_TD.shape[1])
    check.same_device(op, x_TD, weight_MD=weight_MD)
    if 0 in weight_MD.shape:
        check.refuse(op, "weight_MD", "have no empty dimension", check.describe(weight_MD))
    return _linear(x_TD, weight_MD, backend=backend)


def linear_packed(x_TD: Tensor, packed: Tensor, outputs: int, *, backend: str | None = None) -> Tensor:
    """linear with the weight packed ahead: the same bits.

    Args:
        x_TD: (T tokens, D inputs), fp32 or bf16 on the CPU.
        packed: `linear_pack` of an (M, D) weight, packed in the dtype of x.
        outputs: M.
        backend: "native"; "torch" and "reference" unpack at every call. None chooses.

    Returns:
        y_TM: (T, M) in the dtype of x.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or requires a gradient.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        None.

    Backends:
        native: C++ on the CPU, bit-equal to `linear` with the weight that was packed.

    Source:
        as `linear`.
    """
    op = "linear_packed"
    check.tensor(op, "x_TD", x_TD, None, None, dtypes=(torch.float32, torch.bfloat16))
    check.integer(op, outputs=outputs)
    _packing.check(op, "packed", packed, x_TD.dtype, 1, outputs, x_TD.shape[1])
    check.same_device(op, x_TD, packed=packed)
    return _linear_packed(x_TD, packed, outputs, backend=backend)

"""The expert layer over weights packed ahead, for models that are run and no longer trained."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .._dispatch import Operator
from . import checks, native, reference, torch_ops

_moe_mlp_packed = Operator(
    "moe_mlp_packed",
    "Tensor x, Tensor ids, Tensor weights, Tensor up, Tensor down, int num_experts, int expert_width",
    "Tensor",
    {"torch": torch_ops, "reference": reference, "native": native},
    lambda x, *_: x.new_empty(x.shape),
    differentiable=False,
)


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
    stored = (torch.bfloat16, torch.float32)
    check.tensor(op, "weight_EMK", weight_EMK, None, None, None, dtypes=stored)
    if 0 in weight_EMK.shape:
        check.refuse(op, "weight_EMK", "have no empty dimension", check.describe(weight_EMK))
    dtype = weight_EMK.dtype if dtype is None else dtype
    if dtype not in stored or (dtype == torch.float32 and weight_EMK.dtype != dtype):
        check.refuse(op, "dtype", "be bfloat16, or float32 for float32 weights", dtype)
    reason = native.supports_moe_mlp_packed(weight_EMK)
    if reason is not None:
        raise check.BackendError(f"{op}: {reason}")
    return native.moe_pack(weight_EMK.detach(), dtype)


def moe_unpack(packed: Tensor, experts: int, outputs: int, inner: int) -> Tensor:
    """The (experts, outputs, inner) weights that `moe_pack` packed, in the dtype they were packed in.

    Raises:
        ValueError: `packed` is not the packed form of weights of these sizes.
    """
    _check_packed("moe_unpack", "packed", packed, packed.dtype, experts, outputs, inner)
    return native.moe_unpack(packed, experts, outputs, inner)


def _check_packed(
    op: str, arg: str, packed: Tensor, dtype: torch.dtype, experts: int, outputs: int, inner: int
) -> None:
    check.positive(op, experts=experts, outputs=outputs, inner=inner)
    check.tensor(op, arg, packed, None, dtypes=(dtype,))
    elements = native.packed_elements(experts, outputs, inner, dtype)
    if packed.shape[0] != elements or not packed.is_contiguous():
        wanted = f"be the packed form of ({experts}, {outputs}, {inner}) weights, {elements} elements"
        check.refuse(op, arg, wanted, check.describe(packed))


def moe_mlp_packed(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    num_experts: int,
    expert_width: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """moe_mlp with weights packed ahead: the same bits, without reading the weights into another order at each call.

    Args:
        x_TD: (T tokens, D width), fp32 or bf16.
        ids_TK: (T, K) int64 or int32, experts in 0..E-1.
        weights_TK: (T, K), any floating dtype.
        up: `moe_pack` of (E experts, F expert width, D) weights, packed in the dtype of x.
        down: `moe_pack` of (E, D, F) weights, packed in the dtype of x.
        num_experts: E.
        expert_width: F.
        backend: "native"; "torch" and "reference" unpack at every call. None chooses.

    Returns:
        y_TD: (T, D) in the dtype of x.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or requires a gradient.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        None.

    Backends:
        native: C++ on the CPU, bit-equal to `moe_mlp` with the weights that were packed.

    Source:
        as `moe_mlp`.
    """
    op = "moe_mlp_packed"
    check.tensor(op, "x_TD", x_TD, None, None, dtypes=(torch.float32, torch.bfloat16))
    tokens, width = x_TD.shape
    check.positive(op, num_experts=num_experts, expert_width=expert_width)
    check.integer(op, num_experts=num_experts, expert_width=expert_width)
    checks.widths(op, "x_TD", x_TD)
    _check_packed(op, "up", up, x_TD.dtype, num_experts, expert_width, width)
    _check_packed(op, "down", down, x_TD.dtype, num_experts, width, expert_width)
    checks.ids(op, ids_TK, tokens, None)  # the kernel holds them against the experts
    check.tensor(op, "weights_TK", weights_TK, *ids_TK.shape)
    check.same_device(op, x_TD, ids_TK=ids_TK, weights_TK=weights_TK, up=up, down=down)
    return _moe_mlp_packed(x_TD, ids_TK, weights_TK, up, down, num_experts, expert_width, backend=backend)

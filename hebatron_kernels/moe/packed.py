"""The expert layer over weights packed ahead, for models that are run and no longer trained."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import _packing
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
    _packing.check(op, "up", up, x_TD.dtype, num_experts, expert_width, width)
    _packing.check(op, "down", down, x_TD.dtype, num_experts, width, expert_width)
    checks.ids(op, ids_TK, tokens, None)  # the kernel holds them against the experts
    check.tensor(op, "weights_TK", weights_TK, *ids_TK.shape)
    check.same_device(op, x_TD, ids_TK=ids_TK, weights_TK=weights_TK, up=up, down=down)
    return _moe_mlp_packed(x_TD, ids_TK, weights_TK, up, down, num_experts, expert_width, backend=backend)

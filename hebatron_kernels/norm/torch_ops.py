"""rms_norm as differentiable torch operations, for every device and dtype. T tokens, D width, N groups, g columns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float = 1e-5,
    residual_TD: Tensor | None = None,
    gate_TD: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    sum_TD = x_TD if residual_TD is None else x_TD + residual_TD
    compute = torch.promote_types(x_TD.dtype, torch.float32)
    value_TD = sum_TD.to(compute)
    if gate_TD is not None:
        value_TD = value_TD * F.silu(gate_TD.to(compute))
    group = x_TD.shape[1] if group_size is None else group_size
    value_TNg = value_TD.unflatten(1, (-1, group))
    normed_TD = F.rms_norm(value_TNg, (group,), eps=eps).flatten(1)
    y_TD = (normed_TD * weight_D.to(compute)).to(x_TD.dtype)
    return y_TD, None if residual_TD is None else sum_TD

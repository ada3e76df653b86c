"""The oracle of rms_norm: explicit sums in fp64. T tokens, D width, g columns of one group."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float = 1e-5,
    residual_TD: Tensor | None = None,
    gate_TD: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    value_TD = x_TD.double()
    if residual_TD is not None:
        value_TD = value_TD + residual_TD.double()
    sum_TD = value_TD
    if gate_TD is not None:
        gate = gate_TD.double()
        value_TD = value_TD * gate / (1.0 + torch.exp(-gate))
    width = x_TD.shape[1]
    group = width if group_size is None else group_size
    columns = []
    for begin in range(0, width, group):
        part_Tg = value_TD[:, begin : begin + group]
        mean_square_T1 = (part_Tg * part_Tg).sum(1, keepdim=True) / group
        columns.append(part_Tg / torch.sqrt(mean_square_T1 + eps))
    y_TD = torch.cat(columns, 1) * weight_D.double()
    return y_TD.to(x_TD.dtype), None if residual_TD is None else sum_TD.to(x_TD.dtype)

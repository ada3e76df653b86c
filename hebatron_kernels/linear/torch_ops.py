"""linear by torch: every dtype and device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._packing import unpack


def linear(x_TD: Tensor, weight_MD: Tensor) -> Tensor:
    return F.linear(x_TD, weight_MD.to(x_TD.dtype))


def linear_packed(x_TD: Tensor, packed: Tensor, outputs: int) -> Tensor:
    return F.linear(x_TD, unpack(packed, 1, outputs, x_TD.shape[1])[0])

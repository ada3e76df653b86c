"""The oracle of linear: the product in fp64. T tokens, D inputs, M outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import unpack_panels


def linear(x_TD: Tensor, weight_MD: Tensor) -> Tensor:
    return torch.einsum("td,md->tm", x_TD.double(), weight_MD.double()).to(x_TD.dtype)


def linear_packed(x_TD: Tensor, packed: Tensor, outputs: int) -> Tensor:
    return linear(x_TD, unpack_panels(packed, 1, outputs, x_TD.shape[1])[0])

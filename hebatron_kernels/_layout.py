"""The layout of packed weights (csrc/cpu/tile.h), spelled out in torch for the references."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_panels(packed: Tensor, experts: int, outputs: int, inner: int) -> Tensor:
    """(experts, outputs, inner) weights from 64 bytes of header and panels of 4 vectors of outputs, each [units of
    inner][outputs][unit]."""
    header, unit = 64 // packed.element_size(), 4 // packed.element_size()
    lanes = int(packed[:header].view(torch.int64)[1])
    units = -(-inner // unit)
    panels_E = packed[header:].view(experts, -1)
    weight_EMK = packed.new_empty(experts, outputs, inner)
    for begin in range(0, outputs, 4 * lanes):
        columns = min(4 * lanes, outputs - begin)
        width = -(-columns // lanes) * lanes
        size = units * width * unit
        panel, panels_E = panels_E[:, :size].view(experts, units, width, unit), panels_E[:, size:]
        columns_first = panel.permute(0, 2, 1, 3).reshape(experts, width, units * unit)
        weight_EMK[:, begin : begin + columns] = columns_first[:, :columns, :inner]
    return weight_EMK

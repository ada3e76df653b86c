"""Problems of the loss that its tests share."""

import torch

REDUCTIONS = ["mean", "sum", "none"]


def make(tokens, width, entries, dtype=torch.float64, ignored=0.3, ignore_index=-100):
    x = torch.randn(tokens, width, dtype=dtype)
    weight = torch.randn(entries, width, dtype=dtype) * 0.5
    targets = torch.randint(entries, (tokens,))
    targets[torch.rand(tokens) < ignored] = ignore_index
    targets[:1] = 0  # a mean needs one
    return [x, weight, targets]

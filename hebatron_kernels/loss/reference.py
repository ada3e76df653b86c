"""The oracle of linear_cross_entropy: all logits at once, in fp64, the softmax written out. T tokens, V entries."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    ignored_T1 = (targets_T == ignore_index)[:, None]
    logits_TV = x_TD.double().masked_fill(ignored_T1, 0.0) @ weight_VD.double().T
    losses, kept = [], 0
    for logits_V, target in zip(logits_TV, targets_T.tolist()):
        if target == ignore_index:
            losses.append(logits_V[:0].sum())
            continue
        largest = logits_V.detach().max()
        losses.append(largest + torch.log(torch.exp(logits_V - largest).sum()) - logits_V[target])
        kept += 1
    loss_T = torch.stack(losses) if losses else logits_TV.sum(1)
    loss = loss_T if reduction == "none" else loss_T.sum()
    if reduction == "mean":
        loss = loss / torch.tensor(float(kept), dtype=torch.float64)  # a tensor: nothing kept gives NaN
    return loss.to(torch.promote_types(x_TD.dtype, torch.float32))

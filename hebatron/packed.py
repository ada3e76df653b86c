"""The model's door: what a caller can get wrong is refused here, and the padding is taken out.

B rows, L length of a row, T tokens, V vocabulary, Q sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache
from .config import ModelConfig

FEW_IDS = 64


@dataclass(frozen=True)
class Packed:
    """One forward's input without padding."""

    ids_T: Tensor
    labels_T: Tensor | None
    cu_seqlens: Tensor | None
    lengths: list[int]  # of each sequence; empty while compiling
    shape: tuple[int, ...]  # of input_ids, (1, T) for flat input
    kept_T: Tensor | None  # places of the tokens among the B * L; None: all of them

    def restore(self, logits_TV: Tensor) -> Tensor:
        """Back to (B, L, V), zeros at the padding."""
        if self.kept_T is not None:
            places = math.prod(self.shape)
            logits_TV = logits_TV.new_zeros(places, logits_TV.shape[-1]).index_copy(0, self.kept_T, logits_TV)
        return logits_TV.view(*self.shape, -1)


def enter(
    c: ModelConfig,
    device: torch.device,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: Cache | None,
    labels: Tensor | None,
    logits_to_keep: int | None,
    loss_reduction: str,
) -> Packed:
    """Check everything a caller can get wrong, and take the padding out."""
    # at every token of decoding: a message is put together only where it is needed
    if not isinstance(input_ids, Tensor):
        wrong("input_ids", "be a tensor", type(input_ids).__name__)
    for name, value in (("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens), ("labels", labels)):
        if value is not None and not isinstance(value, Tensor):
            wrong(name, "be a tensor", type(value).__name__)
    if input_ids.device != device:
        wrong("input_ids", f"be on {device} like the model", input_ids.device)
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool or input_ids.is_complex():
        wrong("input_ids", "hold integers", input_ids.dtype)
    shape = tuple(input_ids.shape)
    if cu_seqlens is not None:
        must(attention_mask is None, "cu_seqlens", "come without attention_mask", "both")
        must(len(shape) == 1 or (len(shape) == 2 and shape[0] == 1), "input_ids", "be (T,) or (1, T)", shape)
    else:
        must(len(shape) == 2, "input_ids", "have shape (B, L)", shape)
    if 0 in shape:
        wrong("input_ids", "hold at least one token", f"shape {shape}")
    if labels is not None:
        got = tuple(labels.shape)
        must(got == shape, "labels", f"have the shape of input_ids {shape}", got)
        must(labels.dtype == torch.int64, "labels", "be int64", labels.dtype)
        must(labels.device == device, "labels", f"be on {device} like the model", labels.device)
    rule = "be 'mean', 'sum' or 'none'"
    must(loss_reduction in ("mean", "sum", "none"), "loss_reduction", rule, repr(loss_reduction))
    n = logits_to_keep
    whole = n is None or (isinstance(n, int) and not isinstance(n, bool) and n >= 1)
    must(whole, "logits_to_keep", "be None or an integer >= 1", n)
    compiling = torch.compiler.is_compiling()
    ids_T = input_ids.reshape(-1)
    if compiling:
        must(cache is None and attention_mask is None, "forward", "be compiled without cache and mask", "one")
    else:
        _check_ids(c, "input_ids", ids_T)
        if labels is not None and bool((labels != -100).any()):
            _check_ids(c, "labels", labels[labels != -100])

    kept_T, labels_T = None, None if labels is None else labels.flatten()
    if ids_T.dtype != torch.int64:
        ids_T = ids_T.long()
    lengths = [shape[-1]] * (shape[0] if len(shape) == 2 else 1)
    if cu_seqlens is not None:
        lengths = [] if compiling else _check_cu_seqlens(cu_seqlens, input_ids)
    elif attention_mask is not None:
        kept_T, lengths = _unpad(attention_mask, input_ids, allow_empty=cache is not None)
        if kept_T is not None:
            ids_T, labels_T = ids_T[kept_T], None if labels_T is None else labels_T[kept_T]
    if cu_seqlens is None and len(lengths) > 1:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        cu_seqlens = ends.to(torch.int32).to(input_ids.device)
    if not compiling:
        longest, limit = max(lengths), c.max_position_embeddings
        if longest > limit:
            wrong("a sequence", f"stay within max_position_embeddings ({limit})", f"{longest} tokens")
        if labels_T is not None and loss_reduction == "mean":  # 0 / 0, and the cache half stepped by then
            must(bool((labels_T != -100).any()), "labels", "hold a target for a mean loss", "only -100")
    if cache is not None:
        if not isinstance(cache, Cache):
            wrong("cache", "be a Cache", type(cache).__name__)
        cache.check_fits(c, device, lengths)
    must(n is None or bool(lengths), "logits_to_keep", "be None under torch.compile", n)
    return Packed(ids_T, labels_T, cu_seqlens, lengths, (1, *shape) if len(shape) == 1 else shape, kept_T)


def _check_ids(c: ModelConfig, name: str, ids_T: Tensor) -> None:
    if ids_T.numel() <= FEW_IDS:  # as in decoding: an operator costs more than a Python number
        values = ids_T.tolist()
        low, high = min(values), max(values)
    else:
        low, high = (int(x) for x in torch.aminmax(ids_T))
    if low < 0 or high >= c.vocab_size:
        wrong(name, f"be in [0, {c.vocab_size})", low if low < 0 else high)


def _check_cu_seqlens(cu_seqlens: Tensor, input_ids: Tensor) -> list[int]:
    tokens = input_ids.numel()
    right = cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 2
    got = f"{cu_seqlens.dtype}{list(cu_seqlens.shape)}"
    must(right, "cu_seqlens", "be int32 of shape (Q + 1,) with Q >= 1", got)
    same = cu_seqlens.device == input_ids.device
    must(same, "cu_seqlens", f"be on {input_ids.device} like input_ids", cu_seqlens.device)
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    right = ends[0] == 0 and ends[-1] == tokens and min(lengths) >= 0
    must(right, "cu_seqlens", f"rise from 0 to {tokens} (the number of tokens)", ends[:8])
    return lengths


def _unpad(attention_mask: Tensor, input_ids: Tensor, allow_empty: bool) -> tuple[Tensor | None, list[int]]:
    shape = tuple(input_ids.shape)
    got = tuple(attention_mask.shape)
    must(got == shape, "attention_mask", f"have the shape of input_ids {shape}", got)
    mask_BL = attention_mask.to(device=input_ids.device, dtype=torch.bool)
    binary = bool((attention_mask.to(input_ids.device) == mask_BL).all())
    must(binary, "attention_mask", "hold only 0 and 1", "another value")
    begins_BL = F.pad(mask_BL, (1, 0))[:, :-1].logical_not() & mask_BL
    runs_B = begins_BL.sum(1)
    row = int(runs_B.argmax())
    must(int(runs_B[row]) <= 1, "attention_mask", "have no holes inside a row", f"several runs in row {row}")
    lengths = mask_BL.sum(1).tolist()
    if not allow_empty and 0 in lengths:
        raise ValueError(
            f"forward: attention_mask must keep a token in every row, got none in row {lengths.index(0)}"
        )
    must(sum(lengths) > 0, "attention_mask", "keep at least one token", "none")
    return (None if sum(lengths) == math.prod(shape) else mask_BL.flatten().nonzero()[:, 0]), lengths


def must(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        wrong(name, rule, value)


def wrong(name: str, rule: str, value: object) -> NoReturn:
    raise ValueError(f"forward: {name} must {rule}, got {value}")

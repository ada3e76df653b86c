"""How one forward's tokens lie: which of the (rows, length) are tokens, and where each sequence of them begins.

transformers hands padding and packed documents to its attention as a mask over all pairs, and documents to its Mamba
layers not at all. Here both kinds of layer are told once, in the operators' own terms, and no mask is built.

B rows, L length of a row, T tokens kept, S keys of a row, Q sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    shape: tuple[int, int]  # B, L
    keys: int  # S: tokens before this forward and in it, padding included
    cu_q: Tensor | None = None  # int32 (Q + 1,); None: one sequence
    cu_k: Tensor | None = None  # the same for the keys
    kept_q: Tensor | None = None  # (T,) places of the tokens among B * L; None: all
    kept_k: Tensor | None = None  # the same among B * S

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (T, ...)."""
        return _take(x, self.kept_q)

    def pack_keys(self, x: Tensor) -> Tensor:
        """(B, S, ...) to the keys of all sequences, one after another."""
        return _take(x, self.kept_k)

    def restore(self, y_TD: Tensor) -> Tensor:
        """(T, D) to (B, L, D), zeros at the padding."""
        if self.kept_q is not None:
            places = self.shape[0] * self.shape[1]
            y_TD = y_TD.new_zeros(places, y_TD.shape[-1]).index_copy(0, self.kept_q, y_TD)
        return y_TD.view(*self.shape, -1)


def _take(x: Tensor, kept: Tensor | None) -> Tensor:
    flat = x.flatten(0, 1)
    return flat if kept is None else flat.index_select(0, kept)


def find_layout(
    shape: tuple[int, int], past: int, device: torch.device, cached: bool, arguments: Mapping[str, Any]
) -> Layout:
    """The layout of a forward of transformers' model.

    Args:
        shape: B, L of the new tokens.
        past: tokens of each row that came before, padding included.
        cached: states are taken from another forward or kept for one.
        arguments: the forward's: `attention_mask`, (B, past + L) of 0 and 1, or None; and where rows hold several
            documents `cu_seq_lens_q`, `seq_idx` or `position_ids`. As in transformers, position_ids say so only
            without a mask and a cache.

    Raises:
        ValueError: a mask of another form, or named documents together with a mask or a cache.
    """
    rows, length = shape
    mask_BS = arguments.get("attention_mask")
    documents = _documents(shape, device, arguments, alone=mask_BS is None and not cached)
    if documents is not None:
        return Layout(shape, length, documents, documents)
    keys = past + length
    if mask_BS is not None:
        if mask_BS.shape != (rows, keys):
            refuse("attention_mask", f"have shape {(rows, keys)}, past tokens and new", tuple(mask_BS.shape))
        mask_BS = mask_BS.to(device=device, dtype=torch.bool)
        if not mask_BS.all():
            cu_q, kept_q = _kept(mask_BS[:, past:])
            cu_k, kept_k = (cu_q, kept_q) if past == 0 else _kept(mask_BS)
            return Layout(shape, keys, cu_q, cu_k, kept_q, kept_k)
    if rows == 1:
        return Layout(shape, keys)
    begins_Q1 = torch.arange(rows + 1, dtype=torch.int32, device=device)
    cu_q = begins_Q1 * length
    return Layout(shape, keys, cu_q, cu_q if past == 0 else begins_Q1 * keys)


def _kept(mask_BL: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where each row begins among the places that are kept, and these; None where all are."""
    cu = F.pad(mask_BL.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    kept = mask_BL.flatten().nonzero()[:, 0]
    return cu, None if len(kept) == mask_BL.numel() else kept


def _documents(
    shape: tuple[int, int], device: torch.device, arguments: Mapping[str, Any], alone: bool
) -> Tensor | None:
    """cu_seqlens of the documents in the rows; None where each row is one sequence."""
    rows, length = shape
    named = [name for name in ("cu_seq_lens_q", "seq_idx") if arguments.get(name) is not None]
    if named and not alone:
        refuse(named[0], "come without attention_mask, cache and use_cache", "one of them")
    if "cu_seq_lens_q" in named:
        cu, cu_k = arguments["cu_seq_lens_q"], arguments.get("cu_seq_lens_k")
        if rows != 1:
            refuse("cu_seq_lens_q", "come with one row", f"{rows} rows")
        if cu_k is not None and not torch.equal(cu, cu_k):
            refuse("cu_seq_lens_k", "equal cu_seq_lens_q", "other values")
        return cu.to(device=device, dtype=torch.int32)
    ids = arguments.get(named[0] if named else "position_ids")
    if ids is None or not alone:
        return None
    if ids.dim() != 2 or ids.shape[0] not in (1, rows) or ids.shape[1] != length:
        refuse(named[0] if named else "position_ids", f"have shape {shape}", tuple(ids.shape))
    step = 0 if named else 1  # from a token to the next one of its document
    begins_BL = F.pad(ids.to(device).expand(rows, -1).diff() != step, (1, 0), value=True)
    begins = begins_BL.flatten().nonzero()[:, 0]
    return None if len(begins) == rows else F.pad(begins, (0, 1), value=rows * length).to(torch.int32)


def refuse(name: str, rule: str, got: object) -> NoReturn:
    raise ValueError(f"accelerated forward: {name} must {rule}, got {got}")

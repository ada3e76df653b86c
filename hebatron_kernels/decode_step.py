"""A whole model's next token in one call of the native CPU module: the bits of its layers' steps (step.py).

Q sequences, D width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from . import _native
from .step import AttentionStep, Step, contiguous, packed


class DecodeStep:
    """A model's next token: x = table[ids], x = layer(x) for each, hidden = rms_norm(x), logits = linear(hidden),
    widened to fp32.

    Args:
        table_VD: (V, D), the embeddings. layers: steps of its width and dtype, in their order.
        norm_D: (D,). head: packed (V, D).

    Called with ids_Q (Q,) int64 and, for each layer, the tensors its own step takes: conv_state and state, cache, or
    none; the block table and the lengths are every attention layer's. Returns hidden_QD and logits_QV, the latter in
    fp32. One sequence goes through all layers in one parallel region.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, layout or range.
    """

    op = "decode_step"

    def __init__(
        self, table_VD: Tensor, layers: Sequence[Step], norm_D: Tensor, head: Tensor, eps: float
    ) -> None:
        self._given = (table_VD, layers, norm_D, head, eps)
        V, D = table_VD.shape
        check.tensor(self.op, "norm_D", norm_D, D, dtypes=(torch.float32,))
        packed(self.op, table_VD.dtype, head=head)
        contiguous(self.op, table_VD=table_VD, norm_D=norm_D)
        for layer in layers:
            if (layer.width, layer.dtype) != (D, table_VD.dtype):
                wanted = f"have width {D} and dtype {table_VD.dtype}, as table_VD"
                check.refuse(self.op, "layers", wanted, (layer.width, layer.dtype))
        self.layers, self.dtype, self.entries, self.width = list(layers), table_VD.dtype, V, D
        self._fixed = {
            "width": D,
            "entries": V,
            "eps": eps,
            "dtype": _native.DTYPES[self.dtype],
            "table": table_VD.data_ptr(),
            "norm": norm_D.data_ptr(),
            "head": head.data_ptr(),
        }
        # what the kernel reads of the layers, and the states it was made for: the same from token to token
        self._seen: list[tuple[Any, int]] = []
        self._sequences, self._layers, self._address, self._blocks = -1, b"", 0, 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given

    def __call__(
        self, ids_Q: Tensor, states: Sequence[Tensor], block_table: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        check.tensor(self.op, "ids_Q", ids_Q, None, dtypes=(torch.int64,))
        Q = ids_Q.shape[0]
        same = len(states) == len(self._seen) and Q == self._sequences
        if not same or any(
            seen() is not state or address != state.data_ptr()
            for (seen, address), state in zip(self._seen, states)
        ):
            self._read(Q, states)
        if self._blocks:
            check.tensor(self.op, "block_table", block_table, Q, None, dtypes=(torch.int32,))
            check.tensor(self.op, "lengths", lengths, Q, dtypes=(torch.int32,))
        contiguous(self.op, ids_Q=ids_Q, block_table=block_table, lengths=lengths)
        hidden_QD = torch.empty(Q, self.width, dtype=self.dtype)
        logits_QV = torch.empty(Q, self.entries)
        _native.call(
            self.op,
            **self._fixed,
            count=len(self.layers),
            layers=self._address,
            rows=Q,
            blocks=self._blocks,
            max_blocks=0 if block_table is None else block_table.shape[1],
            ids=ids_Q,
            block_table=block_table,
            lengths=lengths,
            hidden=hidden_QD,
            logits=logits_QV,
        )
        _native.wrote(*states)
        return hidden_QD, logits_QV

    def _read(self, Q: int, states: Sequence[Tensor]) -> None:
        wanted = sum(layer.states for layer in self.layers)
        if len(states) != wanted:
            check.refuse(self.op, "states", f"be {wanted} tensors", len(states))
        given, left, self._blocks, self._seen = [], iter(states), 0, []
        for layer in self.layers:
            own = [next(left) for _ in range(layer.states)]
            if isinstance(layer, AttentionStep):
                if self._blocks not in (0, own[0].shape[1]):
                    check.refuse(self.op, "states", "hold caches of as many blocks each", own[0].shape[1])
                self._blocks = own[0].shape[1]
                own += [
                    torch.zeros(Q, 1, dtype=torch.int32),
                    torch.zeros(Q, dtype=torch.int32),
                ]  # each call's own
            given.append((layer.kind, layer.arguments(Q, *own) | {"x": None, "y": None}))
        assert _native.cpu_module is not None
        self._layers, self._address = _native.cpu_module.decode_layers(given)
        self._sequences, self._seen = Q, [(weakref.ref(state), state.data_ptr()) for state in states]

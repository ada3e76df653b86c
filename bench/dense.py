"""A dense transformer of a given shape with random weights, as fast as our operators make it: what the whole-model
benchmark on a GPU holds the experts' model against (gpu_model.py).

Norms with their residual, prefill attention (windows too) and decode attention over pages are ours; products, rotary
positions and the gated MLP are torch's. Two norms a layer and silu everywhere, as floors.py counts; what a family has
beyond that (Gemma's four norms, its norms of queries and keys) is left out, in the dense model's favour.

T tokens, D width, H heads, Hk key heads, P head dim, F MLP width, V vocabulary, Q sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from floors import Transformer
from torch import Tensor

from hebatron_kernels import attention_decode, attention_prefill, rms_norm

BLOCK_TOKENS = 64
MLP_TOKENS = 8192  # of a slice: all 65,536 at once would hold 9 GB of gates and ups in a model of 54 GB
ROPE_BASE = 1e6
EPS = 1e-6

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) to what is seen


@dataclass
class Layer:
    norm_D: Tensor
    qkv_MD: Tensor
    o_DM: Tensor
    mlp_norm_D: Tensor
    gate_up_MD: Tensor
    down_DF: Tensor
    window: int | None


class Pages:
    """Keys and values of `rows` sequences, (2, blocks, BLOCK_TOKENS, Hk, P) for each layer.

    A layer with a window keeps only the blocks it can still see, in a ring: block j of a sequence lies in place j %
    ring. Its attention is given those blocks alone, in order, and lengths counted from the first of them.
    """

    def __init__(self, t: Transformer, rows: int, tokens: int, like: Tensor) -> None:
        self.blocks = -(-tokens // BLOCK_TOKENS)
        self.ring = ring_blocks(t, tokens)
        places = [self.ring if windowed else self.blocks for windowed in _windowed(t)]
        self.layers = [like.new_empty(2, rows * n, BLOCK_TOKENS, t.kv_heads, t.head_dim) for n in places]
        all_blocks = torch.arange(rows * self.blocks, dtype=torch.int32, device=like.device)
        self.table = all_blocks.view(rows, self.blocks)
        self.places = torch.arange(self.ring, dtype=torch.int32, device=like.device)
        self.first_place_Q1 = self.ring * torch.arange(rows, dtype=torch.int32, device=like.device)[:, None]

    def write(self, layer: int, row: int, window: int | None, k_THP: Tensor, v_THP: Tensor) -> None:
        """The keys and values of a whole sequence, or of as much of it as the layer can still see."""
        tokens, blocks = len(k_THP), self.blocks if window is None else self.ring
        first = 0 if window is None else max(0, tokens - window)
        t = torch.arange(first, tokens, device=k_THP.device)
        slots_T = (row * blocks + t // BLOCK_TOKENS % blocks) * BLOCK_TOKENS + t % BLOCK_TOKENS
        slots = self.layers[layer].flatten(1, 2)
        slots[0].index_copy_(0, slots_T, k_THP[first:])
        slots[1].index_copy_(0, slots_T, v_THP[first:])

    def seen_by_window(self, lengths_Q: Tensor) -> tuple[Tensor, Tensor]:
        """The ring's blocks in order, and the lengths counted from the first of them."""
        first_Q1 = (lengths_Q // BLOCK_TOKENS - (self.ring - 1)).clamp(min=0)[:, None]
        table = (first_Q1 + self.places) % self.ring + self.first_place_Q1
        return table, lengths_Q - BLOCK_TOKENS * first_Q1[:, 0]


def ring_blocks(t: Transformer, tokens: int) -> int:
    """A window that begins in the middle of a block touches one more than it fills."""
    return min(-(-t.window // BLOCK_TOKENS) + 1, -(-tokens // BLOCK_TOKENS))


def _windowed(t: Transformer) -> list[bool]:
    return [n < t.windowed for n in range(t.layers)]


class Dense:
    """`t` with weights drawn on `device` in `dtype`, each where it stays: nothing else is allocated."""

    def __init__(
        self, t: Transformer, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        self.shape = t
        meta = torch.device(device).type == "meta"
        generator = torch.Generator("cpu" if meta else device).manual_seed(seed)

        def weight(outputs: int, inputs: int, scale: float = 1.0) -> Tensor:
            found = torch.empty(outputs, inputs, dtype=dtype, device=device)
            return found if found.is_meta else found.normal_(0.0, scale * inputs**-0.5, generator=generator)

        def ones() -> Tensor:
            return torch.ones(t.width, dtype=dtype, device=device)

        heads = (t.heads + 2 * t.kv_heads) * t.head_dim
        small = (2 * t.layers) ** -0.5  # of what is added to the stream: at its end the token still counts
        self.embeddings_VD = weight(t.vocab, t.width, t.width**0.5)  # of standard deviation 1
        self.layers = [
            Layer(
                ones(),
                weight(heads, t.width),
                weight(t.width, t.heads * t.head_dim, small),
                ones(),
                weight(2 * t.mlp, t.width),
                weight(t.width, t.mlp, small),
                t.window if windowed else None,
            )
            for windowed in _windowed(t)
        ]
        self.norm_D = ones()
        self.head_VD = self.embeddings_VD if t.tied else weight(t.vocab, t.width)
        self.rope: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.embeddings_VD.device

    def tensors(self) -> list[Tensor]:
        """Every weight once."""
        found = [self.embeddings_VD, self.norm_D] + ([] if self.shape.tied else [self.head_VD])
        return found + [w for layer in self.layers for w in vars(layer).values() if isinstance(w, Tensor)]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Dense:
        """A copy with the same weights there."""
        other = copy.copy(self)
        other.rope = None
        other.embeddings_VD, other.norm_D = (w.to(device, dtype) for w in (self.embeddings_VD, self.norm_D))
        other.head_VD = other.embeddings_VD if self.shape.tied else self.head_VD.to(device, dtype)
        other.layers = [
            replace(
                layer, **{n: w.to(device, dtype) for n, w in vars(layer).items() if isinstance(w, Tensor)}
            )
            for layer in self.layers
        ]
        return other

    def pages(self, rows: int, tokens: int) -> Pages:
        """Room for `rows` sequences of so many tokens; what is in it may be anything."""
        return Pages(self.shape, rows, tokens, self.embeddings_VD)

    def positions(self, tokens: int) -> None:
        """Makes the table of the rotary positions up to here; `prefill` and `decode` read it."""
        half = self.shape.head_dim // 2
        rates = ROPE_BASE ** -(torch.arange(half, dtype=torch.float64, device=self.device) / half)
        angle = torch.arange(tokens, dtype=torch.float64, device=self.device)[:, None] * rates
        dtype = self.embeddings_VD.dtype
        cos, sin = angle.cos().repeat(1, 2), angle.sin()
        # the first half of a rotated head is x1 cos - x2 sin, the second x2 cos + x1 sin: one roll and two products
        self.rope = cos.to(dtype)[:, None], torch.cat([-sin, sin], 1).to(dtype)[:, None]

    def prefill(self, ids_T: Tensor, pages: Pages | None = None, row: int = 0, last: int = 1) -> Tensor:
        """(last, V), the logits after each of the last of one sequence's tokens, in fp32 (fp64 of fp64 weights); its
        keys go into that row of the pages."""
        tokens = len(ids_T)
        cos, sin = (x[:tokens] for x in self._rope())

        def attend(n: int, q_THP: Tensor, k_THP: Tensor, v_THP: Tensor) -> Tensor:
            window = self.layers[n].window
            if pages is not None:
                pages.write(n, row, window, k_THP, v_THP)
            return attention_prefill(q_THP, k_THP, v_THP, window=window)

        return self._forward(ids_T, cos, sin, attend, last)

    def decode(self, ids_Q: Tensor, lengths_Q: Tensor, pages: Pages) -> Tensor:
        """(Q, V), the logits after one more token of every sequence: fixed launches, nothing read on the host.

        Args:
            lengths_Q: int32, tokens in the pages before this one.
        """
        cos, sin = (x.index_select(0, lengths_Q) for x in self._rope())
        recent, recent_lengths_Q = pages.seen_by_window(lengths_Q)

        def attend(n: int, q_QHP: Tensor, k_QHP: Tensor, v_QHP: Tensor) -> Tensor:
            window, kept = self.layers[n].window, pages.layers[n]
            if window is None:
                return attention_decode(q_QHP, k_QHP, v_QHP, kept, pages.table, lengths_Q)
            return attention_decode(q_QHP, k_QHP, v_QHP, kept, recent, recent_lengths_Q, window=window)

        return self._forward(ids_Q, cos, sin, attend, len(ids_Q))

    def _rope(self) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            raise ValueError("dense: positions must be made before the model runs, got none")
        return self.rope

    def _forward(self, ids_T: Tensor, cos: Tensor, sin: Tensor, attend: Attend, last: int) -> Tensor:
        t = self.shape
        x_TD = F.embedding(ids_T, self.embeddings_VD)
        stream_TD = torch.zeros_like(x_TD)
        rotated = (t.heads + t.kv_heads) * t.head_dim
        for n, layer in enumerate(self.layers):
            x_TD, stream_TD = rms_norm(x_TD, layer.norm_D, EPS, stream_TD)
            qkv_TM = F.linear(x_TD, layer.qkv_MD)
            qk_THP = rotate(qkv_TM[:, :rotated].unflatten(1, (-1, t.head_dim)), cos, sin)
            v_THP = qkv_TM[:, rotated:].unflatten(1, (-1, t.head_dim))
            y_THP = attend(n, qk_THP[:, : t.heads], qk_THP[:, t.heads :], v_THP)
            x_TD = F.linear(y_THP.flatten(1), layer.o_DM)
            x_TD, stream_TD = rms_norm(x_TD, layer.mlp_norm_D, EPS, stream_TD)
            x_TD = _mlp(layer, x_TD)
        x_TD, _ = rms_norm(x_TD[-last:], self.norm_D, EPS, stream_TD[-last:])
        logits_TV = F.linear(x_TD, self.head_VD)
        return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))


def rotate(x_THP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; `sin` is negative in its first half."""
    return torch.addcmul(x_THP * cos, x_THP.roll(x_THP.shape[-1] // 2, -1), sin)


def _mlp(layer: Layer, x_TD: Tensor) -> Tensor:
    """May write over x."""
    if len(x_TD) > MLP_TOKENS:
        for part_TD in x_TD.split(MLP_TOKENS):
            part_TD.copy_(_mlp(layer, part_TD))
        return x_TD
    gate_TF, up_TF = F.linear(x_TD, layer.gate_up_MD).chunk(2, 1)
    return F.linear(F.silu(gate_TF).mul_(up_TF), layer.down_DF)

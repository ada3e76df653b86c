"""What a sequence leaves behind for its next token: convolution and scan states, keys and values.

One row per sequence. States are replaced at each step; keys and values are appended to pages, which all attention
layers address by one block table. A row owns consecutive blocks, so the table is a plain numbering: the operators
take any table, and a shared pool can come later without touching them.

On a GPU a cache holds rows up to the next power of two, its bucket, and its tensors stay where they are as long as they
can: a CUDA graph (decoder.py) is bound to a number of rows and to addresses. `moves` counts how often they could not.

B rows, C convolution channels, W taps, H heads, P head dim, S state.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .config import ModelConfig

BLOCK_TOKENS = (
    64  # a page; small enough that a short row wastes little, large enough that the table stays short
)


NOTHING = torch.zeros(0, dtype=torch.int64)


def bucket_of(rows: int) -> int:
    """The rows of the graph that decodes `rows` rows: 1, 2, 4, 8, ..."""
    return 1 << (rows - 1).bit_length()


@lru_cache(maxsize=8)
def _numbering(rows: int, columns: int, device: torch.device) -> Tensor:
    """The same tensor from token to token."""
    with torch.inference_mode(False):
        return torch.arange(rows * columns, dtype=torch.int32, device=device).view(rows, columns)


@dataclass
class MambaState:
    """`conv`: (B, C, W - 1), the last inputs in the compute dtype. `ssm`: (B, H, P, S), fp32 or fp64."""

    conv: Tensor
    ssm: Tensor
    staged: tuple[Tensor, Tensor] | None = None

    def stage(self, conv: Tensor, ssm: Tensor) -> None:
        """Keep new states aside until the whole step has succeeded."""
        self.staged = (conv, ssm)


@dataclass(frozen=True)
class CacheStep:
    """One forward's view of a cache: where its new tokens go and which keys they see."""

    cache: Cache
    new_lengths: list[int]
    states: dict[int, MambaState]
    one_token: bool  # every row brings exactly one token: the operators that update in place serve it
    lengths: Tensor  # (B,) int32, before the step
    block_table: Tensor  # (B, blocks) int32
    cu_seqlens_q: Tensor  # this and what follows: empty where one_token
    cu_seqlens_k: Tensor
    slots_T: Tensor  # where the new tokens' keys go among all slots
    slots_S: Tensor  # where all keys of all rows are, row after row

    def mamba_state(self, layer: int) -> MambaState:
        return self.states[layer]

    def pages(self, layer: int) -> Tensor:
        return self.cache.pages[layer]

    def extend(self, layer: int, k_THP: Tensor, v_THP: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind the old ones and return all of them, packed by row. Until the step
        is committed the rows' lengths do not cover what is written here."""
        slots = self.cache.pages[layer].flatten(1, 2)
        slots[0, self.slots_T], slots[1, self.slots_T] = k_THP, v_THP
        return slots[0, self.slots_S], slots[1, self.slots_S]


class Cache:
    """States of `batch_size` sequences; see `Hebatron.new_cache`.

    An SSM state cannot be cut back to fewer tokens: take `snapshot()` before a step that may have to be undone, and
    `restore()` it after. A step that fails leaves the cache as it was, except that a one-token step which dies half
    way (out of memory, interrupt) has updated some layers in place: the next use then says so.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pad_rows: bool | None = None,
    ) -> None:
        """See `Hebatron.new_cache`; pad_rows: whether a bucket's rows are held, None: on a GPU."""
        if batch_size < 1:
            raise ValueError(f"cache: batch_size must be >= 1, got {batch_size}")
        if not 0 <= capacity <= config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(
                f"cache: capacity must be in [0, max_position_embeddings ({limit})], got {capacity}"
            )
        c = config
        self.config, self.dtype = config, dtype
        self.device = torch.empty(0, device=device).device  # "cuda" with its index, as tensors name it
        self.pad_rows = self.device.type == "cuda" if pad_rows is None else pad_rows
        self.lengths = [0] * batch_size
        self.broken = False
        self.moves = 0
        self.pages: dict[
            int, Tensor
        ] = {}  # (2, blocks, BLOCK_TOKENS, key heads, head dim) per attention layer
        self._held: dict[int, MambaState] = {}
        self._page_rows, self._blocks_per_row = batch_size, 0
        rows = self._rows_to_hold(batch_size)
        wide = torch.promote_types(dtype, torch.float32)
        for layer, kind in enumerate(c.layers_block_type):
            if kind == "mamba":
                conv = torch.zeros(rows, c.conv_dim, c.conv_kernel - 1, dtype=dtype, device=device)
                shape = (rows, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
                self._held[layer] = MambaState(conv, torch.zeros(shape, dtype=wide, device=device))
            elif kind == "attention":
                page = (BLOCK_TOKENS, c.num_key_value_heads, c.head_dim)
                blocks = self._spare_blocks(rows)
                self.pages[layer] = torch.zeros(2, blocks, *page, dtype=dtype, device=device)
        self.mamba = self.states(batch_size)  # of the rows in use
        self.reserve(capacity)
        self.moves = 0

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def block_table(self) -> Tensor:
        """(B, blocks per row) int32."""
        return _numbering(self.batch_size, self._blocks_per_row, self.device)

    @property
    def bytes_used(self) -> int:
        """Memory of everything held, reserved pages included."""
        states = [t for state in self._held.values() for t in (state.conv, state.ssm)]
        return sum(t.numel() * t.element_size() for t in [*states, *self.pages.values()])

    # ---- rows of a bucket

    @property
    def bucket(self) -> int:
        """The rows that decode together: those in use, and the padding up to the next power of two."""
        return self._rows_to_hold(self.batch_size)

    def states(self, rows: int) -> dict[int, MambaState]:
        """Views of the first rows held; those behind the batch are padding and hold anything."""
        return {n: MambaState(held.conv[:rows], held.ssm[:rows]) for n, held in self._held.items()}

    def bucket_layout(self) -> tuple[Tensor, Tensor]:
        """Block table (rows, blocks) and lengths (rows,) of a bucket, int32 on the CPU. Padding rows have a slot each
        in the spare blocks, and write it again at every step."""
        columns, padding = self._blocks_per_row, torch.arange(self.bucket - self.batch_size)
        own = torch.arange(self.batch_size * columns).view(-1, columns)
        spare = self._page_rows * columns + padding // BLOCK_TOKENS
        table = torch.cat([own, spare[:, None].expand(-1, columns)])
        lengths = torch.cat([torch.tensor(self.lengths), padding % BLOCK_TOKENS])
        return table.int(), lengths.int()

    def _rows_to_hold(self, rows: int) -> int:
        return bucket_of(rows) if self.pad_rows else rows

    def _spare_blocks(self, rows: int) -> int:
        """A slot for each row of padding: fewer than half of a bucket's."""
        return -(-rows // (2 * BLOCK_TOKENS)) if self.pad_rows else 0

    # ---- a step

    def check_fits(self, config: ModelConfig, device: torch.device, new_lengths: list[int]) -> None:
        """Refuse a step this cache cannot take, before anything is touched."""
        if config is not self.config and config != self.config:  # field by field it takes 25 us
            raise ValueError("cache: config must equal the model's, got a cache made for another model")
        if device != self.device:
            raise ValueError(f"cache: device must equal the model's ({device}), got {self.device}")
        if self.broken:
            raise ValueError(
                "cache: states must be whole, got a cache whose last step died half way; restore one"
            )
        if len(new_lengths) != self.batch_size:
            raise ValueError(
                f"cache: batch_size must equal the rows given ({len(new_lengths)}), got {self.batch_size}"
            )
        longest = max(old + new for old, new in zip(self.lengths, new_lengths))
        limit = self.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"cache: a row must stay within max_position_embeddings ({limit}), got {longest} tokens"
            )

    def make_room(self, new_lengths: list[int], dtype: torch.dtype) -> list[int]:
        """The rows' lengths after the step, for which pages are there now."""
        if dtype != self.dtype:
            raise ValueError(f"cache: dtype must equal the model's compute_dtype ({dtype}), got {self.dtype}")
        totals = [old + new for old, new in zip(self.lengths, new_lengths)]
        self.reserve(max(totals))
        for state in self.mamba.values():
            state.staged = None  # left by a step that failed
        return totals

    def begin(self, new_lengths: list[int], dtype: torch.dtype) -> CacheStep:
        """Make room and work out where the new tokens of each row go."""
        totals = self.make_room(new_lengths, dtype)
        one_token = all(n == 1 for n in new_lengths)
        self.broken = one_token
        # once a token, while DRAM is idle: half the time of torch.tensor
        lengths = torch.frombuffer(array("i", self.lengths), dtype=torch.int32)
        if self.device.type != "cpu":
            lengths = lengths.to(self.device)
        if one_token:  # at every step of decoding: nothing is made that is not needed
            return CacheStep(self, new_lengths, self.mamba, True, lengths, self.block_table, *[NOTHING] * 4)
        spans = zip(range(self.batch_size), self.lengths, totals)
        row_slots = self._blocks_per_row * BLOCK_TOKENS
        slots_T: list[Tensor] = []
        slots_S: list[Tensor] = []
        if self.pages:
            for row, old, total in spans:
                slots_T.append(torch.arange(row * row_slots + old, row * row_slots + total))
                slots_S.append(torch.arange(row * row_slots, row * row_slots + total))
        return CacheStep(
            cache=self,
            new_lengths=new_lengths,
            states=self.mamba,
            one_token=False,
            lengths=lengths,
            block_table=self.block_table,
            cu_seqlens_q=self._ends(new_lengths),
            cu_seqlens_k=self._ends(totals),
            slots_T=torch.cat(slots_T).to(self.device) if slots_T else NOTHING,
            slots_S=torch.cat(slots_S).to(self.device) if slots_S else NOTHING,
        )

    def commit(self, step: CacheStep) -> None:
        """Every layer has done its part: take the staged states over and advance the lengths."""
        for state in self.mamba.values():
            if state.staged is not None:
                conv, ssm = state.staged
                state.conv.copy_(conv)
                state.ssm.copy_(ssm)
                state.staged = None
        self.advance(step.new_lengths)

    def advance(self, new_lengths: list[int]) -> None:
        """The rows hold so many tokens more."""
        self.lengths = [old + new for old, new in zip(self.lengths, new_lengths)]
        self.broken = False

    # ---- whole caches

    def snapshot(self) -> Cache:
        """An independent copy; `restore()` it, or go on from it separately."""
        if self.broken:
            raise ValueError(
                "cache: states must be whole, got a cache whose last step died half way; restore one"
            )
        twin = object.__new__(Cache)
        twin.config, twin.dtype, twin.device = self.config, self.dtype, self.device
        twin.pad_rows, twin.lengths, twin.broken, twin.moves = self.pad_rows, list(self.lengths), False, 0
        twin._page_rows, twin._blocks_per_row = self._page_rows, self._blocks_per_row
        twin._held = {n: MambaState(held.conv.clone(), held.ssm.clone()) for n, held in self._held.items()}
        twin.mamba = twin.states(twin.batch_size)
        twin.pages = {n: pages.clone() for n, pages in self.pages.items()}
        return twin

    copy = snapshot

    def restore(self, snapshot: Cache) -> None:
        """Go back to what `snapshot` holds; it stays usable."""
        if snapshot.config != self.config or snapshot.dtype != self.dtype or snapshot.device != self.device:
            raise ValueError("cache: snapshot must come from a cache of the same model, got another's")
        twin = snapshot.snapshot()
        self.pad_rows, self.lengths, self.broken = twin.pad_rows, twin.lengths, False
        self._page_rows, self._blocks_per_row = twin._page_rows, twin._blocks_per_row
        self._held, self.mamba, self.pages = twin._held, twin.mamba, twin.pages
        self.moves += 1

    def reorder(self, indices: list[int]) -> None:
        """Row i becomes what row indices[i] was; rows may repeat or go, so the batch may change its size. Where a
        bucket's rows are held, a batch that does not grow stays in place, and so keeps the memory of rows that go."""
        wrong = [i for i in indices if not 0 <= i < self.batch_size]
        if wrong or not indices:
            raise ValueError(
                f"cache: indices must name rows in [0, {self.batch_size}), got {wrong or indices}"
            )
        rows, count = torch.tensor(indices, device=self.device), len(indices)
        columns, in_place = self._blocks_per_row, self.pad_rows and count <= self._page_rows
        by_row = {n: self._by_row(pages) for n, pages in self.pages.items()}
        if in_place:
            for held in self._held.values():
                held.conv[:count], held.ssm[:count] = held.conv[rows], held.ssm[rows]
            for pages in by_row.values():
                pages[:, :count] = pages[:, rows]
        else:
            held_rows = self._rows_to_hold(count)
            for held in self._held.values():
                held.conv, held.ssm = (_longer(t[rows], 0, held_rows) for t in (held.conv, held.ssm))
            blocks = count * columns + self._spare_blocks(held_rows)
            self.pages = {n: _longer(p[:, rows].flatten(1, 2), 1, blocks) for n, p in by_row.items()}
            self._page_rows, self.moves = count, self.moves + 1
        self.lengths = [self.lengths[i] for i in indices]
        self.mamba = self.states(count)

    def cut(self, length: int) -> None:
        """Shorten every row to at most `length` tokens. Only keys and values can be cut; a model with Mamba layers
        needs a snapshot taken at that length."""
        if length < 0:
            raise ValueError(f"cache: length must be >= 0, got {length}")
        longest = max(self.lengths)
        if length < longest and self.mamba:
            raise ValueError(
                f"cache: length must be >= {longest}, got {length}: a scan state cannot be cut back, restore a snapshot"
            )
        self.lengths = [min(n, length) for n in self.lengths]

    def reserve(self, tokens: int) -> None:
        """At least `tokens` slots a row; doubled, so that n single steps copy O(n) tokens in all."""
        needed = -(-tokens // BLOCK_TOKENS)
        if needed <= self._blocks_per_row or not self.pages:
            return
        old, rows = self._blocks_per_row, self._page_rows
        most = -(-self.config.max_position_embeddings // BLOCK_TOKENS)
        columns = max(needed, min(2 * old, most))
        grown: dict[int, Tensor] = {}
        for layer, pages in self.pages.items():
            blocks = rows * columns + self._spare_blocks(self._rows_to_hold(rows))
            grown[layer] = pages.new_zeros(2, blocks, *pages.shape[2:])
            wider = grown[layer][:, : rows * columns].unflatten(1, (rows, columns))
            wider[:, :, :old] = self._by_row(pages)
        self.pages, self._blocks_per_row = grown, columns
        self.moves += 1

    def _by_row(self, pages: Tensor) -> Tensor:
        """(2, rows, blocks of a row, ...): a view, without the spare blocks."""
        rows, columns = self._page_rows, self._blocks_per_row
        return pages[:, : rows * columns].unflatten(1, (rows, columns))

    def _ends(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device=self.device, dtype=torch.int32)


def _longer(value: Tensor, dim: int, length: int) -> Tensor:
    """Zeros behind it up to `length`."""
    shape = list(value.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([value, value.new_zeros(shape)], dim) if shape[dim] else value

"""Texts that go on from texts: many prompts at once, ended by a token, a stop string or a number of tokens.

A prompt's continuation does not depend on its neighbours: rows are isolated, each draws from a generator of its own,
and a row that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import Cache
from ..decoder import one_more_token
from ..generate import check_sampling, choose, last_logits
from ..model import Hebatron
from ..tokenizer import Tokenizer
from .evaluate import evaluating
from .scoring import empty_context

MAX_ROWS = 64  # sequences held at once: the hub's 30B model keeps 48 MB of states for each


class Completion(NamedTuple):
    text: str  # before the stop string or the end token
    ended: bool  # by one of these, and not by max_new_tokens
    cut: bool  # the prompt was too long for the model and lost its beginning


class TextStream:
    """Tokens in, text out as soon as it is certain: a character cut in two is held back until its last byte."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self._given: list[
            int
        ] = []  # whose text is out; a decoder may treat the first token of a text differently
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes; "" while a character is cut."""
        self._held.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self._given, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What is still held; bytes that never became a character are U+FFFD."""
        text = self._new_text() if self._held else ""
        self._given, self._held = self._held, []
        return text

    def _new_text(self) -> str:
        given = self.tokenizer.decode(self._given, skip_special=self.skip_special)
        return self.tokenizer.decode(self._given + self._held, skip_special=self.skip_special)[len(given) :]


class _Row:
    """One prompt on its way."""

    def __init__(self, index: int, ids: list[int], cut: bool, tokenizer: Tokenizer, seed: int) -> None:
        self.index, self.ids, self.cut = index, ids, cut
        self.stream, self.generator = TextStream(tokenizer), torch.Generator().manual_seed(seed)
        self.text, self.ended = "", False

    def add(self, token: int, ends: frozenset[int], stop: Sequence[str]) -> None:
        self.ended = token in ends
        self.text += self.stream.finish() if self.ended else self.stream.add(token)
        places = [place for place in (self.text.find(text) for text in stop) if place >= 0]
        if places:
            self.stream.finish()
            self.text, self.ended = self.text[: min(places)], True


def complete(
    model: Hebatron,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    ends: Sequence[int] = (),
    special: bool = False,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> list[Completion]:
    """Each prompt's continuation.

    Args:
        max_new_tokens: >= 1. A prompt that leaves no room for them in the model's context loses its beginning.
        stop: texts that end a continuation and are not part of it.
        ends: tokens that do so, beside the config's eos tokens.
        special: read control tokens spelt out in the prompts as such: prompts that a chat template rendered.
        temperature, top_k, top_p, seed: as in `generate`; 0 takes the likeliest token.
        batch_tokens: of prompts prefilled in one forward; a longer prompt is a forward of its own.
    Raises: ValueError for an empty stop string, or arguments out of range.
    """
    if not 1 <= max_new_tokens < model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise ValueError(
            f"complete: max_new_tokens must be at least 1 and below max_position_embeddings ({limit}), "
            f"got {max_new_tokens}"
        )
    if not all(stop):
        raise ValueError(f"complete: stop must hold no empty text, got {list(stop)}")
    room = model.config.max_position_embeddings - max_new_tokens
    rows = []
    for i, ids in enumerate(tokenizer.encode_batch(prompts, special=special)):
        kept = ids[-room:] or [empty_context(tokenizer)]
        rows.append(_Row(i, kept, len(ids) > room, tokenizer, seed))
    choosing = (temperature, top_k, top_p)
    check_sampling(model.config.vocab_size, max_new_tokens, *choosing)
    all_ends = frozenset((*model.config.eos_token_ids, *ends))
    with evaluating(model):
        for batch in _batches(sorted(rows, key=lambda row: len(row.ids)), batch_tokens):
            _continue(model, batch, max_new_tokens, choosing, all_ends, stop)
    return [Completion(row.text + row.stream.finish(), row.ended, row.cut) for row in rows]


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    tokens = 0
    for row in rows:
        tokens += len(row.ids)
        if batch and (tokens > batch_tokens or len(batch) == MAX_ROWS):
            yield batch
            batch, tokens = [], len(row.ids)
        batch.append(row)
    if batch:
        yield batch


def _continue(
    model: Hebatron,
    rows: list[_Row],
    max_new_tokens: int,
    choosing: tuple[float, int | None, float | None],
    ends: frozenset[int],
    stop: Sequence[str],
) -> None:
    cache = model.new_cache(len(rows), max(len(row.ids) for row in rows) + max_new_tokens)
    decode = one_more_token(model, cache)
    logits = _feed(model, cache, [row.ids for row in rows])
    for count in range(max_new_tokens):
        logits_BV = last_logits(logits)
        chosen_B = choose(logits_BV, *choosing, [row.generator for row in rows])
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            row.add(token, ends, stop)
        staying = [i for i, row in enumerate(rows) if not row.ended]
        if not staying or count + 1 == max_new_tokens:
            return
        if len(staying) < len(rows):
            cache.reorder(staying)
        rows = [rows[i] for i in staying]
        logits = decode(chosen_B[staying])


def _feed(model: Hebatron, cache: Cache, new: Sequence[Sequence[int]]) -> Tensor | None:
    """Logits (Q, 1, V) behind each row's new tokens."""
    ends_Q1 = torch.tensor([0, *map(len, new)]).cumsum(0).to(torch.int32)
    ids_T = torch.tensor([token for row in new for token in row])
    return model(
        ids_T.to(model.device), cu_seqlens=ends_Q1.to(model.device), cache=cache, logits_to_keep=1
    ).logits

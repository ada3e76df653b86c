"""Multiple choice by likelihood: how probable a model finds each choice behind its context.

    result = multiple_choice(model, tokenizer, [Item("בירת ישראל היא", [" ירושלים", " חיפה"], gold=0)])
    result.accuracy["acc"], result.accuracy["acc_norm"]

The rule at the boundary: a choice's tokens are those of encode(context + choice) behind the longest beginning that
they share with encode(context). So a space that the tokenizer joins to the word after it counts with the choice, on
whichever side it was written, and where a token spans the boundary all of it does. The tokens before them are given
and are not scored. Where nothing is before them (an empty context), the tokenizer's begin-of-text token, or for want
of one its end-of-text token, is put there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import Cache
from ..model import Hebatron
from ..tokenizer import Tokenizer
from .evaluate import evaluating

BLOCK_ITEMS = (
    128  # encoded at a time: 25 examples make a context of 3,000 tokens, four choices four copies of it
)
SHARED_TOKENS = 128  # a common beginning of at least so many tokens, half of each sequence, is read once
MAX_SHARING = (
    64  # sequences that go on from one beginning at a time: the hub's 30B model has 48 MB of states for each
)
MAX_LOGIT_ROWS = 1024  # of one forward: 0.5 GB in fp32 with the hub's vocabulary of 131,072


class Item(NamedTuple):
    """One question: text that is given, texts to choose among, and which is right. A plain tuple will do."""

    context: str
    choices: Sequence[str]
    gold: int


class Continuation(NamedTuple):
    """What a model makes of one choice."""

    log_prob: float  # nats, summed over its tokens
    tokens: int
    greedy: bool  # whether each of its tokens was the likeliest
    cut: bool  # the context was too long for the model and lost its beginning


class Estimate(NamedTuple):
    """A mean over items, and its standard error: sample deviation / sqrt(items); None for a single item."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class MultipleChoice:
    """accuracy: for each of NORMS, the share of items whose right choice has the highest score.

    chance: what guessing would get. cut: items whose context lost its beginning. scores: of each item's choices.
    """

    accuracy: dict[str, Estimate]
    chance: float
    cut: int
    scores: list[list[Continuation]]


# What a choice's log-probability is divided by. Names as in lm-eval, which counts characters for acc_norm; white
# space around a choice is not counted (lm-eval writes it into the template and does not count it either).
NORMS: dict[str, Callable[[str, Continuation], float]] = {
    "acc": lambda choice, scored: 1.0,
    "acc_norm": lambda choice, scored: len(choice.strip()),
    "acc_bytes": lambda choice, scored: len(choice.strip().encode()),
    "acc_tokens": lambda choice, scored: scored.tokens,
}


def multiple_choice(
    model: Hebatron,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    batch_tokens: int = 8192,
    special: bool = False,
) -> MultipleChoice:
    """Accuracy of choosing the likeliest choice, the first of equals; arguments as in `score_items`.

    Raises: ValueError for no items, fewer than two choices, a gold that names none, or a choice of white space.
    """
    items = [Item(*item) for item in items]
    if not items:
        raise ValueError("multiple_choice: items must hold at least one, got none")
    for i, item in enumerate(items):
        if len(item.choices) < 2 or not all(choice.strip() for choice in item.choices):
            raise ValueError(
                f"multiple_choice: items[{i}] must have two choices or more, none of them blank, "
                f"got {list(item.choices)!r:.80}"
            )
        if not 0 <= item.gold < len(item.choices):
            raise ValueError(
                f"multiple_choice: items[{i}] must have a gold in [0, {len(item.choices)}), got {item.gold}"
            )
    scores = score_items(
        model,
        tokenizer,
        [(item.context, item.choices) for item in items],
        batch_tokens=batch_tokens,
        special=special,
    )
    accuracy = {}
    for name, norm in NORMS.items():
        right = []
        for item, scored in zip(items, scores, strict=True):
            values = [one.log_prob / norm(choice, one) for choice, one in zip(item.choices, scored)]
            right.append(float(values.index(max(values)) == item.gold))
        accuracy[name] = estimate(right)
    chance = sum(1 / len(item.choices) for item in items) / len(items)
    return MultipleChoice(accuracy, chance, sum(any(one.cut for one in row) for row in scores), scores)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of at least one value."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return Estimate(mean, None)
    return Estimate(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n))


def score_choices(
    model: Hebatron, tokenizer: Tokenizer, items: Sequence[tuple[str, Sequence[str]] | Item]
) -> list[list[float]]:
    """The log-probability in nats of each item's choices behind its context."""
    scored = score_items(model, tokenizer, [(item[0], item[1]) for item in items])
    return [[one.log_prob for one in row] for row in scored]


def score_items(
    model: Hebatron,
    tokenizer: Tokenizer,
    items: Sequence[tuple[str, Sequence[str]]],
    *,
    batch_tokens: int = 8192,
    special: bool = False,
) -> list[list[Continuation]]:
    """What the model makes of each (context, choices): many choices packed into one forward, isolated.

    The result does not depend on which share a forward. Choices that differ in their last token only are one
    sequence; a long common beginning (worked examples, a passage) is read once and its states are gone on from.
    A context that is too long for the model loses its beginning.

    Args:
        batch_tokens: of one forward; a longer sequence is a forward of its own.
        special: read control tokens spelt out in the texts as such: contexts that a chat template rendered.
    Returns: one list an item, one entry a choice. The model is left as it was found.
    Raises: ValueError for an empty choice, or one that is too long for the model.
    """
    if batch_tokens < 1:
        raise ValueError(f"score_items: batch_tokens must be >= 1, got {batch_tokens}")
    longest = model.config.max_position_embeddings
    results: list[list[Continuation]] = []
    waiting = iter(items)
    with evaluating(model):
        while block := list(islice(waiting, BLOCK_ITEMS)):
            pairs = _encode_items(tokenizer, block, special, first=len(results))
            scored = score_pairs(model, pairs, longest, batch_tokens)
            results += [list(islice(scored, len(choices))) for _, choices in block]
    return results


class Pair(NamedTuple):
    """Tokens, the first of which are given: `ids[start:]` is scored, and start is at least 1."""

    ids: list[int]
    start: int


def _encode_items(
    tokenizer: Tokenizer, items: Sequence[tuple[str, Sequence[str]]], special: bool, first: int
) -> list[Pair]:
    contexts = tokenizer.encode_batch([context for context, _ in items], special=special)
    wholes = tokenizer.encode_batch(
        [context + choice for context, choices in items for choice in choices], special=special
    )
    whole = iter(wholes)
    pairs = []
    for i, ((_, choices), context_ids) in enumerate(zip(items, contexts, strict=True), first):
        for choice in choices:
            pair = join(tokenizer, context_ids, next(whole))
            if pair.start == len(pair.ids):
                raise ValueError(f"score_items: a choice must add a token, got {choice!r} in items[{i}]")
            pairs.append(pair)
    return pairs


def join(tokenizer: Tokenizer, context_ids: Sequence[int], whole_ids: Sequence[int]) -> Pair:
    """encode(context) and encode(context + choice) under the rule above."""
    start = 0
    for ours, theirs in zip(context_ids, whole_ids):
        if ours != theirs:
            break
        start += 1
    if start == 0:
        return Pair([empty_context(tokenizer), *whole_ids], 1)
    return Pair(list(whole_ids), start)


def empty_context(tokenizer: Tokenizer) -> int:
    """The token before a text that nothing comes before."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


class _Row(NamedTuple):
    """One sequence of a forward: its tokens, and by the number of its pair the tokens to predict at its end."""

    ids: tuple[int, ...]
    targets: dict[int, list[int]]

    @property
    def kept(self) -> int:
        return max(map(len, self.targets.values()))


def score_pairs(
    model: Hebatron, pairs: Sequence[Pair], longest: int, batch_tokens: int
) -> Iterator[Continuation]:
    """Each pair's continuation, in order; contexts are cut so that no sequence has more than `longest` inputs."""
    rows: dict[tuple[int, ...], _Row] = {}
    cut = []
    for i, (ids, start) in enumerate(pairs):
        targets, inputs = ids[start:], ids[:-1]
        if len(targets) > longest:
            raise ValueError(
                f"score_pairs: a choice must have at most max_position_embeddings ({longest}) tokens, "
                f"got {len(targets)}"
            )
        cut.append(len(inputs) > longest)
        key = tuple(inputs[-longest:])
        rows.setdefault(key, _Row(key, {})).targets[i] = targets
    scored: dict[int, tuple[float, bool]] = {}
    for shared, group in _groups(list(rows.values())):
        cache = None if shared == 0 else _read(model, group[0].ids[:shared])
        # like lengths together: the logits of a forward are as many for each sequence
        group.sort(key=lambda row: (row.kept, len(row.ids)))
        for batch in _batches(group, shared, batch_tokens):
            scored |= _forward(model, batch, shared, cache)
    for i, pair in enumerate(pairs):
        log_prob, greedy = scored[i]
        yield Continuation(log_prob, len(pair.ids) - pair.start, greedy, cut[i])


def _groups(rows: list[_Row]) -> Iterator[tuple[int, list[_Row]]]:
    """(tokens of a common beginning, the sequences that have it); all that share none with number 0."""
    alone: list[_Row] = []
    group: list[_Row] = []
    shared = 0
    for row in sorted(rows, key=lambda row: row.ids):
        common = 0
        if group:
            most = min(shared, len(row.ids) - row.kept)
            common = next((i for i in range(most) if group[0].ids[i] != row.ids[i]), most)
        if common >= max(SHARED_TOKENS, len(row.ids) // 2):
            group.append(row)
            shared = common
            continue
        if len(group) > 1:
            yield shared, group
        else:
            alone += group
        group, shared = [row], len(row.ids) - row.kept
    if len(group) > 1:
        yield shared, group
    else:
        alone += group
    yield 0, alone


def _read(model: Hebatron, ids: Sequence[int]) -> Cache:
    cache = model.new_cache(1, len(ids))
    model(torch.tensor([ids], device=model.device), cache=cache, logits_to_keep=1)
    return cache


def _batches(rows: Sequence[_Row], shared: int, batch_tokens: int) -> Iterator[list[_Row]]:
    """Runs of `rows`, whose `kept` rises, within all limits; at least one row each."""
    batch: list[_Row] = []
    tokens = 0
    for row in rows:
        tokens += len(row.ids) - shared
        full = tokens > batch_tokens or (len(batch) + 1) * row.kept > MAX_LOGIT_ROWS
        if batch and (full or (shared and len(batch) == MAX_SHARING)):
            yield batch
            batch, tokens = [], len(row.ids) - shared
        batch.append(row)
    if batch:
        yield batch


def _forward(
    model: Hebatron, batch: Sequence[_Row], shared: int, cache: Cache | None
) -> dict[int, tuple[float, bool]]:
    """By the number of its pair, each continuation's log-probability and whether it is the greedy one."""
    if cache is not None:
        cache = cache.snapshot()
        cache.reorder([0] * len(batch))
    ends = torch.tensor([0, *(len(row.ids) - shared for row in batch)]).cumsum(0).to(torch.int32)
    ids_T = torch.tensor([token for row in batch for token in row.ids[shared:]])
    kept = max(row.kept for row in batch)
    output = model(ids_T.to(model.device), cu_seqlens=ends.to(model.device), cache=cache, logits_to_keep=kept)
    logits_QNV: Tensor = output.logits
    if not bool(torch.isfinite(logits_QNV).all()):
        raise ValueError("score_pairs: logits must be finite, got inf or NaN; the weights are broken")
    norm_QN, best_QN = logits_QNV.logsumexp(-1).double(), logits_QNV.argmax(-1)
    scored = {}
    for q, row in enumerate(batch):
        for i, targets in row.targets.items():
            n = len(targets)
            target_n1 = torch.tensor(targets, device=logits_QNV.device)[:, None]
            chosen_n = logits_QNV[q, -n:].gather(-1, target_n1)[:, 0].double()
            log_prob = float((chosen_n - norm_QN[q, -n:]).sum())
            scored[i] = log_prob, bool((best_QN[q, -n:] == target_n1[:, 0]).all())
    return scored

"""Sampling from a model: greedy, temperature, top-k, top-p, one generator per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from .decoder import one_more_token

if TYPE_CHECKING:
    from .model import Hebatron


@torch.no_grad()
def generate(
    model: Hebatron,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """Continue prompts. On a GPU a token is one CUDA graph where the backend's forms allow it (`Decoder`).

    Args:
        model: any `Hebatron`; its mode and parameters are left alone.
        input_ids: (B, L) prompts, padded on either side.
        attention_mask: (B, L), 0 at the padding; None: no padding.
        max_new_tokens: >= 0.
        temperature: 0 takes the likeliest token; above 0 the logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest only.
        top_p: draw among the likeliest tokens whose probabilities reach p together.
        eos_token_id: token or tokens that end a row; None: the config's. An empty sequence: nothing ends a row.
        seed: of each row's own generator. One number serves every row, so that a row gets the same tokens whatever
            its neighbours; give a list to draw different continuations of equal prompts.

    Returns:
        (B, L + N) int64, N <= max_new_tokens: the prompts as they came, then the new tokens from column L on whatever
        the padding side. After a row's end token comes padding; N is where the last row ended.

    Raises:
        ValueError: an argument is out of range, a prompt is empty, or prompt and new tokens exceed the context.
    """
    c = model.config
    check_sampling(c.vocab_size, max_new_tokens, temperature, top_k, top_p)
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"generate: input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"generate: input_ids must be (B, L) with a token in every row, got {tuple(input_ids.shape)}"
        )
    rows, longest = input_ids.shape
    ends = _end_tokens(c.eos_token_ids if eos_token_id is None else eos_token_id, c.vocab_size)
    seeds = _seeds(seed, rows)
    if isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
        lengths = attention_mask.bool().sum(1)
        longest = int(lengths.max())
        if int(lengths.min()) == 0:
            raise ValueError(
                f"generate: every prompt must have a token, got none in row {int(lengths.argmin())}"
            )
    if longest + max_new_tokens > c.max_position_embeddings:
        raise ValueError(
            f"generate: prompt and max_new_tokens must stay within max_position_embeddings "
            f"({c.max_position_embeddings}), got {longest} + {max_new_tokens}"
        )

    generators = [torch.Generator().manual_seed(s) for s in seeds]
    cache = model.new_cache(rows, longest + max_new_tokens)
    decode = one_more_token(model, cache)
    end_tokens = torch.tensor(ends, dtype=torch.int64, device=input_ids.device)
    padding = c.pad_token_id if c.pad_token_id is not None else (ends[0] if ends else 0)
    done_B = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
    columns = [input_ids.long()]
    # for no new tokens too: it checks the prompt
    logits_BV = last_logits(model(input_ids, attention_mask, cache=cache, logits_to_keep=1).logits)
    for count in range(max_new_tokens):
        next_B = choose(logits_BV, temperature, top_k, top_p, generators).masked_fill(done_B, padding)
        columns.append(next_B[:, None])
        done_B = done_B | torch.isin(next_B, end_tokens)
        if count + 1 == max_new_tokens or bool(done_B.all()):
            break
        logits_BV = last_logits(decode(next_B))
    return torch.cat(columns, dim=1)


def choose(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """One token per row. Each row takes one uniform number from its own CPU generator, and the token is where the
    summed probabilities, likeliest first, pass it: the same on every device and beside any neighbours."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.double()
    below_BV = logits_BV - logits_BV.amax(-1, keepdim=True)  # at most 0: no temperature overflows to +inf
    ranked_BV, tokens_BV = torch.sort(below_BV / temperature, dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked_BV, tokens_BV = ranked_BV[:, :top_k], tokens_BV[:, :top_k]
    probabilities_BV = torch.softmax(ranked_BV, -1)
    reached_BV = probabilities_BV.cumsum(-1)
    if top_p is not None:  # a token stays if those before it have not reached p
        probabilities_BV = probabilities_BV.masked_fill(reached_BV - probabilities_BV >= top_p, 0.0)
        reached_BV = probabilities_BV.cumsum(-1)
    drawn = [torch.rand((), generator=g, dtype=torch.float64) for g in generators]
    drawn_B1 = torch.stack(drawn).to(logits_BV.device)[:, None] * reached_BV[:, -1:]
    place_B1 = (reached_BV <= drawn_B1).sum(-1, keepdim=True).clamp(max=tokens_BV.shape[1] - 1)
    return tokens_BV.gather(1, place_B1)[:, 0]


def last_logits(logits_B1V: Tensor | None) -> Tensor:
    """(B, 1, V) to (B, V); a broken model is told from a quiet one."""
    if logits_B1V is None or not bool(torch.isfinite(logits_B1V).all()):
        raise ValueError("generate: logits must be finite, got inf or NaN; the weights are broken")
    return logits_B1V[:, -1]


def _end_tokens(eos: int | Sequence[int], vocab_size: int) -> list[int]:
    ends = _listed(eos, 1)
    for token in ends:
        if not (_is_integer(token) and 0 <= token < vocab_size):
            raise ValueError(f"generate: eos_token_id must be in [0, {vocab_size}), got {token!r}")
    return ends


def _seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    seeds = _listed(seed, rows)
    if len(seeds) != rows:
        raise ValueError(f"generate: seed must be one number or one per row ({rows}), got {len(seeds)}")
    for number in seeds:
        if not (_is_integer(number) and 0 <= number < 2**63):
            raise ValueError(f"generate: seed must be an integer in [0, 2**63), got {number!r}")
    return seeds


def _listed(value: int | Sequence[int], times: int) -> list[int]:
    """A sequence as a list, anything else repeated; whether these are integers is the caller's to check."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * times


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float) or _is_integer(value)


def check_sampling(
    vocab_size: int, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raises ValueError for what `choose` cannot work with."""
    if not (_is_integer(max_new_tokens) and max_new_tokens >= 0):
        raise ValueError(f"generate: max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
    if not (_is_number(temperature) and 0 <= temperature < math.inf):
        raise ValueError(f"generate: temperature must be finite and >= 0, got {temperature!r}")
    if top_k is not None and not (_is_integer(top_k) and 1 <= top_k <= vocab_size):
        raise ValueError(f"generate: top_k must be an integer in [1, {vocab_size}], got {top_k!r}")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p!r}")

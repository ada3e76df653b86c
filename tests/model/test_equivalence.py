"""One table: however the same tokens come in, the logits are the same.

Whole rows, chunks of any size, one token at a time, padded on either side, packed with others: each form is run on
each model and compared with every sequence alone and in one go. Tolerance 1e-5 of the largest logit, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_cases import make_model, random_config, relative
from torch import Tensor

from hebatron import Hebatron, ModelConfig, presets

LENGTHS = [37, 5, 18, 1]  # two chunks and a tail, less than one chunk, a tail of two, a single token
LONGEST = max(LENGTHS)

MODELS: dict[str, ModelConfig] = {
    "hybrid": presets.tiny(),
    "deep": presets.tiny().replace(
        layers_block_type=("mamba", "attention", "moe", "mamba", "attention", "mamba")
    ),
    "pure-mamba": presets.tiny().replace(layers_block_type=("mamba", "mamba")),
    "pure-attention": presets.tiny().replace(layers_block_type=("attention", "attention", "moe")),
    "latent-grouped": random_config(3).replace(
        layers_block_type=("moe", "mamba", "attention", "moe"),
        n_routed_experts=12,
        n_group=3,
        topk_group=2,
        num_experts_per_tok=3,
        moe_latent_size=12,
        time_step_limit=(0.01, 0.5),
    ),
}
MODELS = {name: c.replace(intermediate_size=c.intermediate_size or 48) for name, c in MODELS.items()}

Form = Callable[[Hebatron, list[Tensor]], list[Tensor]]


def batch(sequences: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    ids, mask = torch.zeros(2, len(sequences), LONGEST, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        span = slice(LONGEST - len(sequence), None) if left else slice(0, len(sequence))
        ids[row, span], mask[row, span] = sequence, 1
    return ids, mask


def rows(logits_BLV: Tensor, mask_BL: Tensor) -> list[Tensor]:
    assert not logits_BLV[mask_BL == 0].any(), "padding must have logits 0"
    return [logits[mask.bool()] for logits, mask in zip(logits_BLV, mask_BL, strict=True)]


def packed(sequences: list[Tensor], order: list[int]) -> tuple[Tensor, Tensor]:
    lengths = [len(sequences[n]) for n in order]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.cat([sequences[n] for n in order]), ends


def one_batch(left: bool) -> Form:
    def run(model: Hebatron, sequences: list[Tensor]) -> list[Tensor]:
        ids, mask = batch(sequences, left)
        return rows(model(ids, mask).logits, mask)

    return run


def one_pack(order: list[int]) -> Form:
    def run(model: Hebatron, sequences: list[Tensor]) -> list[Tensor]:
        ids, ends = packed(sequences, order)
        logits = model(ids, cu_seqlens=ends).logits[0]
        pieces = logits.split(ends.diff().tolist())
        return [pieces[order.index(n)] for n in range(len(sequences))]

    return run


def pack_with_empty(model: Hebatron, sequences: list[Tensor]) -> list[Tensor]:
    ids, ends = packed(sequences, list(range(len(sequences))))
    ends = torch.cat(
        [ends[:1], ends[:2], ends[1:], ends[-1:]]
    )  # documents without tokens at 0, 1 and the end
    pieces = model(ids[None], cu_seqlens=ends).logits[0].split(ends.diff().tolist())
    return [piece for piece in pieces if len(piece)]


def chunks(size: int) -> Form:
    """Each sequence on its own through a cache, `size` tokens at a time."""

    def run(model: Hebatron, sequences: list[Tensor]) -> list[Tensor]:
        out = []
        for sequence in sequences:
            cache = model.new_cache(1)
            parts = [model(part[None], cache=cache).logits[0] for part in sequence.split(size)]
            assert cache.lengths == [len(sequence)]
            out.append(torch.cat(parts))
        return out

    return run


def batch_chunks(size: int, left: bool) -> Form:
    """The padded batch through one cache: rows start late or end early, some bring nothing to a chunk."""

    def run(model: Hebatron, sequences: list[Tensor]) -> list[Tensor]:
        ids, mask = batch(sequences, left)
        cache = model.new_cache(len(sequences))
        logits = torch.zeros(*ids.shape, model.config.vocab_size)
        for begin in range(0, LONGEST, size):
            span = slice(begin, begin + size)
            logits[:, span] = model(ids[:, span], mask[:, span], cache=cache).logits
        assert cache.lengths == LENGTHS
        return rows(logits, mask)

    return run


def prefill_then_tokens(prefix: int) -> Form:
    """The first tokens in one padded batch, then one at a time while every row has some left."""

    def run(model: Hebatron, sequences: list[Tensor]) -> list[Tensor]:
        sequences = [
            sequence if len(sequence) > prefix else sequence.repeat(prefix + 1) for sequence in sequences
        ]
        steps = min(len(sequence) for sequence in sequences) - prefix
        cache = model.new_cache(len(sequences))
        prompts = torch.stack([sequence[:prefix] for sequence in sequences])
        parts = [model(prompts, cache=cache).logits]
        for n in range(prefix, prefix + steps):
            parts.append(model(torch.stack([s[n : n + 1] for s in sequences]), cache=cache).logits)
        for n, sequence in enumerate(sequences):
            whole = model(sequence[None, : prefix + steps]).logits[0]
            assert relative(torch.cat(parts, 1)[n], whole) <= 1e-5
        return [model(sequence[None]).logits[0] for sequence in sequences]

    return run


def packed_into_cache(model: Hebatron, sequences: list[Tensor]) -> list[Tensor]:
    """A ragged step without padding: cu_seqlens and a cache together."""
    cache = model.new_cache(len(sequences))
    heads = [sequence[: len(sequence) // 2] for sequence in sequences]
    tails = [sequence[len(sequence) // 2 :] for sequence in sequences]
    pieces = []
    for part in (heads, tails):
        ids, ends = packed(part, list(range(len(part))))
        pieces.append(model(ids, cu_seqlens=ends, cache=cache).logits[0].split(ends.diff().tolist()))
    return [torch.cat([a, b]) for a, b in zip(*pieces, strict=True)]


def snapshot_and_restore(model: Hebatron, sequences: list[Tensor]) -> list[Tensor]:
    """Go wrong for a while after a snapshot, come back twice, and go on as if nothing had been."""
    out = []
    for sequence in sequences:
        cut = len(sequence) // 2
        cache = model.new_cache(1)
        first = [model(sequence[None, :cut], cache=cache).logits[0]] if cut else []
        before = cache.snapshot()
        for wrong in ([7, 7, 7, 7, 7], [3]):
            model(torch.tensor([wrong]), cache=cache)
            cache.restore(before)
        out.append(torch.cat([*first, model(sequence[None, cut:], cache=cache).logits[0]]))
    return out


def reordered(model: Hebatron, sequences: list[Tensor]) -> list[Tensor]:
    """Heads prefilled in one order, tails continued in another with rows doubled and dropped."""
    ids, mask = batch(sequences, left=False)
    keep = [2, 0, 0]
    cache = model.new_cache(len(sequences))
    heads = [min(4, len(sequence)) for sequence in sequences]
    mask_heads = mask.clone()
    for row, n in enumerate(heads):
        mask_heads[row, n:] = 0
    first = rows(model(ids, mask_heads, cache=cache).logits, mask_heads)
    cache.reorder(keep)
    assert cache.lengths == [heads[n] for n in keep]
    tails, ends = packed([sequences[n][heads[n] :] for n in keep], [0, 1, 2])
    second = model(tails, cu_seqlens=ends, cache=cache).logits[0].split(ends.diff().tolist())
    alone = [model(sequence[None]).logits[0] for sequence in sequences]
    alone[0], alone[2] = torch.cat([first[0], second[2]]), torch.cat([first[2], second[0]])
    assert relative(second[1], second[2]) <= 1e-5
    return alone


FORMS: dict[str, Form] = {
    "left-padded batch": one_batch(left=True),
    "right-padded batch": one_batch(left=False),
    "packed": one_pack([0, 1, 2, 3]),
    "packed, other order": one_pack([3, 1, 0, 2]),
    "packed with empty documents": pack_with_empty,
    "token by token": chunks(1),
    "chunks of 2": chunks(2),
    "chunks of 7": chunks(7),
    "chunks of 16": chunks(16),
    "chunks of 36": chunks(36),
    "one chunk": chunks(64),
    "left-padded chunks of 1": batch_chunks(1, left=True),
    "left-padded chunks of 7": batch_chunks(7, left=True),
    "right-padded chunks of 5": batch_chunks(5, left=False),
    "right-padded in one": batch_chunks(64, left=False),
    "prefill 1 then tokens": prefill_then_tokens(1),
    "prefill 4 then tokens": prefill_then_tokens(4),
    "packed into a cache": packed_into_cache,
    "snapshot and restore": snapshot_and_restore,
    "reordered": reordered,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_how_tokens_come(name: str, form: str) -> None:
    model = make_model(MODELS[name], seed=5)
    g = torch.Generator().manual_seed(11)
    sequences = [torch.randint(0, model.config.vocab_size, (length,), generator=g) for length in LENGTHS]
    with torch.no_grad():
        alone = [model(sequence[None]).logits[0] for sequence in sequences]
        got = FORMS[form](model, sequences)
    if form.startswith("prefill"):
        got = [logits[: len(wanted)] for logits, wanted in zip(got, alone, strict=True)]
    for logits, wanted in zip(got, alone, strict=True):
        assert relative(logits, wanted) <= 1e-5


def test_packed_gradients_match_separate_documents() -> None:
    model = make_model(MODELS["deep"], seed=5)
    g = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, 64, (length,), generator=g) for length in LENGTHS]
    labels = [torch.randint(0, 64, (length,), generator=g) for length in LENGTHS]
    for document, label in zip(documents, labels, strict=True):
        model(document[None], labels=label[None], loss_reduction="sum").loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ids, ends = packed(documents, [0, 1, 2, 3])
    model(ids, cu_seqlens=ends, labels=torch.cat(labels), loss_reduction="sum").loss.backward()
    assert len(wanted) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert p.grad is not None and relative(p.grad, wanted[name]) <= 2e-5, name


def test_a_poisoned_document_stays_alone() -> None:
    """A document whose tokens give NaN leaves the others as they were, up to the rounding of the experts' products:
    the torch form's depends on how many rows an expert gets, and NaN tokens choose other experts."""
    model = make_model(MODELS["deep"], seed=5)
    with torch.no_grad():
        ids, ends = packed([torch.arange(1, n + 1) for n in LENGTHS], [0, 1, 2, 3])
        before = model(ids, cu_seqlens=ends).logits[0]
        model.backbone.embeddings.weight[63] = float("nan")
        ids[ends[1] : ends[2]] = 63
        after = model(ids, cu_seqlens=ends).logits[0]
    others = torch.ones(len(ids), dtype=torch.bool)
    others[ends[1] : ends[2]] = False
    assert torch.isnan(after[~others]).all()
    assert relative(after[others], before[others]) <= 1e-6

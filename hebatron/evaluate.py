"""Bits per byte of held-out text, by source: comparable between tokenizers, and the measure of forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .corpus import Corpus
from .model import Hebatron


def bits_per_byte(
    model: Hebatron, corpus: Corpus, *, max_tokens: int | None = None, batch_tokens: int = 8192
) -> dict[str, float]:
    """Sum of the tokens' negative log2-likelihood over the documents' UTF-8 bytes, for each source of `corpus`.

    Every document stands alone (packed, isolated by cu_seqlens) and is scored whole, its end-of-text token
    included. Its first token has no context and is not scored, as in training: the figure is low by that
    token's bits, equally for every model with the same tokenizer.

    Args:
        corpus: usually the held-out view of `Corpus.split`.
        max_tokens: per source, at most this many tokens: documents in the order of their text hash, those that
            would pass the limit left out, but at least one. None: all.
        batch_tokens: of one forward; a longer document is a forward of its own.
    Returns: source to bits per byte, sources in the corpus's order. The model is left as it was found: mode,
        counts, gradients and random generators.
    """
    if batch_tokens < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            f"bits_per_byte: batch_tokens and max_tokens must be >= 1, got {batch_tokens}, {max_tokens}"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return {
                source: _score(model, corpus, documents, batch_tokens)
                for source, documents in choose_documents(corpus, max_tokens).items()
            }
    finally:
        model.train(was_training)


def choose_documents(corpus: Corpus, max_tokens: int | None = None) -> dict[str, list[int]]:
    """The documents scored for each source: in hash order, so the same whatever order they were prepared in."""
    by_source: dict[str, list[int]] = {}
    for i in sorted(range(len(corpus)), key=corpus.hash):
        by_source.setdefault(corpus.source(i), []).append(i)
    lengths = corpus.lengths
    chosen: dict[str, list[int]] = {}
    for source in sorted(by_source, key=corpus.sources.index):
        kept: list[int] = []
        total = 0
        for i in by_source[source]:
            length = int(lengths[i])
            if not kept or max_tokens is None or total + length <= max_tokens:
                kept.append(i)
                total += length
        chosen[source] = kept
    return chosen


def _score(model: Hebatron, corpus: Corpus, documents: Sequence[int], batch_tokens: int) -> float:
    nats = 0.0
    for batch in _batches(corpus, documents, batch_tokens):
        # (input, target) pairs as in training: the end-of-text token is a target and never an input
        tokens = [torch.from_numpy(corpus.tokens(i).astype(np.int64)) for i in batch]
        ids_T = torch.cat([t[:-1] for t in tokens])
        labels_T = torch.cat([t[1:] for t in tokens])
        cu_seqlens = torch.tensor([0, *(len(t) - 1 for t in tokens)]).cumsum(0).to(torch.int32)
        output = model(
            ids_T.to(model.device),
            cu_seqlens=cu_seqlens.to(model.device),
            labels=labels_T.to(model.device),
            loss_reduction="sum",
        )
        nats += float(output.loss)
    return nats / math.log(2) / sum(corpus.bytes(i) for i in documents)


def _batches(corpus: Corpus, documents: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    total = 0
    for i in documents:
        length = len(corpus.tokens(i))
        if batch and total + length > batch_tokens:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += length
    if batch:
        yield batch

"""Bits per byte of held-out text, by source: the measure of learning and of forgetting."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..model import Hebatron
from ..router import LanguageCounts


def bits_per_byte(
    model: Hebatron,
    corpus: Corpus,
    *,
    max_tokens: int | None = None,
    batch_tokens: int = 8192,
    routing: LanguageCounts | None = None,
) -> dict[str, float]:
    """Sum of the tokens' negative log2-likelihood over the documents' UTF-8 bytes, for each source of `corpus`.

    Every document stands alone (packed, isolated by cu_seqlens), its end-of-text token included. One longer than
    the model's max_position_embeddings is scored in pieces of that length that know nothing of each other. The
    first token has no context and is not scored, as in training, though its bytes count: the figure is low by that
    token's bits, equally for every model with the same tokenizer. Across tokenizers it is not exact: where
    documents are short, the tokenizer with the longer first token looks better than it is.

    Args:
        corpus: usually the held-out view of `Corpus.split`.
        max_tokens: per source, at most this many tokens: documents in the order of their text hash, those that
            would pass the limit left out. Where not one fits, the first is read up to the limit and its bytes are
            counted in that proportion. None: all.
        batch_tokens: of one forward; a longer document, or piece of one, is a forward of its own.
        routing: takes the experts chosen for this text, by the documents' languages.
    Returns: source to bits per byte, sources in the corpus's order. The model is left as it was found: mode,
        counts, gradients and random generators.
    """
    if batch_tokens < 1:
        raise ValueError(f"bits_per_byte: batch_tokens must be >= 1, got {batch_tokens}")
    if max_tokens is not None and max_tokens < 2:  # one to read and one to predict
        raise ValueError(f"bits_per_byte: max_tokens must be None or >= 2, got {max_tokens}")
    with evaluating(model):
        return {
            source: _score(model, corpus, documents, batch_tokens, routing)
            for source, documents in choose_documents(corpus, max_tokens).items()
        }


@contextlib.contextmanager
def evaluating(model: Hebatron) -> Iterator[None]:
    """The model in evaluation mode and no gradients recorded; its mode is put back, after an error too."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def choose_documents(corpus: Corpus, max_tokens: int | None = None) -> dict[str, list[tuple[int, int]]]:
    """(document, tokens read of it) to be scored for each source: in hash order, so the same whatever order they
    were prepared in."""
    by_source: dict[str, list[int]] = {}
    for i in sorted(range(len(corpus)), key=corpus.hash):
        by_source.setdefault(corpus.source(i), []).append(i)
    lengths = corpus.lengths
    chosen: dict[str, list[tuple[int, int]]] = {}
    for source in sorted(by_source, key=corpus.sources.index):
        kept: list[tuple[int, int]] = []
        total = 0
        for i in by_source[source]:
            length = int(lengths[i])
            if max_tokens is None or total + length <= max_tokens:
                kept.append((i, length))
                total += length
        chosen[source] = kept or [(by_source[source][0], max_tokens or 0)]
    return chosen


def _score(
    model: Hebatron,
    corpus: Corpus,
    documents: Sequence[tuple[int, int]],
    batch_tokens: int,
    routing: LanguageCounts | None,
) -> float:
    nats = 0.0
    longest = model.config.max_position_embeddings
    for batch in _batches(_pieces(corpus, documents, longest), batch_tokens):
        output, lengths = _forward(model, [piece for _, piece in batch], "sum")
        nats += float(output.loss)
        if routing is not None:
            language_Q = torch.tensor([corpus.langs.index(corpus.lang(i)) for i, _ in batch])
            routing.add(output.aux, corpus.langs, language_Q.repeat_interleave(lengths))
    total = corpus.lengths
    return nats / math.log(2) / sum(corpus.byte_count(i) * read / int(total[i]) for i, read in documents)


def piece_bits(
    model: Hebatron,
    corpus: Corpus,
    *,
    piece_tokens: int,
    max_tokens: int | None = None,
    batch_tokens: int = 8192,
    begin: int = 0,
) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[np.float64]]]:
    """(document, the piece's targets, the bits each of them costs) of every document, in order, piece by piece.

    The first token of a document is no target; the end-of-text token is its last one. Pieces know nothing of each
    other and have the same bits in any company.

    Args:
        piece_tokens: targets of a piece, at most; fewer where the model's context is shorter.
        max_tokens: of each document, from its beginning; None: all.
        begin: the first document.
    """
    for name, value in (
        ("piece_tokens", piece_tokens),
        ("max_tokens", max_tokens),
        ("batch_tokens", batch_tokens),
    ):
        if value is not None and value < 1:
            raise ValueError(f"piece_bits: {name} must be >= 1, got {value}")
    longest = min(piece_tokens, model.config.max_position_embeddings)
    reads = corpus.lengths if max_tokens is None else np.minimum(corpus.lengths, max_tokens + 1)
    pieces = _pieces(corpus, list(enumerate(reads.tolist()))[begin:], longest)
    with evaluating(model):
        for batch in _batches(pieces, batch_tokens):
            output, lengths = _forward(model, [piece for _, piece in batch], "none")
            bits = (output.loss.double() / math.log(2)).split(lengths.tolist())
            for (i, piece), found in zip(batch, bits, strict=True):
                yield i, piece[1:].numpy(), found.cpu().numpy()


def _forward(model: Hebatron, pieces: Sequence[Tensor], reduction: str) -> tuple[Any, Tensor]:
    """The model's output on these pieces, isolated, and the targets of each.

    As in training, the end-of-text token is a target and never an input.
    """
    ids_T = torch.cat([piece[:-1] for piece in pieces])
    labels_T = torch.cat([piece[1:] for piece in pieces])
    lengths = torch.tensor([len(piece) - 1 for piece in pieces])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    output = model(
        ids_T.to(model.device),
        cu_seqlens=cu_seqlens.to(model.device),
        labels=labels_T.to(model.device),
        loss_reduction=reduction,
    )
    return output, lengths


def _pieces(
    corpus: Corpus, documents: Iterable[tuple[int, int]], longest: int
) -> Iterator[tuple[int, Tensor]]:
    """(document, tokens) in pieces of at most `longest` targets; one begins with the last one's last target."""
    for i, read in documents:
        tokens = torch.from_numpy(corpus.tokens(i)[:read].astype(np.int64))
        for start in range(0, read - 1, longest):
            yield i, tokens[start : start + longest + 1]


def _batches(pieces: Iterable[tuple[int, Tensor]], batch_tokens: int) -> Iterator[list[tuple[int, Tensor]]]:
    batch: list[tuple[int, Tensor]] = []
    total = 0
    for document, piece in pieces:
        if batch and total + len(piece) > batch_tokens:
            yield batch
            batch, total = [], 0
        batch.append((document, piece))
        total += len(piece)
    if batch:
        yield batch

"""A model's bits a character of each document; what was read is kept, and a stopped reading goes on from there."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tokenizer import Tokenizer
from .corpus import Corpus
from .length_effect import Floats, LengthEffect, mean_of_pieces

if TYPE_CHECKING:
    from ..model import Hebatron

PIECE_TOKENS = 512
TOKEN_CUTS = (2, 4, 8, 16, 32, 64, 128, 256, PIECE_TOKENS)
# Of one document: (bits a character, tokens, characters) of each piece, and the bits a character of its first piece cut
# to each of TOKEN_CUTS that it reaches
Read = tuple[list[tuple[float, int, int]], list[float]]


def model_bits(
    corpus: Corpus,
    tokenizer: Tokenizer,
    model: Hebatron,
    *,
    max_tokens: int | None = None,
    correct_length: bool = True,
    kept: Path | None = None,
    report: Callable[[int], None] = lambda documents: None,
) -> Floats:
    """Mean over a document's pieces of up to PIECE_TOKENS; 0 where there is nothing to predict.

    Args:
        max_tokens, correct_length: as in `difficulty.measure`.
        kept: a line is added to this file for each document read, and those of an earlier reading are not read again:
            `kept_file` names the one of a corpus and model. It stays when all is read.
        report: told after each document how many of the corpus, from its beginning, are read.
    """
    read: dict[int, Read] = {} if kept is None else _lines(kept)
    report(begin := max(read, default=-1) + 1)
    from ..evaluation.evaluate import piece_bits

    found = piece_bits(model, corpus, piece_tokens=PIECE_TOKENS, max_tokens=max_tokens, begin=begin)
    for i, pieces in itertools.groupby(found, key=lambda piece: piece[0]):
        read[i] = _read(pieces, corpus.eos_id, tokenizer)
        if kept is not None:
            with kept.open("a") as file:  # closed, so that a process killed next has lost nothing
                file.write(json.dumps([i, *read[i]]) + "\n")
        report(i + 1)
    prefixes = np.full((len(corpus), len(TOKEN_CUTS)), np.nan)
    for i, (_, prefix) in read.items():
        prefixes[i, : len(prefix)] = prefix
    effects = {
        lang: LengthEffect.of(TOKEN_CUTS, prefixes[corpus.lang_ids == number]) if correct_length else None
        for number, lang in enumerate(corpus.langs)
    }
    result = np.zeros(len(corpus))
    for i, (each, _) in read.items():
        if each:
            values, lengths, chars = zip(*each, strict=True)
            result[i] = mean_of_pieces(effects[corpus.lang(i)], values, lengths, chars)
    return result


def kept_file(folder: Path, corpus: Corpus, model: Hebatron, max_tokens: int | None) -> Path:
    """The file in `folder` for these documents and this model: another model's has another name."""
    from ..training.anchor_kl import weights_hash

    what = [corpus.fingerprint, weights_hash(model), str(model.compute_dtype), max_tokens, PIECE_TOKENS]
    return folder / f".model_bits-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.jsonl"


def _lines(kept: Path) -> dict[int, Read]:
    """What is in the file; a last line cut short is taken off it."""
    if not kept.exists():
        return {}
    whole = kept.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    with kept.open("r+b") as file:
        file.truncate(len(whole))
    return {i: (each, prefix) for i, each, prefix in map(json.loads, whole.splitlines())}


def _read(pieces: Iterable[tuple[int, Any, Floats]], eos_id: int, tokenizer: Tokenizer) -> Read:
    each: list[tuple[float, int, int]] = []
    prefix: list[float] = []
    for _, targets, bits in pieces:
        if targets[-1] == eos_id:
            targets, bits = targets[:-1], bits[:-1]
        chars = len(tokenizer.decode(targets.tolist())) if len(targets) else 0
        if not chars:
            continue
        if not each:  # a causal model's bits of a beginning are those of the text cut there
            reached = np.array([cut for cut in TOKEN_CUTS if cut <= len(bits)], np.int64)
            prefix = (np.cumsum(bits)[reached - 1] / reached * (len(bits) / chars)).tolist()
        each.append((float(bits.sum()) / chars, len(bits), chars))
    return each, prefix

"""A plan: the hashed table of rows that a run reads, and the batches made from it (build.py builds it)."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..data.corpus import Corpus

if TYPE_CHECKING:
    from .build import Curriculum, Phase

Int64s = npt.NDArray[np.int64]
PLAN_VERSION = 2  # in the hash: raise it when the meaning of the table changes


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    phase: the block (Plan.blocks) that its first row is in. rows: what it reads. position: index of the phase, as
    written, that this step's learning rate and batch size come from. batch_tokens: that batch size; the rows hold
    it to within one row of each end.
    """

    index: int
    phase: str
    rows: range
    position: int
    batch_tokens: int


def rank_rows(rows: range, rank: int, world_size: int) -> range:
    """The rows of one step that this rank reads: runs of nearly equal length, which in rank order are `rows`."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank_rows: rank must be in [0, world_size = {world_size}), got {rank}")
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]


def pairs_read(segments: Int64s, corpora: Mapping[str, Corpus], name: str) -> int:
    """Pairs of the documents of "corpus" or "corpus/source" in these segments (Plan.segments)."""
    corpus_name, _, source = name.partition("/")
    corpus = corpora[corpus_name]
    mine = segments[segments[:, 0] == list(corpora).index(corpus_name)]
    if source:
        mine = mine[corpus.source_ids[mine[:, 1]] == corpus.sources.index(source)]
    return int(mine[:, 3].sum())


@dataclass(frozen=True)
class Batch:
    """T pairs in R rows and Q segments. Everything is on the CPU.

    input_ids, labels: (T,) int64; labels are aligned (labels[t] is the token after input_ids[t] in its document)
    and never ignored (-100 does not occur). cu_seqlens: (Q + 1,) int32, document isolation. row_starts: (R + 1,)
    int64, token offsets. is_anchor: (R,) bool. source: (R,) int64, indices into Plan.sources.
    """

    rows: range
    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    row_starts: torch.Tensor
    is_anchor: torch.Tensor
    source: torch.Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows of a run, in order.

    row_source, row_phase (index of the phase it was written for), row_is_anchor: (rows,). row_segments: (rows + 1,),
    where each row's segments begin. segments: (., 4) int64: corpus, document, first input token, pairs. blocks: the
    phases and their rows, as they run; in order "shuffled" the places of the phases, named shuffled-0 and so on.
    epoch_tokens: pairs in one epoch of each of `sources`.
    """

    curriculum: Curriculum
    corpora: dict[str, Corpus]
    sources: list[str]
    blocks: list[tuple[Phase, range]]
    row_source: Int64s
    row_phase: Int64s
    row_is_anchor: npt.NDArray[np.bool_]
    row_segments: Int64s
    segments: Int64s
    epoch_tokens: dict[str, int]

    @property
    def num_rows(self) -> int:
        return len(self.row_source)

    @property
    def num_tokens(self) -> int:
        """Loss-bearing tokens of the whole run."""
        return int(self.segments[:, 3].sum())

    @functools.cached_property
    def row_tokens(self) -> Int64s:
        """Loss-bearing tokens of each row."""
        return np.add.reduceat(self.segments[:, 3], self.row_segments[:-1])

    def tokens_in(self, rows: range) -> int:
        return int(self.row_tokens[rows.start : rows.stop].sum())

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the table and the corpora: two runs with one hash read the same tokens in the same order."""
        blocks = [[phase.name, phase.seq_len, len(rows)] for phase, rows in self.blocks]
        digest = hashlib.sha256(json.dumps([PLAN_VERSION, self._corpora(), self.sources, blocks]).encode())
        for array in (self.row_source, self.row_is_anchor, self.row_segments, self.segments):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def rows_hash(self) -> str:
        """Like `hash`, but of the rows as a multiset: the same for every `order`."""
        digests = []
        names = [phase.name for phase in self.curriculum.phases]
        for row in range(self.num_rows):
            role = "anchor" if self.row_is_anchor[row] else names[self.row_phase[row]]
            digests.append(self._row_digest(row, role))
        head = json.dumps([PLAN_VERSION, self._corpora()])
        return hashlib.sha256(head.encode() + b"".join(sorted(digests))).hexdigest()

    @functools.cached_property
    def anchor_hash(self) -> str:
        """Of the anchor's rows in their sequence: the same for every `order`."""
        rows = np.flatnonzero(self.row_is_anchor).tolist()
        return hashlib.sha256(b"".join(self._row_digest(row, "anchor") for row in rows)).hexdigest()

    def _row_digest(self, row: int, role: str) -> bytes:
        head = json.dumps([role, self.sources[self.row_source[row]]])
        table = self.segments[self.row_segments[row] : self.row_segments[row + 1]]
        return hashlib.sha256(head.encode() + table.astype("<i8").tobytes()).digest()

    def _corpora(self) -> list[list[str]]:
        return [[name, corpus.fingerprint] for name, corpus in self.corpora.items()]

    def steps(self, tokens_per_batch: int) -> list[Step]:
        """The run's steps: as many, and of the same batch sizes to within a row, for every order.

        A phase as written, at its place, is cut after every batch_tokens // seq_len rows; what is left at its end
        (or at the end of a batch size of its ramp) is a step, or joins the step before if it is shorter than the
        run's longest row. A step takes the rows that begin within its tokens.
        """
        cuts: list[tuple[int, int, int]] = []  # (end token, phase, batch size)
        longest, begin = max(phase.seq_len for phase in self.curriculum.phases), 0
        for i, phase in enumerate(self.curriculum.phases):
            ramp = phase.ramp(tokens_per_batch)
            for k, batch_tokens in enumerate(ramp):
                size = batch_tokens // phase.seq_len
                if size < 1:
                    raise ValueError(
                        f"Plan.steps: tokens_per_batch must be at least the seq_len {phase.seq_len} of phase "
                        f"{phase.name!r}, got {batch_tokens}"
                    )
                rows = phase.num_rows * (k + 1) // len(ramp) - phase.num_rows * k // len(ramp)
                ends = [*range(size, rows, size), rows] if rows else []
                if len(ends) > 1 and (ends[-1] - ends[-2]) * phase.seq_len < longest:
                    del ends[-2]
                cuts += [(begin + end * phase.seq_len, i, batch_tokens) for end in ends]
                begin += rows * phase.seq_len
        begins = np.cumsum(self.row_tokens) - self.row_tokens
        stops = np.searchsorted(begins, [end for end, _, _ in cuts]).tolist()
        names = np.repeat([phase.name for phase, _ in self.blocks], [len(rows) for _, rows in self.blocks])
        steps: list[Step] = []
        for start, stop, (_, position, batch_tokens) in zip([0, *stops[:-1]], stops, cuts, strict=True):
            if start == stop:
                raise ValueError(
                    f"Plan.steps: every step must hold a row, got none in step {len(steps)} (written for phase "
                    f"{self.curriculum.phases[position].name!r}) with rows of up to {longest} tokens there in this "
                    "order; raise that phase's tokens or the batch"
                )
            steps.append(Step(len(steps), str(names[start]), range(start, stop), position, batch_tokens))
        return steps

    def microbatches(self, rows: range, tokens: int) -> list[range]:
        """`rows` in runs of at most this many tokens."""
        pieces: list[range] = []
        start, held = rows.start, 0
        for row in rows:
            length = int(self.row_tokens[row])
            if length > tokens:
                raise ValueError(f"Plan.microbatches: tokens must be at least a row's {length}, got {tokens}")
            if held + length > tokens:
                pieces.append(range(start, row))
                start, held = row, 0
            held += length
        return [*pieces, range(start, rows.stop)] if rows else []

    def documents(self, rows: range) -> dict[str, list[str]]:
        """The documents of these rows by corpus, each once: its id, or "#" and its text's hash where it has none."""
        begin, end = self.row_segments[rows.start], self.row_segments[rows.stop]
        names: dict[str, list[str]] = {}
        for number, (name, corpus) in enumerate(self.corpora.items()):
            segments = self.segments[begin:end]
            numbers = np.unique(segments[segments[:, 0] == number, 1]).tolist()
            if numbers:
                names[name] = [corpus.id(i) or f"#{corpus.hash(i).hex()}" for i in numbers]
        return names

    def batch(self, rows: range) -> Batch:
        """The tokens of these rows; a pure function, so a batch may be cut into micro-batches or ranks by rows."""
        if not rows or min(rows) < 0 or max(rows) >= self.num_rows:
            raise ValueError(
                f"Plan.batch: rows must be within 0..{self.num_rows - 1} and not empty, got {rows}"
            )
        index = np.asarray(rows)
        counts = self.row_segments[index + 1] - self.row_segments[index]
        segments = np.concatenate(
            [self.segments[self.row_segments[r] : self.row_segments[r + 1]] for r in rows]
        )
        ends = np.cumsum(segments[:, 3])
        input_ids, labels = np.empty(ends[-1], np.int64), np.empty(ends[-1], np.int64)
        corpora = list(self.corpora.values())
        for (corpus, document, start, length), end in zip(segments.tolist(), ends.tolist(), strict=True):
            tokens = corpora[corpus].tokens(document)[start : start + length + 1]
            input_ids[end - length : end] = tokens[:-1]
            labels[end - length : end] = tokens[1:]
        bounds = np.concatenate([[0], ends])
        return Batch(
            rows,
            torch.from_numpy(input_ids),
            torch.from_numpy(labels),
            torch.from_numpy(bounds.astype(np.int32)),
            torch.from_numpy(bounds[np.concatenate([[0], np.cumsum(counts)])]),
            torch.from_numpy(self.row_is_anchor[index]),
            torch.from_numpy(self.row_source[index]),
        )

    def token_languages(self, rows: range) -> tuple[list[str], torch.Tensor]:
        """The languages of these rows' documents, and every token's index into them, as `batch` packs them."""
        segments = np.concatenate(
            [self.segments[self.row_segments[r] : self.row_segments[r + 1]] for r in rows]
        )
        corpora = list(self.corpora.values())
        named = [corpora[corpus].lang(document) for corpus, document in segments[:, :2].tolist()]
        languages = sorted(set(named))
        index = np.array([languages.index(name) for name in named], np.int64)
        return languages, torch.from_numpy(index.repeat(segments[:, 3]))

    def languages(self, rows: int) -> set[str]:
        """The languages of the first `rows` rows."""
        segments = self.segments[: self.row_segments[rows]]
        return {
            corpus.langs[lang]
            for number, corpus in enumerate(self.corpora.values())
            for lang in np.unique(corpus.lang_ids[segments[segments[:, 0] == number, 1]])
        }

    def describe(self) -> dict[str, Any]:
        """Rows, (loss-bearing) tokens, anchor share, by phase as they run and by source; ready for JSON. A source's
        epochs count what is read of its documents, by the anchor or by phases, under any name, as its limits do."""

        def count(mask: npt.NDArray[np.bool_]) -> dict[str, int]:
            return {"rows": int(mask.sum()), "tokens": int(self.row_tokens[mask].sum())}

        phases = []
        for phase, rows in self.blocks:
            inside = np.zeros(self.num_rows, bool)
            inside[rows.start : rows.stop] = True
            anchor = count(inside & self.row_is_anchor)
            by_source = {
                name: told
                for number, name in enumerate(self.sources)
                if (told := count(inside & ~self.row_is_anchor & (self.row_source == number)))["rows"]
            }
            phases.append(
                {
                    "name": phase.name,
                    "seq_len": phase.seq_len,
                    **count(inside),
                    "documents": self._documents(inside),
                    "anchor_share": anchor["tokens"] / count(inside)["tokens"],
                    "anchor": anchor,
                    "sources": by_source,
                }
            )
        sources = []
        for number, is_anchor in itertools.product(range(len(self.sources)), (False, True)):
            mask = (self.row_source == number) & (self.row_is_anchor == is_anchor)
            if mask.any():
                name = self.sources[number]
                role = self.segments[np.repeat(self.row_is_anchor == is_anchor, np.diff(self.row_segments))]
                sources.append(
                    {
                        "name": name,
                        "anchor": is_anchor,
                        **count(mask),
                        "documents": self._documents(mask),
                        "epochs": pairs_read(role, self.corpora, name) / self.epoch_tokens[name],
                    }
                )
        return {
            "hash": self.hash,
            "rows_hash": self.rows_hash,
            "anchor_hash": self.anchor_hash,
            "order": self.curriculum.order,
            **count(np.ones(self.num_rows, bool)),
            "anchor_tokens": count(self.row_is_anchor)["tokens"],
            "phases": phases,
            "sources": sources,
        }

    def _documents(self, mask: npt.NDArray[np.bool_]) -> int:
        """Different documents in the rows of this mask."""
        picked = self.segments[np.repeat(mask, np.diff(self.row_segments)), :2]
        return len(np.unique(picked, axis=0))

"""A plan: the hashed table of rows that a run reads, and the batches made from it (curriculum.py builds it)."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .corpus import Corpus

if TYPE_CHECKING:
    from .curriculum import Curriculum, Phase

Int64s = npt.NDArray[np.int64]
PLAN_VERSION = 1  # in the hash: raise it when the meaning of the table changes


@dataclass(frozen=True)
class Step:
    """One optimizer step: `rows` of one phase."""

    index: int
    phase: str
    seq_len: int
    rows: range

    def micro(self, rows_at_once: int) -> list[range]:
        """`rows` in pieces of at most this many."""
        if rows_at_once < 1:
            raise ValueError(f"Step.micro: rows_at_once must be at least 1, got {rows_at_once}")
        return [self.rows[i : i + rows_at_once] for i in range(0, len(self.rows), rows_at_once)]


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

    row_source, row_is_anchor: (rows,). row_segments: (rows + 1,), where each row's segments begin. segments: (., 4)
    int64: corpus, document, first input token, pairs. blocks: the phases and their rows, as they run.
    epoch_tokens: pairs in one epoch of each of `sources`.
    """

    curriculum: Curriculum
    corpora: dict[str, Corpus]
    sources: list[str]
    blocks: list[tuple[Phase, range]]
    row_source: Int64s
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
        for phase, rows in self.blocks:
            for row in rows:
                role = "anchor" if self.row_is_anchor[row] else phase.name
                head = json.dumps([role, self.sources[self.row_source[row]]])
                table = self.segments[self.row_segments[row] : self.row_segments[row + 1]]
                digests.append(hashlib.sha256(head.encode() + table.astype("<i8").tobytes()).digest())
        head = json.dumps([PLAN_VERSION, self._corpora()])
        return hashlib.sha256(head.encode() + b"".join(sorted(digests))).hexdigest()

    def _corpora(self) -> list[list[str]]:
        return [[name, corpus.fingerprint] for name, corpus in self.corpora.items()]

    def steps(self, tokens_per_batch: int) -> list[Step]:
        """Each phase's rows by tokens_per_batch // seq_len; its last step takes what is left."""
        steps: list[Step] = []
        for phase, rows in self.blocks:
            size = tokens_per_batch // phase.seq_len
            if size < 1:
                raise ValueError(
                    f"Plan.steps: tokens_per_batch must be at least the seq_len {phase.seq_len} of phase "
                    f"{phase.name!r}, got {tokens_per_batch}"
                )
            for i in range(0, len(rows), size):
                steps.append(Step(len(steps), phase.name, phase.seq_len, rows[i : i + size]))
        return steps

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

    def describe(self) -> dict[str, Any]:
        """Rows, (loss-bearing) tokens, anchor share, epochs, by phase as they run and by source; ready for JSON."""
        row_tokens = np.add.reduceat(self.segments[:, 3], self.row_segments[:-1])

        def count(mask: npt.NDArray[np.bool_]) -> dict[str, int]:
            return {"rows": int(mask.sum()), "tokens": int(row_tokens[mask].sum())}

        phases = []
        for phase, rows in self.blocks:
            inside = np.zeros(self.num_rows, bool)
            inside[rows.start : rows.stop] = True
            anchor = count(inside & self.row_is_anchor)
            by_source = {
                name: count(inside & ~self.row_is_anchor & (self.row_source == number))
                for number, name in enumerate(self.sources)
                if phase.sources.get(name)
            }
            phases.append(
                {
                    "name": phase.name,
                    "seq_len": phase.seq_len,
                    **count(inside),
                    "anchor_share_asked": phase.anchor_share,
                    "anchor_share": anchor["tokens"] / count(inside)["tokens"],
                    "anchor": anchor,
                    "sources": by_source,
                }
            )
        sources = []
        segment_row = np.repeat(np.arange(self.num_rows), np.diff(self.row_segments))
        for number, is_anchor in itertools.product(range(len(self.sources)), (False, True)):
            mask = (self.row_source == number) & (self.row_is_anchor == is_anchor)
            if mask.any():
                documents = np.unique(self.segments[mask[segment_row], 1])
                sources.append(
                    {
                        "name": self.sources[number],
                        "anchor": is_anchor,
                        **count(mask),
                        "documents": len(documents),
                        "epochs": count(mask)["tokens"] / self.epoch_tokens[self.sources[number]],
                    }
                )
        return {
            "hash": self.hash,
            "order": self.curriculum.order,
            **count(np.ones(self.num_rows, bool)),
            "anchor_tokens": count(self.row_is_anchor)["tokens"],
            "phases": phases,
            "sources": sources,
        }

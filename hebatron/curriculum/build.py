"""A curriculum is planned before it is run: phases, sources and an anchor become one hashed table of rows.

    plan = build_plan(Curriculum(phases, anchor={"english": 1.0}), {"hebrew": corpus_a, "english": corpus_b})
    for step in plan.steps(tokens_per_batch):      # a step names rows: the data state of a run is one integer
        batch = plan.batch(step.rows)

Rules, all of them:
  row        exactly seq_len (input, target) pairs of one source. A document of n tokens has n - 1 pairs: token t
             is the input, token t + 1 the target. So rows carry no padding, every position bears loss, and every
             token of a document but its first is a target exactly once an epoch. The end-of-text token is a
             target and never an input.
  cut        a document that meets the end of its row goes on in the source's next row as a segment of its own:
             the last target before the cut is the first input after it.
  isolation  a segment is a piece of one document; `cu_seqlens` has one entry a segment.
  source     "corpus" or "corpus/source". Its documents form an endless stream, permuted anew for every epoch
             (by hash of seed, name, epoch and document). A later phase goes on where an earlier one stopped.
             Repeats are reported by `describe` and limited by max_epochs, the anchor's by anchor_max_epochs; both
             count what was read of a source's documents, as "corpus" and as "corpus/source".
  budget     a phase has floor(tokens / seq_len) rows; round(anchor_share x rows) of them are anchor rows, the
             others are shared out by weight (largest remainder), every source of weight > 0 at least one row.
  mixing     anchor rows are spread by error diffusion: in any prefix of a phase they are within one row of the
             share. The other sources are spread over the remaining places in the same way.
  position   a run's tokens are divided into steps as the phases are written, whatever `order` says (Plan.steps):
             learning rate, warm-up and batch size belong to a step's number.
  order      permutes the rows that are no anchor rows, and nothing else: "reversed" runs phases, and rows within
             them, backwards; "shuffled" is a seeded permutation over all phases; both leave a pinned phase (a base)
             as and where it was written; a tuple of phase names runs the phases in that order.
  anchor     the anchor's rows, their sequence and their places belong to positions: in every order the k-th anchor
             row is the same, and comes after as many tokens as in the written one, to within one row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..data.corpus import Corpus
from .order import mix, order_rows
from .phases import Curriculum, Phase, epoch_limit
from .plan import Batch, Int64s, Plan, Step, pairs_read

__all__ = ["Batch", "Curriculum", "Phase", "Plan", "Step", "build_plan"]


class _Stream:
    """One source's documents, epoch after epoch; `take` cuts the next rows off it."""

    def __init__(self, name: str, role: str, corpora: Mapping[str, Corpus], seed: int) -> None:
        self.name, self.role, self._seed = name, role, seed
        self.corpus, self._documents, self._pairs = _documents(corpora, name)
        self.pairs_per_epoch = int(self._pairs.sum())
        if not self.pairs_per_epoch:
            raise ValueError(
                f"build_plan: {role} {name!r} must hold a document of two tokens or more, got none"
            )
        self.taken = 0

    def _epoch(self, epoch: int) -> Int64s:
        """The permutation of one epoch: positions in `_documents`."""
        text = json.dumps([self._seed, self.role, self.name, epoch])
        key = np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
        return np.argsort(mix(self._documents.astype(np.uint64) ^ key), kind="stable")

    def take(self, rows: int, seq_len: int) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """Segments of the next rows: (row from 0, document, first input token, pairs)."""
        begin, end = self.taken, self.taken + rows * seq_len
        first, last = begin // self.pairs_per_epoch, -(-end // self.pairs_per_epoch)
        order = np.concatenate([self._epoch(epoch) for epoch in range(first, last)])
        ends = first * self.pairs_per_epoch + np.cumsum(self._pairs[order])
        starts = ends - self._pairs[order]
        cuts = np.unique(
            np.concatenate([np.arange(begin, end, seq_len), starts[(starts > begin) & (starts < end)]])
        )
        place = np.searchsorted(ends, cuts, side="right")
        self.taken = end
        lengths = np.diff(cuts, append=end)
        return (cuts - begin) // seq_len, self._documents[order[place]], cuts - starts[place], lengths

    def check(self, read: int, limit: float, reader: str, setting: str) -> None:
        """Refuse that `read` of its tokens, by whatever name, are more than `limit` epochs."""
        if read > limit * self.pairs_per_epoch:
            raise ValueError(
                f"build_plan: {reader} must read {self.name!r} at most {setting} = {limit:g} times, "
                f"got {read / self.pairs_per_epoch:.2f} by its end "
                f"({read} tokens of {self.pairs_per_epoch} an epoch)"
            )


def _documents(corpora: Mapping[str, Corpus], name: str) -> tuple[int, Int64s, Int64s]:
    """(which corpus, its documents of this source that have a pair, their pairs)."""
    corpus_name, _, source = name.partition("/")
    corpus = corpora[corpus_name]
    if source and source not in corpus.sources:
        raise ValueError(f"build_plan: source {name!r} must name one of {corpus.sources}")
    pairs = corpus.lengths - 1
    usable = pairs > 0
    if source:
        usable &= corpus.source_ids == corpus.sources.index(source)
    documents: Int64s = np.flatnonzero(usable)
    return list(corpora).index(corpus_name), documents, pairs[documents]


def _share_out(rows: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Whole rows for each source of weight > 0: largest remainder first, then as written."""
    used = {name: weight for name, weight in weights.items() if weight > 0}
    total = sum(used.values())
    exact = {name: rows * weight / total for name, weight in used.items()}
    shares = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(used, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: rows - sum(shares.values())]:
        shares[name] += 1
    return shares


def _spread(counts: list[int]) -> Int64s:
    """Row numbers, each group's rows being numbered in one run after the other's, interleaved so that every
    prefix has nearly its share of each group: row k of a group of n stands at (k + 1/2) / n."""
    places = np.concatenate([np.zeros(0)] + [(np.arange(n) + 0.5) / n for n in counts])
    return np.argsort(places, kind="stable")


def _anchor_places(rows: int, anchors: int) -> npt.NDArray[np.bool_]:
    """Error diffusion: the first i rows hold round(i * anchors / rows) anchor rows, halves rounded up."""
    counts = (2 * np.arange(rows + 1, dtype=np.int64) * anchors + rows) // (2 * rows)
    return np.diff(counts) > 0


class _Table:
    """Rows in the order they are cut, before `order` permutes them."""

    def __init__(self) -> None:
        self.rows = 0
        self._row_source: list[Int64s] = []
        self._segments: list[Int64s] = []

    def cut(self, stream: _Stream, rows: int, seq_len: int, source: int) -> None:
        row, document, start, length = stream.take(rows, seq_len)
        corpus = np.full_like(row, stream.corpus)
        self._segments.append(np.stack([self.rows + row, corpus, document, start, length], axis=1))
        self._row_source.append(np.full(rows, source, np.int64))
        self.rows += rows

    @property
    def segments(self) -> Int64s:
        """All that was cut, as in Plan.segments."""
        return np.concatenate(self._segments)[:, 1:]

    def permuted(self, order: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """(source of each row, first segment of each row and the end, segments) with rows in this order."""
        segments = np.concatenate(self._segments)
        counts = np.bincount(segments[:, 0], minlength=self.rows)
        firsts = np.cumsum(counts) - counts
        ends = np.cumsum(counts[order])
        pick = np.repeat(firsts[order] - (ends - counts[order]), counts[order]) + np.arange(ends[-1])
        return np.concatenate(self._row_source)[order], np.concatenate([[0], ends]), segments[pick, 1:]


class _Cutter:
    """Cuts the rows of all phases in the order they are written; `order` then permutes the finished rows."""

    def __init__(self, curriculum: Curriculum, corpora: Mapping[str, Corpus], sources: list[str]) -> None:
        self.curriculum, self.corpora, self.sources = curriculum, corpora, sources
        self.table = _Table()
        self.streams: dict[tuple[str, str], _Stream] = {}
        self.num_rows = [phase.num_rows for phase in curriculum.phases]
        self.num_anchors = [
            math.floor(phase.anchor_share * rows + 0.5)
            for phase, rows in zip(curriculum.phases, self.num_rows, strict=True)
        ]
        for phase, rows, anchors in zip(curriculum.phases, self.num_rows, self.num_anchors, strict=True):
            if phase.anchor_share > 0 and not anchors:
                raise ValueError(
                    f"build_plan: phase {phase.name!r} must have a row for its anchor_share "
                    f"{phase.anchor_share}, got none among {rows} rows; raise tokens or anchor_share"
                )
        self.own_rows = [self._cut_phase(i) for i in range(len(curriculum.phases))]
        lengths = dict.fromkeys(phase.seq_len for phase in curriculum.phases)
        self.anchor_rows = {seq_len: iter(self._cut_anchor(seq_len).tolist()) for seq_len in lengths}
        lost = [
            name
            for name, weight in curriculum.anchor.items()
            if weight > 0 and any(self.num_anchors) and ("anchor", name) not in self.streams
        ]
        if lost:
            raise ValueError(
                f"build_plan: anchor must have a row for every source of weight > 0, got none for {lost[0]!r} "
                f"among {sum(self.num_anchors)} anchor rows; raise tokens or drop the source"
            )
        for (role, name), stream in self.streams.items():
            if role == "anchor":
                limit = epoch_limit(curriculum.anchor_max_epochs, name)
                stream.check(stream.taken, limit, "the anchor", "anchor_max_epochs")

    def _cut(self, role: str, name: str, rows: int, seq_len: int) -> _Stream:
        if (role, name) not in self.streams:
            self.streams[role, name] = _Stream(name, role, self.corpora, self.curriculum.seed)
        stream = self.streams[role, name]
        if rows:
            self.table.cut(stream, rows, seq_len, self.sources.index(name))
        return stream

    def _cut_phase(self, i: int) -> Int64s:
        """Row numbers of phase i without its anchor, sources interleaved."""
        phase, rows, anchors = self.curriculum.phases[i], self.num_rows[i], self.num_anchors[i]
        shares = _share_out(rows - anchors, phase.sources)
        numbers = self.table.rows + _spread(list(shares.values()))
        for name, share in shares.items():
            if share == 0:
                raise ValueError(
                    f"build_plan: phase {phase.name!r} must have a row for every source of weight > 0, got none "
                    f"for {name!r} among {rows} rows ({anchors} anchor); raise tokens or drop the source"
                )
            stream = self._cut("source", name, share, phase.seq_len)
            read = pairs_read(self.table.segments, self.corpora, name)  # no anchor row is cut yet
            stream.check(read, epoch_limit(phase.max_epochs, name), f"phase {phase.name!r}", "max_epochs")
        return numbers

    def _cut_anchor(self, seq_len: int) -> Int64s:
        """Row numbers of all anchor rows of this length, in the order they will be used."""
        phases = zip(self.curriculum.phases, self.num_anchors, strict=True)
        wanted = sum(anchors for phase, anchors in phases if phase.seq_len == seq_len)
        shares = _share_out(wanted, self.curriculum.anchor) if wanted else {}
        numbers = self.table.rows + _spread(list(shares.values()))
        for name, share in shares.items():
            if share:
                self._cut("anchor", name, share, seq_len)
        return numbers

    def place(self, i: int) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """(row numbers of phase i as written, which are anchor rows); takes the next anchor rows."""
        is_anchor = _anchor_places(self.num_rows[i], self.num_anchors[i])
        rows = np.empty(self.num_rows[i], np.int64)
        rows[~is_anchor] = self.own_rows[i]
        seq_len = self.curriculum.phases[i].seq_len
        rows[is_anchor] = list(itertools.islice(self.anchor_rows[seq_len], self.num_anchors[i]))
        return rows, is_anchor


def build_plan(curriculum: Curriculum, corpora: Mapping[str, Corpus]) -> Plan:
    """Cut every phase into rows and put them in order: the rules are at the top of this file.

    Args:
        corpora: by the names that the sources use; those not used are left out of the plan and of its hash.
    Raises: ValueError naming the phase or source.
    """
    groups = [phase.sources for phase in curriculum.phases]
    if any(phase.anchor_share > 0 for phase in curriculum.phases):
        groups.append(curriculum.anchor)
    sources = list(dict.fromkeys(name for group in groups for name, weight in group.items() if weight > 0))
    used = _used_corpora(sources, corpora)
    cutter = _Cutter(curriculum, used, sources)
    written, is_anchor = zip(*(cutter.place(i) for i in range(len(curriculum.phases))), strict=True)
    ordered = order_rows(curriculum, list(written), list(is_anchor))
    row_source, row_segments, segments = cutter.table.permuted(ordered.rows)
    epoch_tokens = {name: stream.pairs_per_epoch for (_, name), stream in cutter.streams.items()}
    return Plan(
        curriculum,
        used,
        sources,
        ordered.blocks,
        row_source,
        ordered.phase,
        ordered.is_anchor,
        row_segments,
        segments,
        epoch_tokens,
    )


def _used_corpora(sources: list[str], corpora: Mapping[str, Corpus]) -> dict[str, Corpus]:
    """The corpora that the sources name, sorted by name; they must share one tokenizer."""
    for name in corpora:
        if not name or "/" in name:
            raise ValueError(f'build_plan: corpora must have names without "/", got {name!r}')
    for name in sources:
        if name.split("/", 1)[0] not in corpora:
            raise ValueError(f"build_plan: source {name!r} must name one of the corpora {sorted(corpora)}")
    used = {name: corpora[name] for name in sorted({name.split("/", 1)[0] for name in sources})}
    tokenizers = {name: corpus.tokenizer_fingerprint[:12] for name, corpus in used.items()}
    if len(set(tokenizers.values())) > 1:
        raise ValueError(f"build_plan: corpora must share one tokenizer, got {tokenizers}")
    return used

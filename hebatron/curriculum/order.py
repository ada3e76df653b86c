"""The order of a plan's rows: a permutation of the rows that are no anchor rows; the anchor keeps its places."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .phases import Curriculum, Phase

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ordered:
    """rows: row numbers as they run. phase: which phase each was written for. blocks: see Plan."""

    rows: Int64s
    phase: Int64s
    is_anchor: Bools
    blocks: list[tuple[Phase, range]]


def order_rows(curriculum: Curriculum, written: list[Int64s], anchors: list[Bools]) -> Ordered:
    """Rows in `curriculum.order`.

    Args:
        written: row numbers of each phase, as written.
        anchors: which of them are anchor rows.
    """
    phases = curriculum.phases
    rows, is_anchor = np.concatenate(written), np.concatenate(anchors)
    phase = np.repeat(np.arange(len(phases)), [len(part) for part in written])
    length = np.array([p.seq_len for p in phases])[phase]
    own = _own_order(curriculum, [np.flatnonzero((phase == i) & ~is_anchor) for i in range(len(phases))])
    own_before = np.concatenate([[0], np.cumsum(length[own])])  # own tokens before the j-th own row
    anchor = np.flatnonzero(is_anchor)
    wanted = np.cumsum(np.where(is_anchor, 0, length))[
        anchor
    ]  # own tokens before each anchor row, as written
    index = np.insert(own, np.searchsorted(own_before, wanted, side="left"), anchor)
    begins = np.cumsum(length[index]) - length[index]
    if curriculum.order_name in ("forward", "shuffled"):
        edges = np.searchsorted(begins, np.cumsum([p.num_rows * p.seq_len for p in phases])).tolist()
        names = [
            p
            if p.pinned or curriculum.order_name == "forward"
            else dataclasses.replace(p, name=f"shuffled-{i}")
            for i, p in enumerate(phases)
        ]
    else:
        run_order = curriculum.phase_order()
        first = [int(np.flatnonzero((phase[index] == i) & ~is_anchor[index])[0]) for i in run_order]
        edges, names = [*first[1:], len(index)], [phases[i] for i in run_order]
    blocks = [
        (p, range(begin, end))
        for p, begin, end in zip(names, [0, *edges[:-1]], edges, strict=True)
        if end > begin
    ]
    return Ordered(rows[index], phase[index], is_anchor[index], blocks)


def _own_order(curriculum: Curriculum, own: list[Int64s]) -> Int64s:
    """The rows that are no anchor rows, given by phase as written, in the order they run."""
    pinned = [phase.pinned for phase in curriculum.phases]
    if curriculum.order_name == "shuffled" and not all(pinned):
        free = np.concatenate([rows for rows, fixed in zip(own, pinned, strict=True) if not fixed])
        text = json.dumps(["shuffled", curriculum.seed])
        key = np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
        free = free[np.argsort(mix(np.arange(len(free), dtype=np.uint64) ^ key), kind="stable")]
        counts = [0 if fixed else len(rows) for rows, fixed in zip(own, pinned, strict=True)]
        dealt = np.split(free, np.cumsum(counts)[:-1])
        return np.concatenate([a if fixed else b for a, b, fixed in zip(own, dealt, pinned, strict=True)])
    backwards = curriculum.order_name == "reversed"
    return np.concatenate(
        [own[i][::-1] if backwards and not pinned[i] else own[i] for i in curriculum.phase_order()]
    )


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A 64-bit bijection that scatters counters (splitmix64): the same on every machine and numpy version."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

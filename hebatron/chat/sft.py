"""Chat samples packed into rows: a hashed table with the plan's interface, each sample isolated by cu_seqlens.

    rows = pack_chats(samples, seq_len=2048, epochs=2, task_weights={"inflect": 0.5}, lang_weights={"he": 2.0})
    batch = rows.batch(range(0, 8))  # labels are -100 outside the answers

A sample is never cut here and never split over rows. In an epoch a sample of weight w (its task's times its
language's) is read w times on average: per task and language the count is exact to within one, by error diffusion
over a seeded order. Rows are filled best-fit-decreasing (the longest sample first, into the fullest row that holds
it), then shuffled: the same samples, weights and seed give the same rows and the same `hash`.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..curriculum.plan import Batch, Int64s, Step
from .chats import Sample

SFT_VERSION = 1  # in the hash: raise it when the meaning of the table changes
IGNORED = -100


@dataclass(frozen=True, eq=False)
class ChatRows:
    """samples by number, and the rows: each row's sample numbers, in the order in which they stand."""

    samples: Sequence[Sample]
    seq_len: int
    rows: list[list[int]]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Pairs of the whole run, learnt or not."""
        return int(self.row_tokens.sum())

    @functools.cached_property
    def sources(self) -> list[str]:
        return sorted({sample.source for sample in self.samples})

    @functools.cached_property
    def row_tokens(self) -> Int64s:
        """Pairs (input tokens) of each row, learnt or not."""
        return np.array([sum(len(self.samples[i].ids) - 1 for i in row) for row in self.rows], np.int64)

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the rows: two with one hash give the same batches."""
        digest = hashlib.sha256(json.dumps([SFT_VERSION, self.seq_len, self.rows]).encode())
        for sample in self.samples:
            digest.update(json.dumps([len(sample.ids), sample.source]).encode())
            digest.update(sample.ids.astype("<i4").tobytes() + sample.learn.tobytes())
        return digest.hexdigest()

    def steps(self, tokens_per_batch: int) -> list[Step]:
        """Runs of tokens_per_batch // seq_len rows; the last takes what is left."""
        size = tokens_per_batch // self.seq_len
        if size < 1:
            raise ValueError(
                f"ChatRows.steps: tokens_per_batch must be at least seq_len {self.seq_len}, got {tokens_per_batch}"
            )
        starts = range(0, self.num_rows, size)
        return [
            Step(i, "sft", range(start, min(start + size, self.num_rows)), 0, tokens_per_batch)
            for i, start in enumerate(starts)
        ]

    def microbatches(self, rows: range, tokens: int) -> list[range]:
        """`rows` in runs of at most tokens // seq_len rows."""
        size = tokens // self.seq_len
        if size < 1:
            raise ValueError(
                f"ChatRows.microbatches: tokens must be at least seq_len {self.seq_len}, got {tokens}"
            )
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def documents(self, rows: range) -> dict[str, list[str]]:
        """The chats of these rows by source, by the names that messages about them use."""
        names: dict[str, list[str]] = {}
        for sample in (self.samples[i] for row in rows for i in self.rows[row]):
            names.setdefault(sample.source, []).append(sample.name)
        return {source: sorted(set(some)) for source, some in names.items()}

    def batch(self, rows: range) -> Batch:
        """The tokens of these rows. A row's `source` is its first sample's; no row is an anchor's."""
        if not rows or min(rows) < 0 or max(rows) >= self.num_rows:
            raise ValueError(
                f"ChatRows.batch: rows must be within 0..{self.num_rows - 1} and not empty, got {rows}"
            )
        packed = [self.samples[i] for row in rows for i in self.rows[row]]
        labels = [np.where(s.learn[1:], s.ids[1:], IGNORED).astype(np.int64) for s in packed]
        bounds = np.cumsum([0] + [len(sample.ids) - 1 for sample in packed])
        starts = np.concatenate([[0], np.cumsum(self.row_tokens[np.asarray(rows)])])
        sources = [self.sources.index(self.samples[self.rows[row][0]].source) for row in rows]
        return Batch(
            rows,
            torch.from_numpy(np.concatenate([s.ids[:-1] for s in packed]).astype(np.int64)),
            torch.from_numpy(np.concatenate(labels)),
            torch.from_numpy(bounds.astype(np.int32)),
            torch.from_numpy(starts.astype(np.int64)),
            torch.zeros(len(rows), dtype=torch.bool),
            torch.tensor(sources, dtype=torch.int64),
        )

    def token_languages(self, rows: range) -> tuple[list[str], torch.Tensor]:
        """The languages of these rows' chats, and every token's index into them, as `batch` packs them."""
        packed = [self.samples[i] for row in rows for i in self.rows[row]]
        languages = sorted({sample.lang for sample in packed})
        index = torch.tensor([languages.index(sample.lang) for sample in packed])
        return languages, index.repeat_interleave(torch.tensor([len(sample.ids) - 1 for sample in packed]))

    def languages(self, rows: int) -> set[str]:
        """The languages of the first `rows` rows."""
        return {self.samples[i].lang for row in self.rows[:rows] for i in row}

    def describe(self) -> dict[str, Any]:
        """Rows, fill, and samples, tokens, learnt tokens, masked share in all and by task and language; for JSON."""
        groups: dict[str, list[Sample]] = defaultdict(list)
        for row in self.rows:
            for i in row:
                for name in ("all", f"task/{self.samples[i].task}", f"lang/{self.samples[i].lang}"):
                    groups[name].append(self.samples[i])
        counts = {}
        for name, members in sorted(groups.items()):
            tokens = sum(len(sample.ids) - 1 for sample in members)
            learnt = sum(int(sample.learn[1:].sum()) for sample in members)
            share = 1 - learnt / tokens
            counts[name] = {
                "samples": len(members),
                "tokens": tokens,
                "learnt": learnt,
                "masked_share": share,
            }
        fill = counts["all"]["tokens"] / (self.num_rows * self.seq_len)
        return {
            "hash": self.hash,
            "seq_len": self.seq_len,
            "rows": self.num_rows,
            "fill": fill,
            "groups": counts,
        }


def neftune_noise(batch: Batch, alpha: float, width: int, seed: int) -> torch.Tensor:
    """What NEFTune (arXiv 2310.05914) adds to the embeddings: +-alpha / sqrt(L * width) at most, L a document long.

    A row's noise is drawn from (seed, row) alone, and a row is read in one step: so a step has the same noise after
    a resume and however it is cut into microbatches. Returns (T, width) fp32 on the CPU, as `batch` packs its tokens.
    """
    noise_TD = torch.empty(batch.input_ids.numel(), width)
    starts = batch.row_starts.tolist()
    for row, begin, end in zip(batch.rows, starts[:-1], starts[1:], strict=True):
        state = np.random.SeedSequence([SFT_VERSION, seed, row]).generate_state(1, np.uint64)
        noise_TD[begin:end].uniform_(-1, 1, generator=torch.Generator().manual_seed(int(state[0]) >> 1))
    lengths_Q = batch.cu_seqlens.diff().long()
    return noise_TD * (alpha / (lengths_Q * width).sqrt()).repeat_interleave(lengths_Q)[:, None]


def pack_chats(
    samples: Sequence[Sample],
    seq_len: int,
    *,
    epochs: int = 1,
    task_weights: Mapping[str, float] | None = None,
    lang_weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> ChatRows:
    """Rows of at most `seq_len` pairs that hold each sample as often as its weight says, epoch after epoch.

    Args:
        samples: of at most seq_len + 1 tokens each (encode_chats' max_tokens).
        task_weights, lang_weights: readings an epoch; 1 for what is not named, 0 leaves it out.
    Raises: ValueError for a sample that does not fit or has nothing to learn, an unknown name, a bad weight.
    """
    for name, value in (("seq_len", seq_len), ("epochs", epochs), ("samples", len(samples))):
        if value < 1:
            raise ValueError(f"pack_chats: {name} must be at least 1, got {value}")
    tasks, langs = dict(task_weights or {}), dict(lang_weights or {})
    _check_weights("task_weights", tasks, {sample.task for sample in samples})
    _check_weights("lang_weights", langs, {sample.lang for sample in samples})
    for sample in samples:
        if len(sample.ids) > seq_len + 1 or not sample.learn[1:].any():
            raise ValueError(
                f"pack_chats: samples must have at most seq_len + 1 = {seq_len + 1} tokens and one to learn behind the "
                f"first, got {len(sample.ids)} tokens, {int(sample.learn[1:].sum())} to learn in {sample.name}"
            )
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[sample.task, sample.lang].append(i)
    rng = np.random.default_rng([SFT_VERSION, seed])
    rows: list[list[int]] = []
    carried: dict[tuple[str, str], float] = defaultdict(float)
    for _ in range(epochs):
        chosen: list[int] = []
        for (task, lang), members in sorted(groups.items()):
            weight = tasks.get(task, 1.0) * langs.get(lang, 1.0)
            for i in rng.permutation(members).tolist():
                due = carried[task, lang] + weight
                times = math.floor(due + 1e-9)  # 10 x 0.1 is one reading
                carried[task, lang] = due - times
                chosen += [i] * times
        packed = _best_fit([(len(samples[i].ids) - 1, i) for i in chosen], seq_len)
        rows += [packed[k] for k in rng.permutation(len(packed)).tolist()]
    if not rows:
        raise ValueError(f"pack_chats: weights must leave at least one sample, got {tasks} and {langs}")
    return ChatRows(samples, seq_len, rows)


def _check_weights(name: str, weights: Mapping[str, float], known: set[str]) -> None:
    for key, value in weights.items():
        if key not in known:
            raise ValueError(f"pack_chats: {name} must name one of {', '.join(sorted(known))}, got {key!r}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"pack_chats: {name}[{key!r}] must be finite and >= 0, got {value}")


def _best_fit(items: Sequence[tuple[int, int]], room: int) -> list[list[int]]:
    """Rows of sample numbers: (length, number) longest first, each into the row with the least room that is enough."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room, row), sorted
    for length, number in sorted(items, key=lambda item: (-item[0], item[1])):
        at = bisect.bisect_left(left, (length, -1))
        if at == len(left):
            rows.append([number])
            bisect.insort(left, (room - length, len(rows) - 1))
        else:
            free, row = left.pop(at)
            rows[row].append(number)
            bisect.insort(left, (free - length, row))
    return rows

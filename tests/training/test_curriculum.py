"""The plan: rows hold exactly the documents, the anchor keeps its share, order permutes and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from hebatron.corpus import DOCUMENT
from hebatron.curriculum import Curriculum, Phase, Plan, build_plan
from hebatron.data import Corpus, prepare
from hebatron.plan import rank_rows
from hebatron.tokenizer import Tokenizer

SOURCES = {
    "easy": {"tales": [f"הילד {w} הלך הביתה ושתה מים." for w in "דן גל רון יעל נועה מיה".split()]},
    "hard": {
        "law": ["סעיף א. " + "כל אדם זכאי להגנה על קניינו, לפי הדין. " * n for n in (1, 3, 9)],
        "notes": ["הערה", "הערת שוליים ארוכה מעט יותר"],
    },
    "base": {
        "english": [f"It was a {w} day and the ships stayed in port." for w in ("wet", "cold", "very windy")],
        "code": ["def twice(x: int) -> int:\n    return 2 * x\n", "print(twice(21))\n"],
    },
}


class ByteTokenizer:
    """Stands in for a Tokenizer, so that recorded hashes depend on nothing but our own code."""

    fingerprint, vocab_size, eos_id = "bytes", 257, 256

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]


def make_corpora(folder: Path) -> dict[str, Corpus]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, sources in SOURCES.items():
        records = [{"text": text, "source": source} for source, texts in sources.items() for text in texts]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        prepare([folder / f"{name}.jsonl"], folder / name, cast(Tokenizer, ByteTokenizer()))
    return {name: Corpus.open(folder / name) for name in SOURCES}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def three_phases(
    order: Any = "forward", shares: Sequence[float] = (0.3, 0.2, 0.1), **changes: Any
) -> Curriculum:
    phases = (
        Phase("base", {"base": 1}, tokens=320, seq_len=32, pinned=True),
        Phase("easy", {"easy": 1}, tokens=1000, seq_len=32, anchor_share=shares[0]),
        Phase("mixed", {"easy": 1, "hard/law": 2.5}, tokens=2000, seq_len=32, anchor_share=shares[1]),
        Phase("long", {"hard": 1}, tokens=3000, seq_len=80, anchor_share=shares[2]),
    )
    return Curriculum(phases, {"base/english": 3, "base/code": 1}, order, **changes)


ORDERS = [
    "forward",
    "easy_to_hard",
    "reversed",
    "shuffled",
    ("base", "mixed", "long", "easy"),
    ("long", "base", "easy", "mixed"),
]


def row_table(plan: Plan, row: int) -> list[tuple[int, ...]]:
    return [tuple(s) for s in plan.segments[plan.row_segments[row] : plan.row_segments[row + 1]].tolist()]


def document_pairs(corpus: Corpus) -> Counter[tuple[int, int]]:
    return Counter((d, t) for d in range(len(corpus)) for t in range(int(corpus.lengths[d]) - 1))


# ------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize(
    "seq_len", [1, 2, 7, 32, 80, 4096]
)  # under, at and over the documents' 9..700 tokens
@pytest.mark.parametrize("epochs", [1, 3])
def test_plan_counts_every_token_but_the_first_once_an_epoch(
    corpora: dict[str, Corpus], seq_len: int, epochs: int
) -> None:
    corpus = corpora["hard"]
    per_epoch = int((corpus.lengths - 1).sum())
    tokens = -(-epochs * per_epoch // seq_len) * seq_len  # whole rows: a little of the next epoch comes along
    plan = build_plan(Curriculum((Phase("p", {"hard": 1}, tokens, seq_len),)), corpora)
    pairs = [(d, t) for _, d, start, n in plan.segments.tolist() for t in range(start, start + n)]
    assert len(pairs) == tokens == plan.num_tokens
    for epoch in range(epochs):
        assert Counter(pairs[epoch * per_epoch : (epoch + 1) * per_epoch]) == document_pairs(corpus)
    rest = pairs[epochs * per_epoch :]
    assert all(count <= -(-len(rest) // per_epoch) for count in Counter(rest).values())


def test_plan_may_end_anywhere(corpora: dict[str, Corpus]) -> None:
    per_epoch = int((corpora["easy"].lengths - 1).sum())

    def pairs(tokens: int, seq_len: int) -> list[tuple[int, int]]:
        phases = (Phase("p", {"easy": 1}, tokens, seq_len), Phase("q", {"hard": 1}, 5, 5))
        plan = build_plan(Curriculum(phases), corpora)
        assert plan.segments[:, 3].min() >= 1
        mine = plan.segments[: plan.row_segments[tokens // seq_len]]
        return [(d, t) for _, d, start, n in mine.tolist() for t in range(start, start + n)]

    whole = pairs(per_epoch + 20, 1)
    for tokens in range(1, per_epoch + 20):  # one row that ends within, at and just after each document
        assert pairs(tokens, tokens) == whole[:tokens]


def test_plan_batch_is_exactly_the_documents(corpora: dict[str, Corpus]) -> None:
    plan = build_plan(three_phases(), corpora)
    names = list(plan.corpora)
    for row in range(plan.num_rows):
        batch = plan.batch(range(row, row + 1))
        bounds = batch.cu_seqlens.tolist()
        table = row_table(plan, row)
        assert len(bounds) == len(table) + 1 and bounds[0] == 0 and bounds[-1] == len(batch.input_ids)
        for (corpus_number, document, start, length), begin, end in zip(
            table, bounds[:-1], bounds[1:], strict=True
        ):
            corpus = corpora[names[corpus_number]]
            tokens = corpus.tokens(document).astype(np.int64)
            assert end - begin == length >= 1
            assert batch.input_ids[begin:end].tolist() == tokens[start : start + length].tolist()
            assert batch.labels[begin:end].tolist() == tokens[start + 1 : start + length + 1].tolist()
            source = plan.sources[plan.row_source[row]]
            assert source in (names[corpus_number], f"{names[corpus_number]}/{corpus.source(document)}")
        assert corpora["base"].eos_id not in batch.input_ids


def test_plan_rows_are_full_and_documents_continue(corpora: dict[str, Corpus]) -> None:
    plan = build_plan(three_phases(), corpora)
    for phase, rows in plan.blocks:
        assert len(rows) == phase.tokens // phase.seq_len
        for row in rows:
            assert sum(segment[3] for segment in row_table(plan, row)) == phase.seq_len
    # The stream of one source in one phase: each segment starts where its document was cut, or at its beginning.
    for _, rows in plan.blocks:
        for number in range(len(plan.sources)):
            mine = [r for r in rows if plan.row_source[r] == number and not plan.row_is_anchor[r]]
            segments = [segment for row in mine for segment in row_table(plan, row)]
            for (_, document, start, length), after in itertools.pairwise(segments):
                name = plan.sources[number].split("/")[0]
                done = start + length == corpora[name].lengths[document] - 1
                assert after[2] == 0 if done else after[1:3] == (document, start + length)


def test_plan_later_phase_goes_on_where_the_earlier_stopped(corpora: dict[str, Corpus]) -> None:
    per_epoch = int((corpora["easy"].lengths - 1).sum())
    phases = (Phase("a", {"easy": 1}, per_epoch // 3, 16), Phase("b", {"easy": 1}, per_epoch, 9))
    plan = build_plan(Curriculum(phases), corpora)
    pairs = [(d, t) for _, d, start, n in plan.segments.tolist() for t in range(start, start + n)]
    assert Counter(pairs[:per_epoch]) == document_pairs(corpora["easy"])


def test_plan_batch_fields(corpora: dict[str, Corpus]) -> None:
    plan = build_plan(three_phases(), corpora)
    rows = plan.blocks[1][1][3:9]
    batch = plan.batch(rows)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.row_starts.dtype == torch.int64
    assert (batch.cu_seqlens.dtype, batch.is_anchor.dtype) == (torch.int32, torch.bool)
    assert batch.input_ids.shape == batch.labels.shape == (6 * 32,)
    assert batch.row_starts.tolist() == [32 * i for i in range(7)]
    assert set(batch.row_starts.tolist()) <= set(batch.cu_seqlens.tolist())
    assert batch.is_anchor.tolist() == plan.row_is_anchor[rows.start : rows.stop].tolist()
    assert batch.source.tolist() == plan.row_source[rows.start : rows.stop].tolist()
    # A batch is its rows: micro-batches and ranks read the same tokens.
    for pieces in (
        [range(rows.start, rows.start + 1), range(rows.start + 1, rows.stop)],
        [rows[0::2], rows[1::2]],
    ):
        for piece in pieces:
            part = plan.batch(piece)
            expected = torch.cat([batch.input_ids.view(6, 32)[row - rows.start] for row in piece])
            assert torch.equal(part.input_ids, expected)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("ramp", [None, 320, (96, 170, 320)], ids=str)
def test_plan_steps_keep_their_positions_in_every_order(
    corpora: dict[str, Corpus], order: Any, ramp: Any
) -> None:
    written = change_phase(2, batch_tokens=ramp)(three_phases())
    plain = build_plan(written, corpora)
    plan = build_plan(dataclasses.replace(written, order=order), corpora)
    steps, expected = plan.steps(170), plain.steps(170)
    assert [row for step in steps for row in step.rows] == list(range(plan.num_rows))
    assert [(s.index, s.position, s.batch_tokens) for s in steps] == [
        (s.index, s.position, s.batch_tokens) for s in expected
    ]
    ends, expected_ends = (
        np.cumsum([p.tokens_in(s.rows) for s in some]) for p, some in ((plan, steps), (plain, expected))
    )
    longest = 80
    assert np.abs(ends - expected_ends).max() < longest
    for step, after in itertools.pairwise(expected):
        phase = plain.curriculum.phases[step.position]
        full = step.batch_tokens // phase.seq_len
        ends_stage = (after.position, after.batch_tokens) != (step.position, step.batch_tokens)
        assert len(step.rows) == full or (
            ends_stage and len(step.rows) * phase.seq_len < full * phase.seq_len + longest
        )
    if isinstance(ramp, tuple):
        tokens = [
            sum(plain.tokens_in(s.rows) for s in expected if s.batch_tokens == b and s.position == 2)
            for b in ramp
        ]
        assert tokens == [20 * 32, 21 * 32, 21 * 32]


def test_plan_steps_refuse_a_step_without_a_row(corpora: dict[str, Corpus]) -> None:
    phases = (Phase("b", {"easy": 1}, 200, 100), Phase("a", {"easy": 1}, 20, 10))
    assert len(build_plan(Curriculum(phases), corpora).steps(100)) == 3
    with pytest.raises(ValueError, match=r"every step must hold a row, got none in step 2 .*phase 'a'"):
        build_plan(Curriculum(phases, order="reversed"), corpora).steps(100)


@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
def test_rank_rows_of_any_world_size_are_the_ordered_batch(corpora: dict[str, Corpus], order: str) -> None:
    plan = build_plan(three_phases(order), corpora)
    for step in plan.steps(300):
        whole = plan.batch(step.rows)
        for world_size in (1, 2, 3, 5, 8, 64):  # more ranks than rows as well
            shares = [rank_rows(step.rows, rank, world_size) for rank in range(world_size)]
            assert [row for share in shares for row in share] == list(step.rows)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            parts = [plan.batch(share) for share in shares if share]
            for name in ("input_ids", "labels", "is_anchor", "source"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
            for share in shares:
                pieces = plan.microbatches(share, 100)
                assert [row for piece in pieces for row in piece] == list(share)
                assert all(plan.tokens_in(piece) <= 100 for piece in pieces)
    with pytest.raises(ValueError, match=r"rank_rows: rank must be in \[0, world_size = 2\), got 2"):
        rank_rows(range(4), 2, 2)
    with pytest.raises(ValueError, match=r"Plan.microbatches: tokens must be at least a row's \d+, got 8"):
        plan.microbatches(range(4), 8)


def test_plan_errors_of_steps_and_batches(corpora: dict[str, Corpus]) -> None:
    plan = build_plan(three_phases("reversed"), corpora)
    with pytest.raises(
        ValueError, match=r"tokens_per_batch must be at least the seq_len 80 of phase 'long', got 79"
    ):
        plan.steps(79)
    for rows in (range(0), range(-1, 2), range(plan.num_rows, plan.num_rows + 1)):
        with pytest.raises(
            ValueError, match=r"Plan\.batch: rows must be within 0\.\.\d+ and not empty, got range"
        ):
            plan.batch(rows)


# ------------------------------------------------------------------------------------------------ anchor


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize(
    "shares", [(0.3, 0.2, 0.1), (0.5, 0.013, 0.333), (0.9, 0.0, 0.7), (0.02, 0.6, 0.05)], ids=str
)
def test_plan_every_prefix_keeps_the_anchor_share(
    corpora: dict[str, Corpus], shares: tuple[float, ...], order: Any
) -> None:
    curriculum = three_phases(order, shares)
    long = dataclasses.replace(curriculum.phases[3], tokens=80 * 1000)
    plan = build_plan(dataclasses.replace(curriculum, phases=(*curriculum.phases[:3], long)), corpora)
    anchor, tokens = np.cumsum(plan.row_is_anchor * plan.row_tokens), np.cumsum(plan.row_tokens)
    ends = np.cumsum([phase.num_rows * phase.seq_len for phase in plan.curriculum.phases])
    begins = np.concatenate([[0], ends[:-1]])
    inside = [np.clip(tokens - begin, 0, end - begin) for begin, end in zip(begins, ends, strict=True)]
    exact = sum(np.outer([phase.anchor_share for phase in plan.curriculum.phases], 1.0) * np.stack(inside))
    longest = 80  # the others' rows are that long, so an anchor row may come that late
    assert (np.abs(anchor - exact) <= np.maximum(0.005 * tokens, longest)).all()
    for end in ends[:-1] if order == "forward" else []:
        at = int(np.searchsorted(tokens, end))
        assert tokens[at] == end and abs(anchor[at] - exact[at]) <= 3 * 80 / 2
    assert abs(anchor[-1] - exact[-1]) <= 3 * longest / 2


def test_plan_every_prefix_keeps_the_sources_weights(corpora: dict[str, Corpus]) -> None:
    weights = {"easy": 5.0, "hard/law": 2.0, "hard/notes": 1.0, "base": 0.0}
    plan = build_plan(Curriculum((Phase("p", weights, 8 * 10 * 100, 10),)), corpora)
    assert plan.sources == ["easy", "hard/law", "hard/notes"]
    for number, weight in enumerate([5, 2, 1]):
        counts = np.cumsum(plan.row_source == number)
        assert counts[-1] == 100 * weight
        assert np.abs(counts - np.arange(1, 801) * weight / 8).max() <= 1


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_plan_anchor_rows_come_in_one_sequence(corpora: dict[str, Corpus], order: Any) -> None:
    def anchor_rows(plan: Plan) -> list[Any]:
        return [row_table(plan, row) for row in range(plan.num_rows) if plan.row_is_anchor[row]]

    plain, other = build_plan(three_phases(), corpora), build_plan(three_phases(order), corpora)
    assert len(anchor_rows(plain)) == 9 + 12 + 4
    assert anchor_rows(plain) == anchor_rows(other) and plain.anchor_hash == other.anchor_hash
    began = [(np.cumsum(p.row_tokens) - p.row_tokens)[p.row_is_anchor] for p in (plain, other)]
    assert np.abs(began[0] - began[1]).max() < 80  # the same global place, to within a row


# ------------------------------------------------------------------------------------------------ order, hash


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_plan_order_permutes_rows_and_nothing_else(corpora: dict[str, Corpus], order: Any) -> None:
    plain, other = build_plan(three_phases(), corpora), build_plan(three_phases(order), corpora)

    def rows(plan: Plan) -> Counter[Any]:
        keys = zip(
            plan.row_source.tolist(), plan.row_is_anchor.tolist(), map(str, range(plan.num_rows)), strict=True
        )
        return Counter((source, anchor, str(row_table(plan, int(row)))) for source, anchor, row in keys)

    assert rows(plain) == rows(other)
    assert plain.rows_hash == other.rows_hash
    assert (plain.hash == other.hash) == (order in ("forward", "easy_to_hard"))
    own = [Counter(p.row_phase[~p.row_is_anchor].tolist()) for p in (plain, other)]
    assert own[0] == own[1] and sum(len(rows) for _, rows in other.blocks) == other.num_rows


def test_plan_shuffled_is_seeded_mixes_phases_and_leaves_a_pinned_one(corpora: dict[str, Corpus]) -> None:
    plain, one = build_plan(three_phases(), corpora), build_plan(three_phases("shuffled"), corpora)
    assert one.hash == build_plan(three_phases("shuffled"), corpora).hash
    assert build_plan(three_phases("shuffled", seed=1), corpora).hash != one.hash
    base = plain.blocks[0][1]
    assert [row_table(one, row) for row in base] == [row_table(plain, row) for row in base]
    assert [phase.name for phase, _ in one.blocks] == ["base", "shuffled-1", "shuffled-2", "shuffled-3"]
    for _, rows in one.blocks[2:]:
        assert set(one.row_phase[rows.start : rows.stop].tolist()) == {1, 2, 3}


def test_plan_reversed_runs_own_rows_backwards_but_not_a_pinned_phase(corpora: dict[str, Corpus]) -> None:
    plain, back = build_plan(three_phases(), corpora), build_plan(three_phases("reversed"), corpora)
    assert [phase.name for phase, _ in back.blocks] == ["base", "long", "mixed", "easy"]

    def own(plan: Plan, name: str) -> list[Any]:
        rows = next(rows for phase, rows in plan.blocks if phase.name == name)
        return [row_table(plan, row) for row in rows if not plan.row_is_anchor[row]]

    assert own(plain, "base") == own(back, "base")
    for name in ("easy", "mixed", "long"):
        assert own(plain, name) == own(back, name)[::-1]


def change_phase(i: int, **changes: Any) -> Callable[[Curriculum], Curriculum]:
    def change(curriculum: Curriculum) -> Curriculum:
        phases = list(curriculum.phases)
        phases[i] = dataclasses.replace(phases[i], **changes)
        return dataclasses.replace(curriculum, phases=tuple(phases))

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda c: dataclasses.replace(c, seed=1),
        lambda c: dataclasses.replace(c, anchor={"base/english": 2, "base/code": 1}),
        lambda c: dataclasses.replace(c, phases=c.phases[1:]),
        lambda c: dataclasses.replace(c, phases=(c.phases[0], c.phases[2], c.phases[1], c.phases[3])),
        change_phase(1, name="simple"),
        change_phase(1, tokens=1000 + 32),
        change_phase(1, seq_len=31),
        change_phase(1, anchor_share=0.35),
        change_phase(2, sources={"easy": 1, "hard/law": 2}),
        change_phase(2, sources={"easy": 1, "hard/notes": 2.5}),
    ],
    ids=["seed", "anchor", "fewer", "swapped", "name", "tokens", "seq_len", "share", "weight", "source"],
)
def test_plan_hash_changes_with_the_curriculum(
    corpora: dict[str, Corpus], change: Callable[[Curriculum], Curriculum]
) -> None:
    plain, other = build_plan(three_phases(), corpora), build_plan(change(three_phases()), corpora)
    assert plain.hash != other.hash
    assert plain.rows_hash != other.rows_hash


def test_plan_hash_changes_with_a_corpus_it_uses(corpora: dict[str, Corpus]) -> None:
    plain = build_plan(three_phases(), corpora).hash
    assert build_plan(three_phases(), dict(reversed(corpora.items()))).hash == plain
    assert build_plan(three_phases(), {**corpora, "unused": corpora["easy"]}).hash == plain
    for name, corpus in corpora.items():
        fewer = {**corpora, name: corpus.select(range(len(corpus)))}  # the same documents by another name
        assert build_plan(three_phases(), fewer).hash != plain


def test_plan_seed_changes_epochs_and_epochs_differ(corpora: dict[str, Corpus]) -> None:
    per_epoch = int((corpora["easy"].lengths - 1).sum())
    orders = []
    for seed in (0, 1):
        plan = build_plan(Curriculum((Phase("p", {"easy": 1}, 3 * per_epoch, 1),), seed=seed), corpora)
        documents = plan.segments[:, 1].reshape(3, per_epoch)
        orders += [tuple(dict.fromkeys(epoch.tolist())) for epoch in documents]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(orders)) == 6


RECORDED_HASH = "39d05bbdc6468d620f3cc82c6070685d64575882abf8f1783b61b1ab67694524"
RECORDED_ROWS_HASH = "3c8c32f5ae197ecc63ce96a50584ebc0f348c16a2085fabf87891dc0f5299be1"


def test_plan_hash_is_the_recorded_one(corpora: dict[str, Corpus]) -> None:
    """In every process, on every machine. If these change, no older run can resume: raise PLAN_VERSION too."""
    plan = build_plan(three_phases("reversed"), corpora)
    assert [plan.hash, plan.rows_hash] == [RECORDED_HASH, RECORDED_ROWS_HASH]


# ------------------------------------------------------------------------------------------------ report, errors


def test_plan_describe_adds_up(corpora: dict[str, Corpus]) -> None:
    plan = build_plan(three_phases(), corpora)
    told = json.loads(json.dumps(plan.describe()))
    assert (told["hash"], told["rows"], told["tokens"]) == (plan.hash, plan.num_rows, plan.num_tokens)
    assert told["tokens"] == sum(phase["tokens"] for phase in told["phases"]) == 320 + 992 + 1984 + 2960
    assert told["tokens"] == sum(source["tokens"] for source in told["sources"])
    assert told["anchor_tokens"] == sum(phase["anchor"]["tokens"] for phase in told["phases"])
    for phase in told["phases"]:
        own = sum(source["tokens"] for source in phase["sources"].values())
        assert own + phase["anchor"]["tokens"] == phase["tokens"]
        assert math.isclose(phase["anchor_share"], phase["anchor"]["tokens"] / phase["tokens"])
    by_name = {(source["name"], source["anchor"]): source for source in told["sources"]}
    assert set(by_name) == {
        ("base", False), ("easy", False), ("hard/law", False), ("hard", False),
        ("base/english", True), ("base/code", True),
    }  # fmt: skip
    hard = by_name["hard", False]
    assert hard["documents"] == 5
    assert math.isclose(hard["epochs"], hard["tokens"] / int((corpora["hard"].lengths - 1).sum()))


def test_phase_and_curriculum_errors() -> None:
    good: dict[str, Any] = {"name": "p", "sources": {"a": 1.0}, "tokens": 100, "seq_len": 10}
    for changes, message in [
        ({"name": ""}, "Phase: name must not be empty"),
        ({"seq_len": 0}, "Phase: 'p' seq_len must be at least 1, got 0"),
        ({"tokens": 9}, "Phase: 'p' tokens must be at least seq_len = 10, got 9"),
        ({"anchor_share": 1.0}, r"Phase: 'p' anchor_share must be in \[0, 1\), got 1.0"),
        ({"anchor_share": math.nan}, r"Phase: 'p' anchor_share must be in \[0, 1\), got nan"),
        ({"max_epochs": 0.0}, "Phase: 'p' max_epochs must be above 0, got 0.0"),
        ({"learning_rate": 0.0}, "Phase: 'p' learning_rate must be above 0 and finite, got 0.0"),
        ({"batch_tokens": 9}, "Phase: 'p' batch_tokens must be at least seq_len = 10, each, got 9"),
        ({"batch_tokens": (10, 9)}, r"Phase: 'p' batch_tokens must be .*, got \(10, 9\)"),
        ({"batch_tokens": ()}, r"Phase: 'p' batch_tokens must be .*, got \(\)"),
        ({"sources": {}}, "Phase: 'p' sources must have finite weights >= 0, one of them above 0, got {}"),
        ({"sources": {"a": 0.0}}, "Phase: 'p' sources must have finite weights"),
        ({"sources": {"a": -1.0, "b": 2.0}}, "Phase: 'p' sources must have finite weights"),
        ({"sources": {"a": math.inf}}, "Phase: 'p' sources must have finite weights"),
        ({"sources": {"a": 1, "a/b": 1}}, "Phase: 'p' sources must not name a corpus and one of its sources"),
    ]:
        with pytest.raises(ValueError, match=message):
            Phase(**{**good, **changes})
    p, q = Phase(**good), Phase(**{**good, "name": "q", "anchor_share": 0.5})
    for arguments, message in [
        (((),), r"phases must be at least one, with different names, got \[\]"),
        (((p, p),), r"phases must be at least one, with different names, got \['p', 'p'\]"),
        (((p, q),), "anchor must have finite weights >= 0, one of them above 0, got {}"),
        (((p,), {}, "hard_to_easy"), "order must be .* or a tuple of phase names, got 'hard_to_easy'"),
        (((p,), {}, "shufled"), "order must be .*got 'shufled'; did you mean 'shuffled'"),
        (((p,), {}, ("p", "p")), r"order must name each of \['p'\] once, got \['p', 'p'\]"),
    ]:
        with pytest.raises(ValueError, match=f"Curriculum: {message}"):
            Curriculum(*arguments)


def test_build_plan_errors(corpora: dict[str, Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(sources: dict[str, float], anchor: dict[str, float] | None = None, **changes: Any) -> Plan:
        settings: dict[str, Any] = {
            "tokens": 400,
            "seq_len": 10,
            "anchor_share": 0.25 if anchor else 0,
            **changes,
        }
        return build_plan(Curriculum((Phase("p", sources, **settings),), anchor or {}), corpora)

    for arguments, changes, message in [
        (({"none": 1.0},), {}, r"source 'none' must name one of the corpora \['base', 'easy', 'hard'\]"),
        (({"easy": 1.0}, {"none/x": 1.0}), {}, "source 'none/x' must name one of the corpora"),
        (({"hard/poetry": 1.0},), {}, r"source 'hard/poetry' must name one of \['law', 'notes'\]"),
        (
            ({"easy": 1.0, "hard": 0.001},),
            {},
            "phase 'p' must have a row for every source of weight > 0, got none for 'hard' among 40 rows",
        ),
        (
            ({"easy": 1.0}, {"base": 1.0}),
            {"tokens": 10, "anchor_share": 0.9},
            "phase 'p' must have .* got none for 'easy' among 1 rows",
        ),
        (
            ({"easy": 1.0}, {"base": 1.0}),
            {"anchor_share": 0.01},
            "phase 'p' must have a row for its anchor_share 0.01, got none among 40 rows",
        ),
        (
            ({"easy": 1.0}, {"base/english": 1.0, "base/code": 0.01}),
            {},
            "anchor must have a row for every source of weight > 0, got none for 'base/code' among 10 anchor",
        ),
        (
            ({"hard/notes": 1.0},),
            {"max_epochs": 2.5},
            r"phase 'p' must read 'hard/notes' at most max_epochs = 2.5 times, got \d+\.\d+ by its end",
        ),
    ]:
        with pytest.raises(ValueError, match=f"build_plan: {message}"):
            plan(*arguments, **changes)
    with pytest.raises(ValueError, match="build_plan: corpora must have names without \"/\", got 'a/b'"):
        build_plan(three_phases(), {**corpora, "a/b": corpora["easy"]})
    monkeypatch.setattr(corpora["easy"], "tokenizer_fingerprint", "another")
    with pytest.raises(
        ValueError, match=r"corpora must share one tokenizer, got {'base': 'bytes', 'easy': 'another'"
    ):
        build_plan(three_phases(), corpora)


def test_plan_max_epochs_allows_exactly_that_many(corpora: dict[str, Corpus]) -> None:
    per_epoch = int((corpora["easy"].lengths - 1).sum())
    for tokens, fits in [(2 * per_epoch, True), (2 * per_epoch + 1, False)]:
        curriculum = Curriculum((Phase("p", {"easy": 1}, tokens, 1, max_epochs=2),))
        if fits:
            build_plan(curriculum, corpora)
        else:
            with pytest.raises(ValueError, match=r"max_epochs = 2 times, got 2\.0"):
                build_plan(curriculum, corpora)


def test_plan_of_ten_million_tokens_is_vectorised(corpora: dict[str, Corpus]) -> None:
    """100,000 documents; one interpreted step a token would take minutes, one a segment seconds."""
    lengths = np.random.default_rng(0).integers(2, 200, 100_000)
    table = np.zeros(len(lengths), DOCUMENT)
    table["length"], table["offset"] = lengths, np.cumsum(lengths) - lengths
    tokens = np.arange(lengths.sum()) % 256
    corpus = Corpus(corpora["easy"].index, table, [tokens.astype(np.uint16)], "synthetic")
    phases = tuple(Phase(f"{n}", {"big": 1}, 3_500_000, n, anchor_share=0.1) for n in (256, 512, 1024))
    plan = build_plan(Curriculum(phases, {"big": 1}), {"big": corpus})
    assert plan.num_tokens > 10_000_000
    own = ~np.repeat(plan.row_is_anchor, np.diff(plan.row_segments))
    begin = table["offset"][plan.segments[own, 1]] + plan.segments[own, 2]
    size = int(lengths.sum())
    edges = np.bincount(begin, minlength=size) - np.bincount(begin + plan.segments[own, 3], minlength=size)
    assert set(np.cumsum(edges).tolist()) == {0, 1}  # 9.45 M of 9.95 M pairs: none of them twice

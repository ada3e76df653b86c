"""The plan: rows hold exactly the documents; what it reports, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from curriculum_cases import document_pairs, make_corpora, row_table, three_phases

from hebatron.curriculum.build import Curriculum, Phase, Plan, build_plan
from hebatron.data.corpus import DOCUMENT
from hebatron.data.prepare import Corpus


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


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
    read = hard["tokens"] + by_name["hard/law", False]["tokens"]  # its documents, under both names
    assert math.isclose(hard["epochs"], read / int((corpora["hard"].lengths - 1).sum()))


def test_phase_and_curriculum_errors() -> None:
    good: dict[str, Any] = {"name": "p", "sources": {"a": 1.0}, "tokens": 100, "seq_len": 10}
    for changes, message in [
        ({"name": ""}, "Phase: name must not be empty"),
        ({"seq_len": 0}, "Phase: 'p' seq_len must be at least 1, got 0"),
        ({"tokens": 9}, "Phase: 'p' tokens must be at least seq_len = 10, got 9"),
        ({"anchor_share": 1.0}, r"Phase: 'p' anchor_share must be in \[0, 1\), got 1.0"),
        ({"anchor_share": math.nan}, r"Phase: 'p' anchor_share must be in \[0, 1\), got nan"),
        ({"max_epochs": 0.0}, "Phase: 'p' max_epochs must be above 0, got 0.0"),
        ({"max_epochs": {"a": math.nan}}, "Phase: 'p' max_epochs must be above 0, got {'a': nan}"),
        (
            {"max_epochs": {"b": 1.0}},
            r"Phase: 'p' max_epochs must be by the names of the sources \['a'\], got \['b'\]",
        ),
        (
            {"max_epochs": {"": 3.0}},
            r"Phase: 'p' max_epochs must be by the names of the sources \['a'\], got \[''\]",
        ),
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
        (((p,), {}, "forward", 0, -1.0), "anchor_max_epochs must be above 0, got -1.0"),
        (
            ((p, q), {"a": 1.0}, "forward", 0, {"z": 1.0}),
            r"anchor_max_epochs must be by the names of the sources \['a'\], got \['z'\]",
        ),
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


def test_plan_limits_repetition_by_source_and_of_the_anchor(corpora: dict[str, Corpus]) -> None:
    """Each limit at what the plan reads (fits) and just under it (refused, by name): two phases, two lengths."""

    def plan(limits: Any = None, anchor: Any = None) -> Plan:
        phases = (
            Phase("p", {"easy": 1, "hard/law": 1}, 1600, 16, anchor_share=0.25),
            Phase("q", {"easy": 1, "hard/law": 3}, 3200, 32, anchor_share=0.5, max_epochs=limits),
        )
        weights = {"base/english": 1.0, "base/code": 2.0}
        return build_plan(Curriculum(phases, weights, anchor_max_epochs=anchor), corpora)

    free = plan()
    read = {(s["name"], s["anchor"]): s["epochs"] for s in free.describe()["sources"]}
    assert len(set(read.values())) == 4 and max(read.values()) == read["base/code", True]
    for name in ("easy", "hard/law"):
        assert plan({name: read[name, False]}).hash == free.hash
        message = rf"phase 'q' must read '{name}' at most max_epochs = [\d.]+ times, got [\d.]+ by its end"
        with pytest.raises(ValueError, match=message):
            plan({name: 0.999 * read[name, False]})
    for name in ("base/english", "base/code"):
        assert plan(anchor={name: read[name, True]}).hash == free.hash
        with pytest.raises(ValueError, match=f"the anchor must read '{name}' at most anchor_max_epochs = "):
            plan(anchor={name: 0.999 * read[name, True]})
    with pytest.raises(ValueError, match="the anchor must read 'base/code' at most"):
        plan(anchor=0.999 * read["base/code", True])
    assert plan(max(read.values()), max(read.values())).hash == free.hash


def test_plan_limits_count_documents_whatever_name_reads_them(corpora: dict[str, Corpus]) -> None:
    """hard and hard/law share documents: what one phase reads under one name counts in the other's limit."""
    pairs, law = corpora["hard"].lengths - 1, corpora["hard"].source_ids == 0
    whole, part = int(pairs.sum()), int(pairs[law].sum())
    assert corpora["hard"].sources[0] == "law" and 0 < part < whole

    def plan(*phases: tuple[str, int, Any]) -> Plan:
        written = [
            Phase(f"p{i}", {name: 1}, n, 1, max_epochs=most) for i, (name, n, most) in enumerate(phases)
        ]
        return build_plan(Curriculum(tuple(written)), corpora)

    told = plan(("hard/law", 2 * part, 2), ("hard", whole, (2 * part + whole) / whole)).describe()["sources"]
    epochs = {source["name"]: source["epochs"] for source in told}
    assert epochs == {"hard/law": 3.0, "hard": (2 * part + whole) / whole}
    for phases, name, read in [
        ((("hard/law", 2 * part, None), ("hard", whole, 1.5)), "hard", 2 * part + whole),
        ((("hard", whole, None), ("hard/law", part, {"hard/law": 1.9})), "hard/law", 2 * part),
        ((("hard/notes", whole, None), ("hard/law", part + 1, 1)), "hard/law", part + 1),
    ]:
        with pytest.raises(ValueError, match=rf"phase 'p1' must read '{name}' at most .* \({read} tokens of"):
            plan(*phases)


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

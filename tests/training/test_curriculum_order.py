"""The anchor keeps its share and its places, order permutes rows and nothing else, hashes say so."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from curriculum_cases import ORDERS, change_phase, make_corpora, row_table, three_phases

from hebatron.curriculum.build import Curriculum, Phase, Plan, build_plan
from hebatron.data.prepare import Corpus


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


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

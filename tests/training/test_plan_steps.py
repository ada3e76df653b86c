"""Steps of a plan: at the same places in every order, and dealt to any number of ranks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from curriculum_cases import ORDERS, change_phase, make_corpora, three_phases

from hebatron.curriculum.build import Curriculum, Phase, build_plan
from hebatron.curriculum.plan import rank_rows
from hebatron.data.prepare import Corpus


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


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

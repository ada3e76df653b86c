"""What the CPU benchmarks are made of: floors, cases, and how rivals take turns. Nothing is timed here."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from hebatron.presets import dense_like, nano_30b_a3b, scaled_570m
from hebatron.sizes import count_memory, count_parameters

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import common  # noqa: E402
import floors  # noqa: E402
from floors import GEMMA_27B, H100, MISTRAL_24B, Work  # noqa: E402

NOUNS = ("norm", "conv", "ssd", "moe", "attention", "loss")


# worked out by hand, operator by operator, before this code existed: ms on an H100 at 800 TFLOP/s and 3.0 TB/s
@pytest.mark.parametrize(
    ("work", "ours", "gemma", "mistral"),
    [
        (Work(1, 1024), 25.7, 69.0, 58.9),
        (Work(1, 4096), 44.0, 276, 239),
        (Work(1, 65536), 818, 4822, 5473),
        (Work(1, 1, 1024), 2.19, 18.2, 15.3),
        (Work(1, 1, 65536), 2.32, 20.0, 18.9),
        (Work(32, 1, 1024), 17.8, 23.8, 17.2),
        (Work(32, 1, 65536), 22.0, 80.1, 130),
        (Work(1, 65536, all_logits=True), 876, None, None),
    ],
)
def test_floors_equal_the_worked_figures(work, ours, gemma, mistral):
    for model, wanted in ((nano_30b_a3b(), ours), (GEMMA_27B, gemma), (MISTRAL_24B, mistral)):
        if wanted is not None:
            got = 1e3 * floors.seconds(floors.forward(model, work), H100)
            assert got == pytest.approx(wanted, rel=6e-3), model


def test_floors_batch_that_fits_counts_weights_and_caches():
    rows = {row["case"]: row for row in floors.real_sizes()}
    capped = rows["decode, context 65,536, the batch that fits 80 GB"]
    assert capped["batch"] == {"30B-A3B": 30, "Gemma-3-27B": 3, "Mistral-Small-24B": 2}
    assert capped["ratio"] == pytest.approx(
        {"30B-A3B": 1.0, "Gemma-3-27B": 11.2, "Mistral-Small-24B": 15.9}, rel=1e-2
    )


def test_floors_decode_streams_the_active_parameters_and_the_cache():
    config, context = scaled_570m(), 8192
    streamed = floors.streamed(floors.forward(config, Work(1, 1, context)))
    counts, memory = count_parameters(config), count_memory(config, context + 1)
    vectors = 4e5  # norms, convolutions: not counted as streamed
    states = 2 * memory.bytes_scan_state + memory.bytes_kv
    assert streamed == pytest.approx(2 * counts.active_with_head + states, abs=vectors)


def test_floors_one_expert_less_is_used_when_routing_cannot_reach_it():
    config = nano_30b_a3b()
    few, many = (
        sum(op.streamed for op in floors.experts(config, Work(1, tokens)) if op.name == "experts up")
        for tokens in (1, 4096)
    )
    assert few == pytest.approx(6 * 2688 * 1856 * 2)
    assert many == pytest.approx(128 * 2688 * 1856 * 2)


def test_floors_an_mlp_of_equal_active_width_costs_what_the_experts_cost():
    config = scaled_570m()
    one = floors.operations(floors.forward(config, Work(1, 2048)))
    other = floors.operations(floors.forward(dense_like(config, "active"), Work(1, 2048)))
    assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("noun", NOUNS)
def test_cases_have_names_of_their_own_and_work_for_their_limit(noun):
    cases = importlib.import_module(f"bench_{noun}").cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) > 0
    assert all(case.work > 0 and case.operations > 0 and case.bytes > 0 for case in cases)


def slept(monkeypatch, **seconds):
    """A case whose rivals say how long they took, with a limit of 100 a second."""
    monkeypatch.setattr(common, "peak", lambda limit: 100.0)
    calls = {name: (lambda s=s: s) for name, s in seconds.items()}
    return common.Case("slept", lambda: calls, operations=10.0, limit="bfloat16", tokens=4)


def test_interleaved_takes_a_calls_own_time_and_says_its_share_of_the_limit(monkeypatch):
    row = common.interleaved(slept(monkeypatch, ours=0.5, other=1.5), rounds=3)
    assert row["rivals"]["ours"] == {
        "ms": 500.0,
        "g_per_s": 0.0,
        "percent_of_limit": 20.0,
        "times_slower_than_ours": 1.0,
        "rounds": 3,
        "tokens_per_s": 8.0,
    }
    assert row["rivals"]["other"]["times_slower_than_ours"] == 3.0


def test_interleaved_gives_a_slow_rival_fewer_rounds(monkeypatch):
    case = slept(monkeypatch, ours=0.5, slow=3.0, slowest=20.0)
    row = common.interleaved(case, rounds=9, seconds_each=10.0)
    assert {name: value["rounds"] for name, value in row["rivals"].items()} == {
        "ours": 9,
        "slow": 3,
        "slowest": 1,
    }
    assert row["rivals"]["slowest"]["times_slower_than_ours"] == 40.0


def test_interleaved_times_what_says_no_time_itself():
    case = common.Case("sum", lambda: {"torch": lambda: torch.ones(1000).sum()}, bytes=4000)
    assert common.interleaved(case, rounds=2, buffer_bytes=2**12)["rivals"]["torch"]["ms"] > 0

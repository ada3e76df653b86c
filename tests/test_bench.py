"""What the CPU benchmarks are made of: floors, cases, and how rivals take turns. Nothing is timed here."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import hebatron
from hebatron import cli
from hebatron.presets import dense_like, nano_30b_a3b, scaled_570m
from hebatron.sizes import count_memory, count_parameters

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import common  # noqa: E402
import floors  # noqa: E402
import suite  # noqa: E402
from floors import GEMMA_27B, H100, MISTRAL_24B, Work  # noqa: E402

NOUNS = ("norm", "conv", "ssd", "linear", "moe", "attention", "loss")


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
    routers = config.layers_block_type.count("moe") * config.hidden_size * config.n_routed_experts  # in fp32
    assert streamed == pytest.approx(2 * (counts.active_with_head + routers) + states, abs=vectors)


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


def kernel_row(case, **times):
    rivals = {
        name: {"ms": t, "g_per_s": 1.0, "percent_of_limit": 9.0, "times_slower_than_native": t, "rounds": 9}
        for name, t in times.items()
    }
    return {
        "case": case,
        "noun": "norm",
        "limit": "read",
        "limit_g_per_s": 30.0,
        "operations": 8.0,
        "bytes": 4.0,
        "rivals": rivals,
    }


@pytest.mark.parametrize(("now", "falls"), [(5.0, False), (3.41, False), (3.39, True), (0.9, True)])
def test_fallen_names_a_peer_whose_ratio_is_15_percent_below_the_stored(now, falls):
    before = kernel_row("a case", native=1.0, torch=4.0, other=2.0)
    found = suite.fallen(before, kernel_row("a case", native=1.0, torch=now, other=2.0))
    assert found == ([f"a case: torch took 4.0 times our time when stored, now {now}"] if falls else [])


def test_usable_asks_for_a_peak_near_the_stored_one():
    row = {"peak_g_per_s": 460.0}
    assert suite.usable([455.0, 433.0], row)
    assert not suite.usable([455.0, 431.0], row)


def test_merged_keeps_what_was_not_measured_and_what_a_busy_machine_gave(capsys):
    def row(case, peak, noun="norm"):
        return kernel_row(case, native=1.0) | {"peak_g_per_s": peak, "noun": noun}

    old = [row("one", 460.0), row("two", 460.0), row("three", 460.0, "loss")]
    new = [row("four", 100.0), row("one", 440.0), row("two", 400.0)]
    found = {r["case"]: r["peak_g_per_s"] for r in suite.merged(old, new)}
    assert found == {"one": 440.0, "two": 460.0, "four": 100.0, "three": 460.0}
    assert list(found)[-1] == "three"
    assert "two: not stored, peak 400.0 GFLOP/s, then 460.0" in capsys.readouterr().out


def test_comparable_refuses_another_processor_and_other_threads():
    here = common.machine()
    assert suite.comparable(here) is None
    assert suite.comparable(here | {"cpu": "another"}) == f"stored with cpu another, here {here['cpu']}"
    assert "threads" in suite.comparable(here | {"threads": 99})


def test_suite_writes_the_rows_the_limits_and_a_figure(tmp_path, monkeypatch, capsys):
    def fake(case, *_):
        return {k: v for k, v in kernel_row(case.name, native=1.0, torch=2.0).items() if k != "noun"}

    monkeypatch.setattr(suite, "limits", lambda: {"bfloat16": 4e11, "float32": 2e11, "read": 3e10})
    monkeypatch.setattr(suite, "interleaved", fake)
    monkeypatch.setattr(suite, "peak", lambda limit: 4e11)
    checked = []
    for noun in ("norm", "conv"):
        monkeypatch.setattr(
            importlib.import_module(f"bench_{noun}"), "check", lambda n=noun: checked.append(n)
        )
    suite.run_suite(["norm", "conv"], ["gated bfloat16"], 1, 1.0, tmp_path / "new")
    suite.run_suite(["conv"], ["update"], 1, 1.0, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert written["limits"] == {"bfloat16": 400.0, "float32": 200.0, "read": 30.0}
    assert [row["noun"] for row in written["results"]] == ["norm", "norm", "conv", "conv"]
    assert checked == ["norm", "conv"] and {row["peak_g_per_s"] for row in written["results"]} == {400.0}
    assert (tmp_path / "new" / "roofline.png").read_bytes()[:4] == b"\x89PNG"
    assert "torch 2.00" in capsys.readouterr().out


def test_suite_refuses_a_folder_of_another_machines_run(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "limits", lambda: {})
    run = common.machine() | {"cpu": "another", "results": [], "limits": {}}
    (tmp_path / "kernels.json").write_text(json.dumps(run))
    with pytest.raises(
        ValueError, match="bench: --out must hold a run of this machine, got one stored with cpu"
    ):
        suite.run_suite([], [], 1, 1.0, tmp_path)


def test_stored_run_holds_ratios_of_cases_that_exist():
    cases = {case.name for noun in NOUNS for case in importlib.import_module(f"bench_{noun}").cases()}
    run = suite.stored()
    assert {row["case"] for row in run["results"]} <= cases and run["limits"]["bfloat16"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["nom"],
            "bench: NOUN must be one of norm, conv, ssd, linear, moe, attention, loss, got nom; did you mean 'norm'?",
        ),
        (["norm", "--rounds", "0"], "bench: --rounds must be >= 1, got 0"),
    ],
)
def test_verb_refuses_what_it_cannot_time(argv, message, capsys):
    assert cli.main(["bench", *argv]) == 2
    assert capsys.readouterr().err == f"hebatron: {message}\n"


def test_verb_says_that_an_installation_has_no_benchmarks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hebatron, "__file__", str(tmp_path / "site-packages" / "hebatron" / "__init__.py"))
    assert cli.main(["bench"]) == 2
    assert "must be a source checkout, which has the benchmarks" in capsys.readouterr().err

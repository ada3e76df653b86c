"""Router health: figures by language, the alarm, and a collapsed router that training rebalances."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import Silent, toy_config, write_corpora

from hebatron.model import Router
from hebatron.router import LanguageCounts, alarms, overlap, router_load
from hebatron.training.metrics import PlainReporter, read_metrics
from hebatron.training.run import Run, open_run
from hebatron.training.train import evaluate_held_out, train, train_step


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


def test_router_load_is_one_when_even_and_counts_the_dead() -> None:
    assert router_load(torch.tensor([5, 5, 5, 5])) == {
        "mean": 5.0,
        "max_over_ideal": 1.0,
        "dead": 0.0,
        "load_entropy": pytest.approx(1.0),
    }
    collapsed = router_load(torch.tensor([20, 0, 0, 0]))
    assert collapsed == {"mean": 5.0, "max_over_ideal": 4.0, "dead": 0.75, "load_entropy": pytest.approx(0.0)}
    assert router_load(torch.zeros(4, dtype=torch.int64))["dead"] == 1.0
    assert router_load(torch.tensor([7]))["load_entropy"] == 1.0


def test_overlap_is_the_shared_part_of_two_loads() -> None:
    he, en = torch.tensor([6, 2, 0, 0]), torch.tensor([0, 10, 10, 20])
    assert overlap(he, he * 3) == pytest.approx(1.0) and overlap(he, en) == pytest.approx(0.25)
    assert overlap(he, torch.tensor([0, 0, 1, 1])) == 0.0 and overlap(he, torch.zeros(4)) == 0.0


def mixed_run(root: Path, run_dir: Path, tokens_per_microbatch: int) -> Run:
    """One step of 16 rows, Hebrew and English."""
    config = toy_config(root, run_dir, tokens_per_batch=256, tokens_per_microbatch=tokens_per_microbatch)
    phase = replace(config.phases[0], sources={"he": 1.0, "en": 1.0})
    return open_run(replace(config, phases=(phase,)))


def test_token_languages_are_those_of_the_documents(root: Path, tmp_path: Path) -> None:
    run = mixed_run(root, tmp_path, 256)
    rows = run.steps[0].rows
    languages, language_T = run.plan.token_languages(rows)
    batch = run.plan.batch(rows)
    of_row = [run.plan.sources[source] for source in batch.source.tolist()]
    lengths = batch.row_starts.diff().tolist()
    assert languages == ["en", "he"] and len(set(of_row)) == 2
    expected = [name.split("/")[0] for name, n in zip(of_row, lengths, strict=True) for _ in range(n)]
    assert [languages[i] for i in language_T.tolist()] == expected


@pytest.mark.parametrize("recompute", [False, True])
def test_health_is_the_same_under_accumulation_and_checkpointing(
    root: Path, tmp_path: Path, recompute: bool
) -> None:
    records = []
    for tokens in (256, 64, 16):
        run = mixed_run(root, tmp_path, tokens)
        run.model.activation_checkpointing = recompute
        record, counts = train_step(run)
        languages = record["router_languages"]
        for layer, total in enumerate(counts):
            mean = sum(languages[language][layer]["mean"] for language in ("en", "he"))
            assert mean == pytest.approx(sum(total) / len(total))  # each choice counted once, in one language
        records.append((languages, record["expert_overlap"]))
    assert records[0] == records[1] == records[2] and 0 < records[0][1][0] <= 1


def test_evaluation_moves_no_router(root: Path, tmp_path: Path) -> None:
    run = mixed_run(root, tmp_path, 256)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    _, health = evaluate_held_out(run)
    assert set(health["router_languages"]) == {"en", "he"} and len(health["expert_overlap"]) == 1
    assert evaluate_held_out(run)[1] == health
    after = run.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_language_that_did_not_occur_is_left_out() -> None:
    assert LanguageCounts().health() == {"router_languages": {}, "expert_overlap": []}


def test_alarms_name_layer_and_language_and_need_enough_tokens() -> None:
    even, one = router_load(torch.tensor([50] * 8)), router_load(torch.tensor([400] + [0] * 7))
    health = {"router_languages": {"he": [even, one], "en": [even, even]}, "expert_overlap": [0.9, 0.04]}
    entropy, apart = alarms(health)
    assert "layer 1 has a load entropy of 0.00 ln E on he" in entropy and "88% of its experts idle" in entropy
    assert "layer 1 shares 4% of its load between Hebrew and English (under 10%)" in apart
    few = router_load(torch.tensor([40] + [0] * 7))
    assert alarms({"router_languages": {"he": [few]}, "expert_overlap": []}) == []
    assert alarms({"router_languages": {"he": [few], "en": [even]}, "expert_overlap": [0.0]}) == []


# ---------------------------------------------------------------- collapse


def collapse(run: Run) -> None:
    """All tokens to the first two experts: their bias outweighs every difference of scores."""
    for module in run.model.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias[:2] = 0.25


def entropies(run: Run) -> Iterator[float]:
    for _ in range(run.total):
        record, _ = train_step(run)
        yield record["router"][0]["load_entropy"]


@pytest.mark.parametrize(
    ("coefficient", "rate", "recovers"),
    [(0.0, 0.0, False), (0.0, 0.05, True), (10.0, 0.0, True), (10.0, 0.05, True)],
)
def test_a_collapsed_router_is_rebalanced_by_loss_or_bias_and_not_without(
    root: Path, tmp_path: Path, coefficient: float, rate: float, recovers: bool
) -> None:
    config = toy_config(root, tmp_path, router_aux_coefficient=coefficient, router_bias_rate=rate)
    phase = replace(config.phases[0], tokens=64 * 24)
    optimizer = replace(config.optimizer, learning_rate=1e-2)
    run = open_run(replace(config, phases=(phase,), optimizer=optimizer))
    collapse(run)
    values = list(entropies(run))
    assert values[0] == pytest.approx(1 / 3)  # ln 2 / ln 8
    assert (values[-1] > 0.65) is recovers, values  # three seeds: at most 0.55 without, at least 0.72 with


def test_a_run_with_a_collapsed_router_raises_the_alarm(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hebatron.router.ENOUGH_CHOICES", 1)
    config = toy_config(root, tmp_path, router_bias_rate=0.0)
    real = open_run

    def collapsed(*arguments: object) -> Run:
        run = real(*arguments)  # type: ignore[arg-type]
        collapse(run)
        return run

    monkeypatch.setattr("hebatron.training.train.open_run", collapsed)
    train(config, stop_after=5, reporter=Silent())
    base, record = (r for r in read_metrics(tmp_path) if r["kind"] == "eval")
    assert (base["phase"], record["step"]) == ("base", 5)  # Hebrew is first read at step 5
    assert not [line for line in base["alarms"] if " on he " in line or "Hebrew" in line]
    assert [line for line in base["alarms"] if "ln E on en" in line]
    assert [line for line in record["alarms"] if "ln E on he" in line]
    PlainReporter(12, 1).event(record)
    assert "step 5  worth a look: router: expert layer 0" in capsys.readouterr().out

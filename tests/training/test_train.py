"""One training step: accumulation, router, schedule, learning, gradients that are not finite."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import Silent, state_bits, toy_config, toy_train, write_corpora

from hebatron.curriculum.build import Phase
from hebatron.curriculum.plan import Batch, Plan
from hebatron.model import Hebatron
from hebatron.training.checkpoint import checkpoints, load_checkpoint, model_tensors
from hebatron.training.metrics import read_metrics
from hebatron.training.optim import learning_rate, position_starts, step_learning_rate
from hebatron.training.run import Run, open_run
from hebatron.training.sections import RunConfig, ScheduleConfig
from hebatron.training.train import Diverged, evaluate_held_out, sample, train, train_step


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


def one_batch(root: Path, run_dir: Path, tokens_per_microbatch: int) -> RunConfig:
    config = toy_config(root, run_dir, tokens_per_batch=256, tokens_per_microbatch=tokens_per_microbatch)
    config = replace(config, phases=config.phases[:1])
    return replace(config, optimizer=replace(config.optimizer, grad_clip=0.0))


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("masked", [False, True])
def test_train_step_gives_the_same_gradient_for_any_number_of_microbatches(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    if masked:  # rows with very different numbers of loss-bearing tokens: a mean of means would be wrong
        whole = Plan.batch

        def hide(plan: Plan, rows: range) -> Batch:
            batch = whole(plan, rows)
            labels = batch.labels.view(len(rows), -1).clone()
            for i, row in enumerate(rows):
                labels[i, : (7 * row) % 16] = -100
            return replace(batch, labels=labels.flatten())

        monkeypatch.setattr(Plan, "batch", hide)
    runs, records = [], []
    for tokens in (256, 64, 16):
        run = open_run(one_batch(root, tmp_path, tokens))
        record, counts = train_step(run)
        runs.append((run, counts))
        records.append(record)
    first, first_counts = runs[0]
    assert records[0]["tokens"] == 256 and records[0]["loss_tokens"] == (136 if masked else 256)
    for (run, counts), record in zip(runs[1:], records[1:]):
        assert counts == first_counts and record["loss_tokens"] == records[0]["loss_tokens"]
        assert record["loss"] == pytest.approx(records[0]["loss"], abs=1e-6)
        assert record["aux_loss"] == pytest.approx(records[0]["aux_loss"], abs=1e-6)
        assert record["grad_norm"] == pytest.approx(records[0]["grad_norm"], rel=1e-6)
        for (name, ours), theirs in zip(run.model.named_parameters(), first.model.parameters()):
            assert ours.grad is not None and theirs.grad is not None
            error = float((ours.grad - theirs.grad).abs().max())
            assert error <= 1e-6 * max(1.0, float(theirs.grad.abs().max())), name


def test_train_step_moves_the_router_bias_against_the_load_of_the_whole_batch(
    root: Path, tmp_path: Path
) -> None:
    run = open_run(one_batch(root, tmp_path, 16))
    _, counts = train_step(run)
    load = torch.tensor(counts[0], dtype=torch.float32)
    (bias,) = [
        buffer for name, buffer in run.model.named_buffers() if name.endswith("e_score_correction_bias")
    ]
    expected = run.config.training.router_bias_rate * torch.sign(load.mean() - load)
    assert int(load.sum()) == 2 * 256 and torch.equal(bias, expected)


def test_train_step_adds_the_router_loss_with_its_coefficient(root: Path, tmp_path: Path) -> None:
    gradients = []
    for coefficient in (0.0, 1.0):
        config = one_batch(root, tmp_path, 64)
        config = replace(config, training=replace(config.training, router_aux_coefficient=coefficient))
        run = open_run(config)
        train_step(run)
        (gate,) = [p for name, p in run.model.named_parameters() if name.endswith("gate.weight")]
        assert gate.grad is not None
        gradients.append(gate.grad)
    assert float((gradients[0] - gradients[1]).abs().max()) > 1e-5


def test_train_step_uses_the_schedule_of_its_position(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path)
    toy_train(config)
    run = open_run(config)
    assert position_starts(run.steps) == [(0, 0), (1, 4), (2, 8)]
    rates = [record["lr"] for record in read_metrics(tmp_path) if record["kind"] == "step"]
    peak = config.optimizer.learning_rate
    assert rates == [learning_rate(step, 12, config.schedule, peak, [0, 4, 8]) for step in range(12)]


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_order_changes_order_and_nothing_else_in_the_metrics(root: Path, tmp_path: Path, order: str) -> None:
    records = []
    for name in ("forward", order):
        config = toy_config(root, tmp_path / name)
        phases = (
            replace(config.phases[0], pinned=True),
            replace(config.phases[1], batch_tokens=(32, 128)),
            config.phases[2],
        )
        toy_train(replace(config, phases=phases, order=name))
        records.append([r for r in read_metrics(tmp_path / name) if r["kind"] == "step"])
    assert [r["lr"] for r in records[0]] == [r["lr"] for r in records[1]]
    ends = [np.cumsum([r["tokens"] for r in some]) for some in records]
    anchors = [np.cumsum([r["anchor_tokens"] for r in some]) for some in records]
    for pair in (ends, anchors):
        assert pair[0][-1] == pair[1][-1] and np.abs(pair[0] - pair[1]).max() <= 32


def test_step_learning_rate_follows_the_ramp_and_the_phases_own_schedule(root: Path, tmp_path: Path) -> None:
    config = toy_config(root, tmp_path)
    base, formal, long = config.phases
    formal = replace(formal, batch_tokens=(32, 128))
    long = replace(long, learning_rate=1e-2, batch_tokens=(32, 128), schedule="cosine")
    config = replace(config, phases=(base, formal, long), schedule=ScheduleConfig("constant", warmup_steps=0))
    steps = open_run(config).steps
    assert [(s.position, s.batch_tokens) for s in steps] == [
        *[(0, 64)] * 4, *[(1, 32)] * 4, (1, 128), *[(2, 32)] * 4, (2, 128)
    ]  # fmt: skip
    rates = [step_learning_rate(config, steps, step) for step in range(len(steps))]
    assert rates[:4] == [3e-3] * 4
    assert rates[4:9] == pytest.approx([*[3e-3 * math.sqrt(1 / 2)] * 4, 3e-3 * math.sqrt(2)])
    shape = [learning_rate(i, 5, ScheduleConfig("cosine", warmup_steps=0), 1e-2) for i in range(5)]
    assert rates[9:] == pytest.approx([*(rate / 2 for rate in shape[:4]), shape[4]])


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_train_learns_a_learnable_toy(root: Path, tmp_path: Path, compute_dtype: str) -> None:
    config = toy_config(root, tmp_path, tokens_per_batch=256, tokens_per_microbatch=256)
    config = replace(
        config,
        model=replace(config.model, compute_dtype=compute_dtype),
        phases=(Phase("he", {"he": 1.0}, tokens=256 * 40, seq_len=32, anchor_share=0.25),),
        optimizer=replace(config.optimizer, learning_rate=1e-2),
    )
    before, _ = evaluate_held_out(open_run(config))
    result = toy_train(config)
    losses = [record["loss"] for record in read_metrics(tmp_path) if record["kind"] == "step"]
    assert losses[0] > 5.5 and losses[-1] < 2.5
    assert all(result.bits_per_byte[source] < 0.5 * before[source] for source in ("he", "en"))
    tensors = model_tensors(Hebatron.from_pretrained(tmp_path / "final"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_evaluation_and_samples_change_nothing(root: Path, tmp_path: Path) -> None:
    run = open_run(toy_config(root, tmp_path))
    train_step(run)
    before, rng, gradients = state_bits(run), torch.get_rng_state(), [p.grad for p in run.model.parameters()]
    kept = [None if gradient is None else gradient.clone() for gradient in gradients]
    scores, text = evaluate_held_out(run), sample(run, "שלום")
    assert state_bits(run) == before and torch.equal(torch.get_rng_state(), rng) and run.model.training
    for parameter, gradient in zip(run.model.parameters(), kept):
        assert gradient is not None and parameter.grad is not None and torch.equal(parameter.grad, gradient)
    assert evaluate_held_out(run) == scores and sample(run, "שלום") == text


# ---------------------------------------------------------------- gradients that are not finite


def poison(run: Run, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the gradient of `steps` (1-based) NaN."""
    weight = run.model.lm_head.weight
    weight.register_hook(lambda gradient: gradient * torch.nan if run.step + 1 in steps else gradient)
    monkeypatch.setattr("hebatron.training.train.open_run", lambda config: run)


def test_train_skips_a_bad_step_and_saves_no_checkpoint_of_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(root, tmp_path, checkpoint_every=4)
    run = open_run(config)
    poison(run, monkeypatch, {4, 5})
    seen: list[tuple[int, dict[str, bytes]]] = []
    train(config, stop_after=7, reporter=Silent(lambda step: seen.append((step, state_bits(run)))))
    states = dict(seen)
    assert states[3] == states[4] == states[5] and states[5] != states[6]
    # due at 4, written after the first good step, 6; then where the run stopped
    assert [folder.name for folder in checkpoints(tmp_path / "checkpoints")] == ["step-000007", "step-000006"]
    records = {record["step"]: record for record in read_metrics(tmp_path) if record["kind"] == "step"}
    assert [records[step]["skipped"] for step in range(3, 7)] == [False, True, True, False]
    assert records[4]["loss"] is None and records[4]["grad_norm"] is None
    alarms = [record for record in read_metrics(tmp_path) if record["kind"] == "alarm"]
    assert [(record["step"], record["phase"]) for record in alarms] == [(4, "base"), (5, "formal")]
    rows = run.steps[3].rows
    assert alarms[0]["rows"] == [rows.start, rows.stop - 1] and list(alarms[0]["documents"]) == ["en"]
    assert "not finite" in alarms[0]["what"]


def test_train_stops_after_bad_steps_in_a_row_and_keeps_the_last_good_state(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(root, tmp_path, checkpoint_every=1)
    run = open_run(config)
    poison(run, monkeypatch, {4, 5, 6})
    with pytest.raises(
        Diverged, match=r"step 6 \(phase formal, rows 20\.\.23\), bad step number 3 in a row; .*lm_head"
    ):
        train(config, reporter=Silent())
    assert checkpoints(tmp_path / "checkpoints")[0].name == "step-000003"
    records = [(record["kind"], record["step"]) for record in read_metrics(tmp_path)]
    assert records[-2:] == [("step", 6), ("alarm", 6)] and read_metrics(tmp_path)[-2]["skipped"]
    good = open_run(config)
    load_checkpoint(tmp_path / "checkpoints/step-000003", good.model, good.optimizer)
    assert state_bits(good) == state_bits(run)


def test_train_stopped_on_a_bad_step_keeps_the_earlier_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(root, tmp_path, checkpoint_every=2)
    poison(open_run(config), monkeypatch, set())
    run = open_run(config)
    poison(run, monkeypatch, {5})
    reporter = Silent()
    train(config, stop_after=5, reporter=reporter)
    assert checkpoints(tmp_path / "checkpoints")[0].name == "step-000004"
    assert any("step 5 was not finite: no checkpoint of it" in note for note in reporter.notes)

"""The KL term: its value and gradients, what it divides by, a base that never moves, resume, less forgetting."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import checkpoint_bits, state_bits, toy_config, toy_train, write_corpora

from hebatron.curriculum.build import Phase
from hebatron.model import Hebatron
from hebatron.training import anchor_kl
from hebatron.training.anchor_kl import AnchorTerm, kl_divergence, open_base, weights_hash
from hebatron.training.metrics import read_metrics, without_time
from hebatron.training.run import Run, open_run
from hebatron.training.runconfig import config_hash
from hebatron.training.sections import AnchorKLConfig, ModelSection, RunConfig
from hebatron.training.train import evaluate_held_out, train_step

# ---------------------------------------------------------------- the divergence


def make(tokens: int, width: int, base_width: int, entries: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(tokens, width), (entries, width), (tokens, base_width), (entries, base_width)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def textbook(x: Tensor, weight: Tensor, base_x: Tensor, base_weight: Tensor, temperature: float) -> Tensor:
    q = torch.softmax(x.double() @ weight.double().T / temperature, 1)
    p = torch.softmax(base_x.double() @ base_weight.double().T / temperature, 1)
    return (p * (p / q).log()).sum()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens a chunk."""
    monkeypatch.setattr(anchor_kl, "CHUNK_MIN_TOKENS", 7)
    monkeypatch.setattr(anchor_kl, "CHUNK_LOGITS", 1)


# tokens, width, base width, entries: one of each; under, at and past a chunk; many chunks; nothing
SHAPES = [(1, 1, 1, 1), (6, 4, 3, 9), (7, 5, 5, 40), (8, 3, 6, 13), (50, 6, 4, 11), (0, 4, 4, 9)]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(("tokens", "width", "base_width", "entries"), SHAPES)
def test_kl_divergence_is_the_textbook_one_with_its_gradients(
    small_chunks: None, tokens: int, width: int, base_width: int, entries: int, temperature: float
) -> None:
    tensors = make(tokens, width, base_width, entries, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors[:2]]
    value, want = kl_divergence(*tensors, temperature), textbook(*tensors, temperature)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)
    for upstream in (1.0, -2.5):
        scale = torch.tensor(upstream, dtype=torch.float64)
        got = torch.autograd.grad(value, leaves, scale, retain_graph=True)
        for ours, theirs in zip(got, torch.autograd.grad(want, leaves, scale, retain_graph=True)):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_kl_divergence_gradcheck(small_chunks: None) -> None:
    x, weight, base_x, base_weight = make(9, 3, 4, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: kl_divergence(a, b, base_x, base_weight, 1.7),
        [x.requires_grad_(), weight.requires_grad_()],
    )


def test_kl_divergence_of_equal_models_is_zero_and_else_positive() -> None:
    x, weight, base_x, _ = make(30, 8, 8, 50, torch.float32)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    same = kl_divergence(x, weight, x.detach(), weight.detach())
    assert same.dtype == torch.float32 and float(same.detach()) == 0.0
    assert all(not gradient.any() for gradient in torch.autograd.grad(same, leaves))
    assert float(kl_divergence(x, weight, base_x, weight).detach()) > 1.0
    assert 1e5 < float(kl_divergence(x * 1e4, weight, base_x, weight).detach()) < torch.inf


def test_kl_divergence_in_bfloat16_has_fp32_logits() -> None:
    tensors = make(40, 16, 16, 60, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in tensors[:2]]
    value = kl_divergence(*tensors)
    torch.testing.assert_close(value.double(), textbook(*tensors, 1.0), rtol=1e-5, atol=0)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors[:2]]
    want = torch.autograd.grad(textbook(*wide, *tensors[2:], 1.0), wide)
    for ours, theirs in zip(torch.autograd.grad(value, leaves), want):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 1e-2


class Largest(TorchDispatchMode):
    """The most elements of any result."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, out.numel() if isinstance(out, Tensor) else 0)
        return out


def test_kl_divergence_never_holds_the_logits(small_chunks: None) -> None:
    tensors = make(70, 4, 4, 90, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors[:2]]
    with Largest() as seen:
        torch.autograd.grad(kl_divergence(*tensors), leaves)
    assert seen.elements == 7 * 90  # one chunk, of the 70 x 90


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (3, 5)}, r"x_TD must be \(T, D\) beside a head .* got \(3, 5\) torch.float32 and \(9, 4\)"),
        ({2: (3,)}, r"base_x_TD must be \(T, D\)"),
        ({2: (2, 4)}, "base must have the model's 3 tokens and 9 entries, got 2 and 9"),
        ({3: (8, 4)}, "base must have the model's 3 tokens and 9 entries, got 3 and 8"),
    ],
)
def test_kl_divergence_refuses_what_does_not_fit(change: dict[int, tuple[int, ...]], message: str) -> None:
    tensors = make(3, 4, 4, 9, torch.float32)
    for place, shape in change.items():
        tensors[place] = torch.ones(shape)
    with pytest.raises(ValueError, match=f"kl_divergence: {message}"):
        kl_divergence(*tensors)
    with pytest.raises(ValueError, match="kl_divergence: temperature must be > 0, got 0"):
        kl_divergence(*make(3, 4, 4, 9, torch.float32), 0.0)


# ---------------------------------------------------------------- the term of a step


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, and root/base/final: a model that knows English."""
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    config = toy_config(folder, folder / "base", tokens_per_batch=256, tokens_per_microbatch=256)
    config = replace(
        config,
        phases=(Phase("base", {"en": 1.0}, tokens=256 * 30, seq_len=16),),
        optimizer=replace(config.optimizer, learning_rate=1e-2),
    )
    assert toy_train(config).final == folder / "base/final"
    return folder


def kl_config(root: Path, run_dir: Path, coefficient: float = 0.5, **training: Any) -> RunConfig:
    """12 steps of 16 tokens' rows: a phase without anchor rows and two with."""
    config = toy_config(root, run_dir, **training)
    return replace(
        config,
        model=ModelSection(path=root / "base/final"),
        phases=(replace(config.phases[0], sources={"he": 1.0}), *config.phases[1:]),
        anchor_kl=AnchorKLConfig(coefficient),
    )


def whole_step(root: Path, run_dir: Path, microbatch: int, term: AnchorKLConfig, **training: Any) -> Run:
    """One step of 16 rows, 4 of them of the anchor, far from the base."""
    config = kl_config(root, run_dir, tokens_per_batch=256, tokens_per_microbatch=microbatch, **training)
    phase = replace(config.phases[1], tokens=256)
    clip = replace(config.optimizer, grad_clip=0.0)
    run = open_run(replace(config, phases=(phase,), optimizer=clip, anchor_kl=term))
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return run


def test_anchor_term_is_the_mean_kl_of_the_anchor_tokens_and_adds_its_gradient(
    root: Path, tmp_path: Path
) -> None:
    term = AnchorKLConfig(0.7, temperature=2.0)
    runs = []
    for settings in (term, AnchorKLConfig()):
        torch.manual_seed(1)
        runs.append(whole_step(root, tmp_path, 256, settings))
    held, plain = runs
    model, base = Hebatron(held.model.config), Hebatron.from_pretrained(root / "base/final")
    model.load_state_dict(held.model.state_dict())
    batch = held.plan.batch(held.steps[0].rows)
    rows = [range(row, row + 1) for row in batch.rows if held.plan.row_is_anchor[row]]
    kl = torch.zeros(())
    for row in rows:  # each anchor row alone, all logits
        part = held.plan.batch(row)
        q, p = (m(part.input_ids, cu_seqlens=part.cu_seqlens).logits[0] / 2.0 for m in (model, base))
        kl = kl + torch.nn.functional.kl_div(
            q.log_softmax(1), p.detach().log_softmax(1), reduction="sum", log_target=True
        )
    mean = kl / (len(rows) * 16)
    gradients = torch.autograd.grad(0.7 * 4.0 * mean, list(model.parameters()))
    record, without = train_step(held)[0], train_step(plain)[0]
    assert len(rows) == 4 and float(mean.detach()) > 0.01 and "anchor_kl" not in without
    assert record["anchor_kl"] == pytest.approx(float(mean.detach()), rel=1e-4)
    assert record["loss"] == without["loss"]  # cross-entropy alone, as in every run
    for ours, theirs, term_gradient in zip(held.model.parameters(), plain.model.parameters(), gradients):
        assert ours.grad is not None and theirs.grad is not None
        error = float((ours.grad - theirs.grad - term_gradient).abs().max())
        assert error <= 1e-5 * max(1.0, float(ours.grad.abs().max()))


def test_anchor_term_is_the_same_for_any_number_of_microbatches(root: Path, tmp_path: Path) -> None:
    runs = []
    for microbatch, recompute in ((256, False), (64, False), (16, False), (64, True)):
        torch.manual_seed(1)
        run = whole_step(root, tmp_path, microbatch, AnchorKLConfig(5.0))
        run.model.activation_checkpointing = recompute
        runs.append((train_step(run)[0], run.model))
    for record, model in runs[1:]:
        assert record["anchor_kl"] == pytest.approx(runs[0][0]["anchor_kl"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(runs[0][0]["grad_norm"], rel=1e-5)
        for ours, theirs in zip(model.parameters(), runs[0][1].parameters()):
            assert ours.grad is not None and theirs.grad is not None
            assert float((ours.grad - theirs.grad).abs().max()) <= 1e-5 * max(
                1.0, float(theirs.grad.abs().max())
            )


def test_a_step_without_anchor_rows_has_no_term(root: Path, tmp_path: Path) -> None:
    bits = []
    for coefficient in (0.0, 100.0):
        run = open_run(kl_config(root, tmp_path, coefficient))
        for _ in range(4):  # the first phase has no anchor
            record, _ = train_step(run)
        bits.append(state_bits(run))
    assert bits[0] == bits[1] and record["anchor_kl"] is None
    assert train_step(run)[0]["anchor_kl"] > 0


def test_the_base_is_frozen(root: Path, tmp_path: Path) -> None:
    run = open_run(kl_config(root, tmp_path, 10.0))
    assert run.base is not None and not run.base.model.training
    before = run.base.hash
    assert (
        before == weights_hash(run.base.model) == weights_hash(Hebatron.from_pretrained(root / "base/final"))
    )
    for _ in range(run.total):
        train_step(run)
    assert weights_hash(run.base.model) == before != weights_hash(run.model)
    assert all(p.grad is None and not p.requires_grad for p in run.base.model.parameters())
    with torch.no_grad():  # the hash sees one bit, of a buffer too
        dict(run.base.model.named_buffers())["backbone.layers.1.mixer.gate.e_score_correction_bias"][0] += (
            1e-6
        )
    assert weights_hash(run.base.model) != before


def test_coefficient_zero_has_the_bits_of_a_run_without_the_term(root: Path, tmp_path: Path) -> None:
    zero = kl_config(root, tmp_path / "zero", 0.0)
    zero = replace(zero, anchor_kl=AnchorKLConfig(0.0, tmp_path / "no-such-folder"))
    plain = replace(kl_config(root, tmp_path / "plain"), anchor_kl=AnchorKLConfig())
    assert config_hash(zero) == config_hash(plain) != config_hash(kl_config(root, tmp_path))
    for config in (zero, plain):
        toy_train(config, stop_after=6)
    assert checkpoint_bits(tmp_path / "zero") == checkpoint_bits(tmp_path / "plain")


def test_resume_around_the_phase_boundaries_with_the_term_is_bit_exact(root: Path, tmp_path: Path) -> None:
    total = toy_train(kl_config(root, tmp_path / "whole")).step
    for step in (3, 4, 5, 8, 9, total):
        toy_train(kl_config(root, tmp_path / "parts"), stop_after=step)
    assert checkpoint_bits(tmp_path / "parts") == checkpoint_bits(tmp_path / "whole")
    records = [list(map(without_time, read_metrics(tmp_path / name))) for name in ("parts", "whole")]
    assert records[0] == records[1]


def test_resume_refuses_another_base_or_coefficient(root: Path, tmp_path: Path) -> None:
    toy_train(kl_config(root, tmp_path / "run"), stop_after=1)
    other = Hebatron(Hebatron.from_pretrained(root / "base/final").config, seed=3)
    other.save_pretrained(tmp_path / "other")
    config = kl_config(root, tmp_path / "run")
    with pytest.raises(ValueError, match=r"of another: anchor_kl.base: [0-9a-f]{12} -> [0-9a-f]{12} \(hash"):
        toy_train(replace(config, anchor_kl=AnchorKLConfig(0.5, tmp_path / "other")))
    with pytest.raises(ValueError, match=r"anchor_kl.coefficient: 0.5 -> 0.25"):
        toy_train(kl_config(root, tmp_path / "run", 0.25))
    copied = replace(config, anchor_kl=AnchorKLConfig(0.5, root / "base/final"))  # the same weights by name
    assert toy_train(copied, stop_after=2).step == 2


def test_the_term_refuses_a_run_without_base_or_anchor(root: Path, tmp_path: Path) -> None:
    config = kl_config(root, tmp_path)
    fresh = replace(config, model=ModelSection(preset="tiny", fields={"hidden_size": 16}))
    with pytest.raises(ValueError, match=r"anchor_kl.base must be given for a run from fresh weights"):
        toy_train(fresh)
    given = replace(fresh, anchor_kl=AnchorKLConfig(0.5, root / "base/final"))  # of another width
    assert toy_train(given, stop_after=5).step == 5
    with pytest.raises(
        ValueError, match=r"anchor_kl.coefficient must be 0 where no phase has an anchor_share"
    ):
        toy_train(replace(config, phases=config.phases[:1]))
    model = Hebatron.from_pretrained(root / "base/final").config
    for name, changes, message in [
        (
            "vocabulary",
            {"vocab_size": 400},
            "must have the model's vocabulary of 320, got 400 in .*vocabulary",
        ),
        (
            "short",
            {"max_position_embeddings": 16},
            "anchor's rows of 32 tokens, got max_position_embeddings 16",
        ),
    ]:
        Hebatron(model.replace(**changes)).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            open_run(replace(config, anchor_kl=AnchorKLConfig(0.5, tmp_path / name)))


# ---------------------------------------------------------------- what it is for


@pytest.mark.parametrize("seed", [0, 1])
def test_the_term_keeps_the_model_near_its_base_and_forgets_less(
    root: Path, tmp_path: Path, seed: int
) -> None:
    """10 steps of Hebrew with 2 % of English. Seen: English 0.484 bits per byte before; after them 0.96 and 1.07
    without the term, 0.58 and 0.57 with it, Hebrew 0.64 and 0.65 against 0.69 and 0.73."""
    found, before = [], 0.0
    for coefficient in (0.0, 3.0):
        config = kl_config(root, tmp_path, coefficient, tokens_per_batch=256, seed=seed)
        phase = Phase("he", {"he": 1.0}, tokens=256 * 10, seq_len=16, anchor_share=0.02)
        config = replace(config, phases=(phase,), optimizer=replace(config.optimizer, learning_rate=1e-2))
        run = open_run(config)
        before = evaluate_held_out(run)[0]["en"]
        for _ in range(run.total):
            train_step(run)
        base = run.base or open_base(replace(config, anchor_kl=AnchorKLConfig(1.0)), run.model)
        batch = run.plan.batch(range(run.plan.num_rows))
        term = AnchorTerm(base, AnchorKLConfig(1.0), [batch])
        with torch.no_grad():
            hidden = run.model(batch.input_ids, cu_seqlens=batch.cu_seqlens, logits_to_keep=1).hidden_TD
            kl = float(term.divergence(run.model, batch, hidden)) / term.tokens
        found.append((kl, evaluate_held_out(run)[0]["en"]))
    without, held = found
    assert held[0] < 0.5 * without[0], found
    assert held[1] - before < 0.5 * (without[1] - before), (before, found)

"""The model's own promises: losses, dtypes, statistics, checkpointing, initialisation, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import CONFIG, ends, make_model, random_ids, relative
from torch import Tensor

import hebatron.model
from hebatron import Hebatron, presets
from hebatron.model import load_entropy, sequence_balance_loss


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return make_model(CONFIG, seed=4)


# ---- outputs


def test_loss_is_the_cross_entropy_of_aligned_labels(model: Hebatron) -> None:
    ids, labels = random_ids(CONFIG, 2, 9, seed=1), random_ids(CONFIG, 2, 9, seed=2)
    labels[0, :5] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    out = model(ids, mask, labels=labels)
    assert out.logits is None and out.cache is None
    logits = model(ids, mask).logits
    wanted = F.cross_entropy(logits[mask == 1], labels[mask == 1])
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    total = model(ids, mask, labels=labels, loss_reduction="sum").loss
    assert total.item() == pytest.approx(wanted.item() * 10, rel=1e-5)


def test_logits_to_keep_are_the_last_real_tokens(model: Hebatron) -> None:
    ids = random_ids(CONFIG, 3, 8)
    mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5, [0] * 7 + [1]])
    full = model(ids, mask).logits
    kept = model(ids, mask, logits_to_keep=2).logits
    assert kept.shape == (3, 2, 64)
    wanted = torch.stack([full[0, 6:], full[1, 1:3], torch.stack([torch.zeros(64), full[2, 7]])])
    assert relative(kept, wanted) <= 1e-6 and not kept[2, 0].any()
    packed = model(ids.flatten(), cu_seqlens=ends(0, 8, 8, 24), logits_to_keep=1).logits
    assert packed.shape == (3, 1, 64) and not packed[1].any()
    both = model(ids, labels=ids, logits_to_keep=3)
    assert both.loss is not None and both.logits.shape == (3, 3, 64)


def test_flat_and_one_row_packs_are_the_same(model: Hebatron) -> None:
    ids = random_ids(CONFIG, 1, 12)
    cu = ends(0, 5, 12)
    assert torch.equal(model(ids, cu_seqlens=cu).logits, model(ids[0], cu_seqlens=cu).logits)


# ---- router statistics


def test_balance_loss_matches_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 6, generator=g, dtype=torch.float64)
    ids = logits.topk(2).indices
    cu = ends(0, 7, 7, 20, 30)
    total = 0.0
    for begin, end in ((0, 7), (7, 20), (20, 30)):
        scores = logits[begin:end].sigmoid()
        mean_scores = (scores / scores.sum(1, keepdim=True)).mean(0)
        shares = torch.bincount(ids[begin:end].flatten(), minlength=6).double() / (2 * (end - begin))
        total += (end - begin) / 30 * 6 * (shares * mean_scores).sum().item()
    assert sequence_balance_loss(logits, ids, cu).item() == pytest.approx(total, rel=1e-12)
    one = sequence_balance_loss(logits[:7], ids[:7], None)
    assert one.item() == pytest.approx(
        sequence_balance_loss(logits[:7], ids[:7], ends(0, 7)).item(), rel=1e-12
    )
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_balance_loss(x, ids, cu), logits)


def test_balance_loss_is_one_when_balanced_and_grows_to_e_over_k() -> None:
    ids = torch.arange(8).view(4, 2)
    assert sequence_balance_loss(torch.zeros(4, 8), ids, None).item() == pytest.approx(1.0)
    collapsed = torch.full((4, 8), -30.0)
    collapsed[:, :2] = 30.0
    assert sequence_balance_loss(collapsed, torch.tensor([[0, 1]] * 4), None).item() == pytest.approx(
        8 / 2, rel=1e-5
    )


def test_load_entropy_goes_from_one_to_zero() -> None:
    assert load_entropy(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(1.0)
    assert load_entropy(torch.tensor([0, 20, 0, 0])).item() == 0.0
    assert load_entropy(torch.tensor([10, 10, 0, 0])).item() == pytest.approx(0.5)


def test_statistics_count_every_choice_once_with_checkpointing_too(model: Hebatron) -> None:
    ids, labels = random_ids(CONFIG, 2, 20, seed=1), random_ids(CONFIG, 2, 20, seed=2)

    def run() -> tuple[list[Tensor], list[Tensor], Tensor]:
        model.zero_grad()
        out = model(ids, labels=labels)
        (out.loss + 0.01 * sum(s.loss for s in out.aux)).backward()
        return [s.counts for s in out.aux], [p.grad.clone() for p in model.parameters()], out.loss.detach()

    counts, gradients, loss = run()
    assert [int(c.sum()) for c in counts] == [80, 80] and counts[0].dtype == torch.int64
    model.activation_checkpointing = True
    try:
        again_counts, again_gradients, again_loss = run()
    finally:
        model.activation_checkpointing = False
    assert torch.equal(loss, again_loss)
    assert all(torch.equal(a, b) for a, b in zip(counts, again_counts, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, again_gradients, strict=True))


def test_checkpointing_recomputes_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIG, seed=4)
    calls: list[int] = []
    forward = hebatron.model.Layer.forward

    def counted(self: Any, *args: Any) -> Any:
        calls.append(self.index)
        return forward(self, *args)

    monkeypatch.setattr(hebatron.model.Layer, "forward", counted)
    model.activation_checkpointing = True
    model(random_ids(CONFIG, 1, 9), labels=random_ids(CONFIG, 1, 9)).loss.backward()
    assert calls == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    calls.clear()
    with torch.no_grad():
        model(random_ids(CONFIG, 1, 9))
    assert calls == [0, 1, 2, 3, 4]


def test_router_bias_moves_against_the_load() -> None:
    model = make_model(CONFIG, seed=4)
    before = [
        m.e_score_correction_bias.clone() for m in model.modules() if isinstance(m, hebatron.model.Router)
    ]
    counts = [torch.tensor([0, 4, 8, 4, 4, 4, 4, 4]), torch.tensor([4] * 8)]
    model.update_router_bias(counts, rate=0.125)
    after = [m.e_score_correction_bias for m in model.modules() if isinstance(m, hebatron.model.Router)]
    assert torch.allclose(after[0] - before[0], torch.tensor([0.125, 0, -0.125, 0, 0, 0, 0, 0]))
    assert torch.equal(after[1], before[1])
    with pytest.raises(ValueError, match="counts_per_layer must have 2 entries, got 1"):
        model.update_router_bias(counts[:1], rate=0.1)
    with pytest.raises(ValueError, match=r"counts must have shape \(8,\), got \(3,\)"):
        model.update_router_bias([counts[0], torch.ones(3)], rate=0.1)


# ---- dtypes and initialisation


CASTS: dict[str, Callable[[Hebatron], Hebatron]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_sensitive_tensors_stay_fp32_whatever_the_cast(cast: str) -> None:
    model = make_model(CONFIG, seed=4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    CASTS[cast](model)
    for name, t in model.state_dict().items():
        if name.endswith(("A_log", ".D", "dt_bias", "gate.weight", "e_score_correction_bias")):
            assert t.dtype == torch.float32 and torch.equal(t, before[name]), name
        else:
            assert t.itemsize == 2, name
    assert all(t.dtype == torch.float64 for t in model.double().state_dict().values())


def test_bfloat16_compute_keeps_fp32_masters_and_gradients() -> None:
    model = Hebatron(CONFIG, compute_dtype=torch.bfloat16, seed=1)
    ids = random_ids(CONFIG, 2, 9)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and model(ids).logits.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    exact = Hebatron(CONFIG, seed=1)(ids, labels=ids).loss
    assert out.loss.item() == pytest.approx(exact.item(), rel=1e-2)
    cache = model.new_cache(2)
    for n in range(9):
        model(ids[:, n : n + 1], cache=cache)
    assert cache.mamba[0].ssm.dtype == torch.float32 and cache.pages[2].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.int64, "bfloat16"])
def test_other_compute_dtypes_are_refused_at_every_door(dtype: Any) -> None:
    message = "compute_dtype must be float32, bfloat16 or float64, got"
    with pytest.raises(ValueError, match=message):
        Hebatron(presets.tiny(), compute_dtype=dtype)
    model, ids = Hebatron(presets.tiny()), random_ids(presets.tiny(), 2, 4)
    with pytest.raises(ValueError, match=message):
        model.compute_dtype = dtype
    assert model.compute_dtype == torch.float32
    model.half()
    with pytest.raises(ValueError, match=message):
        model(ids)
    model.compute_dtype = torch.bfloat16
    assert torch.isfinite(model(ids).logits).all()


def test_double_is_double_throughout() -> None:
    model = make_model(CONFIG, seed=4)
    ids = random_ids(CONFIG, 1, 20)
    single = model(ids).logits
    double = model.double()(ids).logits
    assert double.dtype == torch.float64 and 0 < relative(single.double(), double) <= 1e-5
    cache = model.new_cache(1)
    parts = [model(ids[:, :13], cache=cache).logits, model(ids[:, 13:14], cache=cache).logits]
    assert relative(torch.cat(parts, 1), double[:, :14]) <= 1e-13


def test_initialisation_follows_the_recipe_and_the_seed() -> None:
    config = presets.quickstart(512)
    model, same, other = Hebatron(config, seed=1), Hebatron(config, seed=1), Hebatron(config, seed=2)
    state = model.state_dict()
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in state.items())
    assert not torch.equal(state["lm_head.weight"], other.state_dict()["lm_head.weight"])
    mixer = "backbone.layers.0.mixer."
    assert torch.allclose(state[mixer + "A_log"].exp(), torch.arange(1.0, 7.0))
    assert torch.equal(state[mixer + "D"], torch.ones(6))
    steps = F.softplus(state[mixer + "dt_bias"])
    assert steps.min() >= 0.001 - 1e-6 and steps.max() <= 0.1 + 1e-6
    assert state[mixer + "in_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state[mixer + "out_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(7), rel=0.05)
    assert torch.equal(state["backbone.norm_f.weight"], torch.ones(192))
    expert = state["backbone.layers.1.mixer.experts.down_proj"]
    assert expert.std().item() == pytest.approx(0.02, rel=0.05)
    assert not state["backbone.layers.1.mixer.gate.e_score_correction_bias"].any()
    exported = Hebatron(config.replace(time_step_min=0.0), seed=1)  # what an exported config says
    assert torch.isfinite(exported.backbone.layers[0].mixer.dt_bias).all()


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    Hebatron(presets.tiny())
    assert torch.equal(torch.rand(3), wanted)


# ---- compilation


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_packed_training_step_compiles_whole(backend: str) -> None:
    model = make_model(presets.tiny(), seed=4)
    ids, labels, cu = random_ids(CONFIG, 1, 24)[0], random_ids(CONFIG, 1, 24, seed=9)[0], ends(0, 9, 9, 24)
    model(ids, cu_seqlens=cu, labels=labels).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend=backend)(ids, cu_seqlens=cu, labels=labels)
    out.loss.backward()
    for p, gradient in zip(model.parameters(), wanted, strict=True):
        assert relative(p.grad, gradient) <= 1e-4

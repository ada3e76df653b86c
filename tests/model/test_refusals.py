"""What the model and its cache refuse, and what a refused or failing step leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import CONFIG, ends, make_model, random_ids, relative
from torch import Tensor

import hebatron.model
from hebatron import Cache, Hebatron, presets


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return make_model(CONFIG, seed=4)


IDS = torch.arange(8).view(2, 4)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": [[1, 2]]}, "input_ids must be a tensor, got list"),
    ({"input_ids": IDS.float()}, "input_ids must hold integers, got torch.float32"),
    ({"input_ids": IDS[0]}, r"input_ids must have shape \(B, L\), got \(4,\)"),
    ({"input_ids": IDS[:, :0]}, r"input_ids must hold at least one token, got shape \(2, 0\)"),
    ({"input_ids": IDS[:0]}, r"input_ids must hold at least one token, got shape \(0, 4\)"),
    ({"input_ids": IDS - 1}, r"input_ids must be in \[0, 64\), got -1"),
    ({"input_ids": IDS + 57}, r"input_ids must be in \[0, 64\), got 64"),
    (
        {"attention_mask": torch.ones(2, 5)},
        r"attention_mask must have the shape of input_ids \(2, 4\), got \(2, 5\)",
    ),
    ({"attention_mask": torch.ones(8)}, r"attention_mask must have the shape"),
    (
        {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])},
        "no holes inside a row, got several runs in row 1",
    ),
    (
        {"attention_mask": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])},
        "keep a token in every row, got none in row 0",
    ),
    ({"attention_mask": torch.full((2, 4), 2)}, "attention_mask must hold only 0 and 1"),
    ({"attention_mask": torch.full((2, 4), 0.5)}, "attention_mask must hold only 0 and 1"),
    ({"labels": IDS[:, :3]}, r"labels must have the shape of input_ids \(2, 4\), got \(2, 3\)"),
    ({"labels": IDS.int()}, "labels must be int64, got torch.int32"),
    ({"labels": IDS + 60}, r"labels must be in \[0, 64\), got 67"),
    ({"labels": IDS - 3}, r"labels must be in \[0, 64\), got -3"),
    ({"labels": IDS, "loss_reduction": "max"}, "loss_reduction must be 'mean', 'sum' or 'none', got 'max'"),
    ({"logits_to_keep": 0}, "logits_to_keep must be None or an integer >= 1, got 0"),
    ({"logits_to_keep": True}, "logits_to_keep must be None or an integer >= 1, got True"),
    ({"logits_to_keep": 2.5}, "logits_to_keep must be None or an integer >= 1, got 2.5"),
    ({"labels": IDS.tolist()}, "labels must be a tensor, got list"),
    ({"attention_mask": [[1] * 4] * 2}, "attention_mask must be a tensor, got list"),
    ({"input_ids": IDS[0], "cu_seqlens": [0, 4]}, "cu_seqlens must be a tensor, got list"),
    ({"cache": 3}, "cache must be a Cache, got int"),
    ({"input_ids": IDS.to("meta")}, "input_ids must be on cpu like the model, got meta"),
    ({"labels": IDS.to("meta")}, "labels must be on cpu like the model, got meta"),
    ({"labels": torch.full((2, 4), -100)}, "labels must hold a target for a mean loss, got only -100"),
    (
        {
            "labels": torch.tensor([[-100, -100, -100, 5]] * 2),
            "attention_mask": torch.tensor([[1, 1, 1, 0]] * 2),
        },
        "labels must hold a target for a mean loss",
    ),
    (
        {"input_ids": torch.zeros(1, 1025, dtype=torch.int64)},
        r"a sequence must stay within max_position_embeddings \(1024\), got 1025 tokens",
    ),
    (
        {"input_ids": torch.zeros(1030, dtype=torch.int64), "cu_seqlens": ends(0, 5, 1030)},
        r"a sequence must stay within max_position_embeddings \(1024\), got 1025 tokens",
    ),
    (
        {"cu_seqlens": ends(0, 4), "attention_mask": torch.ones(2, 4)},
        "cu_seqlens must come without attention_mask",
    ),
    ({"cu_seqlens": ends(0, 8)}, r"input_ids must be \(T,\) or \(1, T\), got \(2, 4\)"),
    ({"input_ids": IDS[0], "cu_seqlens": ends(0, 3)}, r"cu_seqlens must rise from 0 to 4 .*, got \[0, 3\]"),
    ({"input_ids": IDS[0], "cu_seqlens": ends(1, 4)}, "cu_seqlens must rise from 0 to 4"),
    ({"input_ids": IDS[0], "cu_seqlens": ends(0, 3, 2, 4)}, "cu_seqlens must rise from 0 to 4"),
    (
        {"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 4])},
        r"cu_seqlens must be int32 .* got torch.int64\[2\]",
    ),
    ({"input_ids": IDS[0], "cu_seqlens": ends(0)}, r"cu_seqlens must be int32 of shape \(Q \+ 1,\)"),
    ({"input_ids": IDS[0, :0], "cu_seqlens": ends(0, 0)}, "input_ids must hold at least one token"),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD, ids=[f"{next(iter(c))}-{n}" for n, (c, _) in enumerate(BAD)]
)
def test_wrong_argument_is_refused_by_name(model: Hebatron, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IDS} | change))


def same(a: Cache, b: Cache) -> bool:
    if a.lengths != b.lengths:
        return False
    states = all(
        torch.equal(a.mamba[n].conv, b.mamba[n].conv) and torch.equal(a.mamba[n].ssm, b.mamba[n].ssm)
        for n in a.mamba
    )
    return states and all(torch.equal(a.pages[n], b.pages[n]) for n in a.pages)


def test_refused_step_leaves_the_cache_as_it_was(model: Hebatron) -> None:
    cache = model.new_cache(2)
    model(IDS, cache=cache)
    before = cache.snapshot()
    bad: list[dict[str, Any]] = [
        {"input_ids": IDS[:1]},
        {"input_ids": IDS + 60},
        {"input_ids": torch.zeros(2, 1021, dtype=torch.int64)},
        {"input_ids": IDS, "attention_mask": torch.ones(2, 8)},
        {"input_ids": IDS, "labels": IDS + 60},
        {"input_ids": IDS[:, :1], "labels": IDS[:, :2]},
        {"input_ids": IDS[:, :1], "labels": torch.full((2, 1), -100)},
        {"input_ids": IDS[:, :1], "labels": IDS[:, :1], "loss_reduction": "max"},
    ]
    for arguments in bad:
        with pytest.raises(ValueError):
            model(**arguments, cache=cache)
        assert same(cache, before), arguments
    assert model(IDS, cache=cache).cache is cache and cache.lengths == [8, 8]


def test_failing_prefill_leaves_the_sequences_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIG, seed=4)
    cache = model.new_cache(2)
    model(IDS, cache=cache)
    wanted = model(IDS, cache=cache.snapshot()).logits

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise MemoryError("in the third layer")

    with monkeypatch.context() as patched:
        patched.setattr(hebatron.model, "attention_prefill", fail)
        with pytest.raises(MemoryError):
            model(IDS, cache=cache)
    assert cache.lengths == [4, 4]
    assert torch.equal(model(IDS, cache=cache).logits, wanted)


def test_one_token_step_that_dies_half_way_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIG, seed=4)
    cache = model.new_cache(2)
    model(IDS, cache=cache)
    before = cache.snapshot()

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise MemoryError("in the third layer")

    with monkeypatch.context() as patched:
        patched.setattr(hebatron.model, "attention_decode", fail)
        with pytest.raises(MemoryError):
            model(IDS[:, :1], cache=cache)
    with pytest.raises(ValueError, match="whose last step died half way"):
        model(IDS[:, :1], cache=cache)
    with pytest.raises(ValueError, match="whose last step died half way"):
        cache.snapshot()
    cache.restore(before)
    assert same(cache, before)
    model(IDS[:, :1], cache=cache)


def test_cache_refusals(model: Hebatron) -> None:
    cache = model.new_cache(2)
    model(IDS, cache=cache)
    with pytest.raises(ValueError, match="a scan state cannot be cut back, restore a snapshot"):
        cache.cut(3)
    cache.cut(4)
    for indices in ([], [2], [-1, 0]):
        with pytest.raises(ValueError, match=r"indices must name rows in \[0, 2\)"):
            cache.reorder(indices)
    with pytest.raises(ValueError, match=r"batch_size must be >= 1, got 0"):
        model.new_cache(0)
    with pytest.raises(
        ValueError, match=r"capacity must be in \[0, max_position_embeddings \(1024\)\], got 1025"
    ):
        model.new_cache(1, 1025)
    with pytest.raises(ValueError, match="snapshot must come from a cache of the same model"):
        cache.restore(make_model(presets.tiny()).new_cache(2))
    smaller = make_model(presets.tiny().replace(layers_block_type=("mamba", "attention")), seed=1)
    with pytest.raises(ValueError, match="config must equal the model's"):
        smaller(IDS, cache=cache)
    with pytest.raises(ValueError, match=r"device must equal the model's \(cpu\), got meta"):
        model(IDS, cache=Cache(CONFIG, 2, device="meta"))
    narrow = Cache(CONFIG, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype must equal the model's compute_dtype"):
        model(IDS, cache=narrow)


def test_attention_only_cache_can_be_cut() -> None:
    model = make_model(presets.tiny().replace(layers_block_type=("attention", "moe")), seed=1)
    ids = random_ids(model.config, 1, 12)
    cache = model.new_cache(1)
    model(ids, cache=cache)
    cache.cut(5)
    assert relative(model(ids[:, 5:9], cache=cache).logits, model(ids[:, :9]).logits[:, 5:]) <= 1e-5


def test_cache_grows_without_changing_what_it_holds(model: Hebatron) -> None:
    ids = random_ids(CONFIG, 1, 300)
    cache, ready = model.new_cache(1), model.new_cache(1, 300)
    for part in ids.split([60, 1, 1, 1, 1, 1, 200, 35], dim=1):
        assert relative(model(part, cache=cache).logits, model(part, cache=ready).logits) <= 1e-6
    assert cache.lengths == [300] and cache.bytes_used >= ready.bytes_used


def test_no_gradient_is_recorded_through_a_cache(model: Hebatron) -> None:
    cache = model.new_cache(1)
    out = model(IDS[:1], cache=cache, labels=IDS[:1])
    assert not out.loss.requires_grad and not cache.mamba[0].ssm.requires_grad and out.aux == []

"""What people do with a model of transformers, done with an accelerated one: peft's adapters and TRL's trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import check_gradients, random_ids, relative
from test_accelerate import ALL_KINDS, CLOSE, gradients, make_pair
from torch import Tensor

from hebatron import accelerate
from hebatron.acceleration.layers import OURS

IDS = random_ids(ALL_KINDS, 2, 19, 5)
# every projection peft allows on this family: it refuses the Mamba layers' out_proj by name
TARGETS = ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "projections": {"target_modules": TARGETS},
    "experts": {"target_modules": ["in_proj"], "target_parameters": ["experts.up_proj", "experts.down_proj"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["gate", "norm_f", "lm_head"]},
}


def adapt(model: Any, kind: str) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **ADAPTERS[kind]))
    with torch.no_grad():  # a fresh B is zero, and would hide whether it is used
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return adapted


@pytest.mark.parametrize("order", ["accelerate first", "peft first", "peft's model"])
@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_peft_adapters_train_and_merge(kind: str, order: str) -> None:
    theirs, ours = make_pair(train=True)
    if order == "accelerate first":
        adapted = adapt(ours, kind)
    else:
        accelerate(ours, undo=True)
        adapted = adapt(ours, kind)
        accelerate(adapted if order == "peft's model" else ours)
    assert not any(type(m) in OURS for m in adapted.modules())
    original = adapt(theirs, kind)
    wanted, got = (model(IDS, labels=IDS, use_cache=False) for model in (original, adapted))
    assert relative(got.logits, wanted.logits) <= CLOSE
    wanted.loss.backward()
    got.loss.backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    check_gradients(dict(adapted.named_parameters()), gradients(original))
    with adapted.disable_adapter(), original.disable_adapter():
        assert relative(adapted(IDS).logits, original(IDS).logits) <= CLOSE
    merged = adapted.merge_and_unload()
    assert merged.state_dict().keys() == make_pair()[0].state_dict().keys()
    assert relative(merged(IDS).logits, wanted.logits) <= CLOSE
    assert not any(type(m) in OURS for m in merged.modules())
    accelerate(merged, undo=True)
    assert not any(type(m) in OURS.values() for m in merged.modules())


def test_adapter_folder_serves_both(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs, ours = make_pair()
    adapted = adapt(ours, "experts")
    wanted = adapted(IDS).logits
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path))
    assert relative(loaded(IDS).logits, wanted) <= CLOSE
    assert relative(accelerate(loaded)(IDS).logits, wanted) <= CLOSE


# ---- TRL


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(60))]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return made


def train(model: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[float]:
    """Losses of two steps."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1}
    settings |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    settings |= {
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "max_length": 32,
    }
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(folder), **(settings | options)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def words(row: int, length: int) -> str:
    return " ".join(f"w{(row * 7 + 3 * n) % 60}" for n in range(length))


TEXTS = [{"text": words(row, 5 + 4 * row)} for row in range(6)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": words(row, 4 + row)},
            {"role": "assistant", "content": words(row + 1, 9 - row)},
        ]
    }
    for row in range(6)
]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["texts", "chats"])
def test_sft_trainer_takes_the_same_steps(tmp_path: Path, rows: list[dict[str, Any]], adapters: bool) -> None:
    losses, weights = [], []
    for model in make_pair(train=True):
        options: dict[str, Any] = {"gradient_checkpointing": adapters}
        losses.append(train(adapt(model, "experts") if adapters else model, tmp_path, rows, **options))
        weights.append({n: p.detach() for n, p in model.named_parameters()})
    assert len(losses[0]) == 2 and losses[0][0] != losses[0][1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    moved = distance(weights[0], weights[1])
    start = {n: p.detach() for n, p in make_pair()[0].named_parameters()}
    if not adapters:
        assert moved <= 0.02 * distance(
            weights[0], start
        )  # Adam's sign of a gradient near zero may fall either way


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum((a[name] - b[name]).square().sum().item() for name in a if name in b) ** 0.5


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_keeps_packed_documents_apart(tmp_path: Path, packing: bool) -> None:
    """Padding-free rows lose as the padded ones do; transformers alone refuses them without CUDA kernels."""
    theirs, ours = make_pair(train=True)
    theirs.eval()
    first, second = copy.deepcopy(ours), copy.deepcopy(ours)
    padded = train(first, tmp_path, TEXTS, max_steps=1, per_device_train_batch_size=6)
    flat = {"packing": True} if packing else {"padding_free": True, "max_length": None}
    got = train(second, tmp_path, TEXTS, max_steps=1, per_device_train_batch_size=6, **flat)
    assert got == pytest.approx(padded, rel=1e-4)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        train(theirs, tmp_path, TEXTS, max_steps=1, **flat)

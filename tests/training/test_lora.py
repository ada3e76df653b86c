"""Adapters on a model: what they reach, that they are really called, merge exactly, and load in peft."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hebatron import presets
from hebatron.config import ModelConfig
from hebatron.hub import export_hf
from hebatron.model import Hebatron
from hebatron.training.lora import (
    ADAPTER,
    adapter_files,
    add_adapters,
    coverage,
    merge_adapters,
    uncovered,
    write_adapter,
)
from hebatron.training.sections import LoraConfig

pytest.importorskip("peft")
IDS = torch.arange(1, 31).reshape(2, 15)
RANK_3 = LoraConfig(rank=3)


def every_kind() -> ModelConfig:
    """Mamba, experts at a latent width, attention and a plain MLP."""
    hub = presets.tiny(64).to_hub()
    hub |= {
        "hybrid_override_pattern": "ME*-",
        "num_hidden_layers": 4,
        "moe_latent_size": 24,
        "intermediate_size": 48,
    }
    hub.pop("layers_block_type", None)
    return ModelConfig.from_hub(hub)


def adapted(config: LoraConfig = RANK_3, seed: int = 0, **options: object) -> Hebatron:
    """A model with adapters that are no longer zero."""
    model = Hebatron(every_kind(), seed=4, **options)  # type: ignore[arg-type]
    add_adapters(model, config, seed)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05, generator=generator)
    return model


def adapters(model: Hebatron) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_fresh_adapters_change_nothing_and_are_a_function_of_the_seed() -> None:
    before = torch.get_rng_state()
    models = [Hebatron(every_kind(), seed=4) for _ in range(4)]
    for model, seed in zip(models[1:], (1, 1, 2)):
        add_adapters(model, LoraConfig(), seed)
        assert torch.equal(model(IDS).logits, models[0](IDS).logits)
    assert torch.equal(torch.get_rng_state(), before)
    one, same, other = (torch.cat([p.flatten() for p in adapters(m).values()]) for m in models[1:])
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_adapters_reach_every_projection_and_expert_tensor() -> None:
    model = adapted()
    left = {name.partition("layers.")[2] or name for name in uncovered(model)}
    mamba = {
        f"0.mixer.{leaf}" for leaf in ("A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "norm.weight")
    }
    whole = {"backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"}
    assert left == mamba | whole | {"1.mixer.gate.weight"} | {f"{i}.norm.weight" for i in range(4)}
    first, second = coverage(model)
    count = sum(p.numel() for p in adapters(model).values())
    assert first.startswith(f"lora: {count:,} parameters train beside ") and "lm_head.weight 4,096" in second
    narrow = Hebatron(every_kind())
    add_adapters(narrow, LoraConfig(targets=("q_proj", "v_proj"), experts=False), 0)
    told = coverage(narrow)
    share = float(told[0].split("reach ")[1].split("%")[0])
    assert (
        share < 10 and "backbone.layers.*.mixer.experts.up_proj" in told[1]
    )  # the rest is frozen, said aloud


def test_every_adapter_is_called_and_trains_alone() -> None:
    model = adapted()
    model(IDS, labels=IDS.roll(-1, 1)).loss.backward()
    found = adapters(model)
    assert len(found) == 2 * (2 + 2 + 2 + 2 + 4 + 2)  # mamba, experts, shared, latent, attention, mlp
    for name, parameter in model.named_parameters():
        if name in found:
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
        else:
            assert parameter.grad is None, name
    whole = model(IDS).logits.detach()
    for name, parameter in found.items():
        if "lora_B" in name:  # no call passes this one by
            kept = parameter.detach().clone()
            parameter.detach().zero_()
            assert float((model(IDS).logits - whole).abs().max()) > 1e-6, name
            parameter.detach().copy_(kept)


@pytest.mark.parametrize(
    "config", [LoraConfig(rank=3), LoraConfig(rank=2, alpha=1.0, targets=("in_proj",), experts=False)]
)
def test_merged_model_computes_what_the_adapters_did(config: LoraConfig, tmp_path: Path) -> None:
    model = adapted(config)
    with_adapters = model(IDS).logits.detach()
    plain = Hebatron(every_kind(), seed=4)
    assert float((with_adapters - plain(IDS).logits).abs().max()) > 1e-3
    merge_adapters(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(IDS).logits, with_adapters, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        Hebatron.from_pretrained(tmp_path / "merged")(IDS).logits, with_adapters, rtol=0, atol=1e-5
    )


def test_adapters_keep_fp32_under_bf16_compute() -> None:
    model = adapted(compute_dtype=torch.bfloat16)
    model(IDS, labels=IDS.roll(-1, 1)).loss.backward()
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    exact = adapted()
    gap = (model(IDS).logits - exact(IDS).logits).abs().max()
    assert float(gap) < 0.05 * float(exact(IDS).logits.abs().max())


class Counting(torch.nn.Module):
    """A parametrization, as peft's of the experts are."""

    calls = 0

    def forward(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return tensor * 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_tensor_is_formed_once_a_forward(dtype: torch.dtype) -> None:
    model = Hebatron(every_kind(), dtype)
    counters = [Counting(), Counting()]
    for name, counter in zip(("up_proj", "down_proj"), counters):
        torch.nn.utils.parametrize.register_parametrization(
            model.get_submodule("backbone.layers.1.mixer.experts"), name, counter
        )
        counter.calls = 0
    model(IDS)
    assert [counter.calls for counter in counters] == [1, 1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_layers_drop_what_they_dropped(dropout: float) -> None:
    gradients = []
    for recompute in (False, True):
        model = adapted(LoraConfig(rank=3, dropout=dropout, experts=not dropout))
        model.activation_checkpointing = recompute
        torch.manual_seed(5)
        model(IDS, labels=IDS.roll(-1, 1)).loss.backward()
        gradients.append([p.grad for p in adapters(model).values()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_adapter_loads_onto_the_base_in_transformers(tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = Hebatron(presets.tiny(64), seed=4)
    export_hf(base, None, tmp_path / "base")
    targets = (
        "in_proj",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "up_proj",
        "down_proj",
    )  # peft refuses out_proj
    add_adapters(base, LoraConfig(rank=3, targets=targets), 0)
    with torch.no_grad():
        for p in adapters(base).values():
            p.normal_(0, 0.05)
    base.eval()
    ours = base(IDS).logits.detach()
    write_adapter(tmp_path / ADAPTER, *adapter_files(base, str(tmp_path / "base")))
    settings = json.loads((tmp_path / ADAPTER / "adapter_config.json").read_text())
    assert settings["r"] == 3 and settings["base_model_name_or_path"] == str(tmp_path / "base")
    assert len(load_file(tmp_path / ADAPTER / "adapter_model.safetensors")) == len(adapters(base))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / ADAPTER).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoraConfig(targets=("in_porj",)),
            r"lora.targets must name .*down_proj.*, got 'in_porj'; did you mean 'in_proj'",
        ),
        (
            LoraConfig(targets=("lm_head",)),
            r"lora.targets must name projections of this model \(.*\), got 'lm_head'",
        ),
        (LoraConfig(targets=("conv1d",)), "got 'conv1d'"),
        (LoraConfig(dropout=0.1), "lora.dropout must be 0 with lora.experts = true, got 0.1"),
    ],
)
def test_wrong_adapters_are_refused(config: LoraConfig, message: str) -> None:
    model = Hebatron(presets.tiny(64))
    with pytest.raises(ValueError, match=message):
        add_adapters(model, config, 0)
    assert all(p.requires_grad for p in model.parameters())


def test_missing_peft_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ValueError, match=r"lora: peft must be installed, got none; pip install 'hebatron\[lora\]'"
    ):
        add_adapters(Hebatron(presets.tiny(64)), LoraConfig(), 0)

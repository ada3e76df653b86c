"""Small random models for the tests of this folder: configurations drawn from a seed, and weights that matter."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hebatron import Hebatron, ModelConfig, presets

CONFIG = presets.tiny().replace(
    layers_block_type=("mamba", "moe", "attention", "mlp", "moe"), intermediate_size=48
)
MIXED = presets.tiny().replace(
    layers_block_type=("mamba", "moe", "attention", "mlp"),
    intermediate_size=48,
    moe_latent_size=24,
    n_routed_experts=4,
)


def random_config(seed: int) -> ModelConfig:
    """Heads, groups, latent width, group-limited routing, pattern and chunk drawn at random; everything tiny."""
    r = random.Random(seed)
    mamba_groups, kv_heads = r.choice([1, 2, 4]), r.choice([1, 2, 3])
    routing_groups, per_group = r.choice([(1, 4), (1, 9), (2, 3), (4, 2), (3, 4)])
    topk_group = r.randint(1, routing_groups)
    limit = r.choice([(0.0, float("inf")), (0.0, float("inf")), (0.01, float("inf"))])
    return ModelConfig.from_pattern(
        "".join(r.choice("MM*E-E") for _ in range(r.randint(2, 4))),
        vocab_size=r.choice([32, 61]),
        hidden_size=r.choice([16, 24, 40]),
        num_attention_heads=kv_heads * r.choice([1, 2, 4]),
        num_key_value_heads=kv_heads,
        head_dim=r.choice([4, 8, 12]),
        mamba_num_heads=mamba_groups * r.choice([1, 2, 3]),
        mamba_head_dim=r.choice([4, 8, 10]),
        ssm_state_size=r.choice([4, 8, 16]),
        n_groups=mamba_groups,
        conv_kernel=r.choice([2, 4, 4]),
        use_conv_bias=r.random() < 0.8,
        chunk_size=r.choice([4, 8, 16]),
        time_step_limit=limit,
        n_routed_experts=routing_groups * per_group,
        num_experts_per_tok=r.randint(1, min(4, topk_group * per_group)),
        moe_intermediate_size=r.choice([8, 12]),
        moe_shared_expert_intermediate_size=r.choice([8, 20]),
        moe_latent_size=r.choice([None, 8, 12]),
        n_group=routing_groups,
        topk_group=topk_group,
        norm_topk_prob=r.random() < 0.7,
        routed_scaling_factor=r.choice([1.0, 2.5]),
        intermediate_size=r.choice([12, 28]),
        max_position_embeddings=512,
    )


@torch.no_grad()
def shake(model: nn.Module, seed: int) -> None:
    """Weights large enough that every part of the model moves the logits, a router bias that changes choices, and
    steps below 0.001, where transformers' default clamp would show."""
    g = torch.Generator().manual_seed(seed)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, p in tensors:
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
        if "correction_bias" in name:
            p.copy_(noise * 0.2)
        elif "dt_bias" in name:
            p.copy_(noise * 3.0 - 4.0)
        elif "A_log" in name or name.endswith(".D"):
            p.add_(noise * 0.2)
        elif "norm" in name:
            p.copy_(1.0 + 0.2 * noise)
        else:
            p.copy_(noise * (0.5 if "embeddings" in name else p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1))


def make_model(config: ModelConfig, seed: int = 0) -> Hebatron:
    model = Hebatron(config)
    shake(model, seed)
    return model


def make_oracle(model: Hebatron) -> Any:
    """transformers' model with these weights and the right limit of the step, which it would not take from a config."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        **{n: v for n, v in model.config.to_hub().items() if n not in ("model_type", "time_step_limit")}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = NemotronHForCausalLM(config)
    oracle.set_experts_implementation("eager")
    oracle.config.time_step_limit = model.config.time_step_limit
    for module in oracle.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = model.config.time_step_limit
    oracle.load_state_dict({n.replace("backbone.", "model."): t for n, t in model.state_dict().items()})
    return oracle.train(model.training)


def random_ids(config: ModelConfig, rows: int, length: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (rows, length), generator=g)


def relative(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| / max |wanted|; both must be finite in the same places."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    assert torch.isfinite(got).all() and torch.isfinite(wanted).all()
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def check_gradients(parameters: Mapping[str, nn.Parameter], wanted: Mapping[str, Tensor | None]) -> None:
    """Each parameter's gradient is transformers', in fp32."""
    assert parameters.keys() == wanted.keys()
    largest = max(g.abs().max().item() for g in wanted.values() if g is not None)
    for name, p in parameters.items():
        wanted_grad = wanted[name]
        if wanted_grad is None:  # transformers skips an expert no token chose; ours is exactly zero
            assert p.grad is None or not p.grad.any(), name
            continue
        assert p.grad is not None, name
        # 1e-4 of the parameter's gradient. The floor is for sums over all tokens that nearly cancel (one head's D):
        # there both sides are 1e-4 away from fp64; and for a top-1 router, whose true gradient is 0.
        allowed = 1e-4 * wanted_grad.abs().max().item() + 1e-5 * largest
        assert (p.grad - wanted_grad).abs().max().item() <= allowed, name


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}

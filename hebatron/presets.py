"""Named models. Each function returns a `ModelConfig`; change one with `config.replace(...)`."""

from __future__ import annotations

from collections.abc import Callable

from .config import ModelConfig
from .sizes import count_parameters


def nano_30b_a3b() -> ModelConfig:
    """Nemotron-3-Nano-30B-A3B, the base of Hebatron: 31.6B parameters, 3.2B active."""
    return ModelConfig.from_pattern(
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        vocab_size=131072,
        hidden_size=2688,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        intermediate_size=1856,
        routed_scaling_factor=2.5,
    )


def nano_4b() -> ModelConfig:
    """The dense hybrid Nano-4B: Mamba-2, attention and plain MLPs, 3.97B parameters."""
    return ModelConfig.from_pattern(
        "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
        vocab_size=131072,
        hidden_size=3136,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        mamba_num_heads=96,
        mamba_head_dim=80,
        ssm_state_size=128,
        n_groups=8,
        chunk_size=256,
        intermediate_size=12544,
    )


def super_120b_a12b() -> ModelConfig:
    """Nemotron-3-Super: 512 experts at a latent width of 1024, 120.7B parameters, 12.2B active."""
    return ModelConfig.from_pattern(
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        vocab_size=131072,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=128,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376,
        moe_latent_size=1024,
        intermediate_size=2688,
        routed_scaling_factor=5.0,
    )


def scaled_570m() -> ModelConfig:
    """The shape whole-model CPU figures are quoted at: 128 experts top-6, 570M parameters, 54M active."""
    return ModelConfig.from_pattern(
        "MEME*EMEME",
        vocab_size=8192,
        hidden_size=768,
        num_attention_heads=9,
        num_key_value_heads=1,
        head_dim=128,
        mamba_num_heads=18,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=2,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=544,
        moe_shared_expert_intermediate_size=1088,
        routed_scaling_factor=2.5,
    )


def quickstart(vocab_size: int = 4096) -> ModelConfig:
    """What `hebatron quickstart` trains on two cores: 6.2M parameters, 2.3M active with the head."""
    return ModelConfig.from_pattern(
        "MEM*EME",
        vocab_size=vocab_size,
        hidden_size=192,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        mamba_num_heads=6,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_groups=1,
        chunk_size=64,
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        moe_shared_expert_intermediate_size=192,
        routed_scaling_factor=2.5,
        max_position_embeddings=4096,
    )


def dense_like(moe: ModelConfig, share: str) -> ModelConfig:
    """`moe` with a dense MLP in place of each expert layer, of as many parameters as that layer has in all or uses for
    one token, to the nearest width.

    Args:
        share: "total" or "active".
    """
    if share not in ("total", "active") or "moe" not in moe.layers_block_type:
        got = f"{share!r} of {moe.pattern}"
        raise ValueError(f"dense_like: share must be 'total' or 'active', of a model with experts, got {got}")
    counts = count_parameters(moe)
    layer = (counts.layers if share == "total" else counts.active_layers)["moe"] - moe.hidden_size  # its norm
    return moe.replace(
        layers_block_type=tuple("mlp" if kind == "moe" else kind for kind in moe.layers_block_type),
        intermediate_size=round(layer / (2 * moe.hidden_size)),
    )


def quickstart_dense(vocab_size: int = 4096) -> ModelConfig:
    """`quickstart` with dense MLPs in place of the experts and exactly the same number of parameters."""
    return dense_like(quickstart(vocab_size), "total")


def tiny(vocab_size: int = 64) -> ModelConfig:
    """For tests: one layer of each kind the quickstart has, width 64."""
    return ModelConfig.from_pattern(
        "ME*",
        vocab_size=vocab_size,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        routed_scaling_factor=2.5,
        max_position_embeddings=1024,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    function.__name__: function
    for function in (nano_30b_a3b, nano_4b, super_120b_a12b, scaled_570m, quickstart, quickstart_dense, tiny)
}

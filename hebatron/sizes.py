"""Parameters and memory as pure functions of a config: what `hebatron info` prints.

Nothing is allocated: the counts are sums of products, and a test holds them against the model on the meta device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. `layers` is one layer of each kind; the router's bias is a buffer and is not counted."""

    layers: dict[str, int]  # kind -> parameters of one such layer, pre-norm included
    active_layers: dict[str, int]  # the same, with only the experts one token uses
    embedding: int
    head: int  # 0 when tied to the embedding
    final_norm: int
    total: int
    active: int  # per token, layers and final norm
    active_with_head: int  # ... and the output head
    active_with_embedding: int  # ... and the input embedding, as most cards count


def count_parameters(c: ModelConfig) -> ParameterCounts:
    """Exact parameter counts of `Hebatron(c)`."""
    D, E, K = c.hidden_size, c.n_routed_experts, c.num_experts_per_tok
    mamba = D * (c.d_inner + c.conv_dim + c.mamba_num_heads) + c.d_inner * D  # in_proj (z, xBC, dt), out_proj
    mamba += (
        c.conv_dim * (c.conv_kernel + c.use_conv_bias) + c.d_inner + 3 * c.mamba_num_heads
    )  # conv, norm, A D dt
    attention = 2 * D * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    expert = 2 * c.expert_dim * c.moe_intermediate_size
    moe_fixed = E * D + 2 * D * c.moe_shared_expert_intermediate_size  # router, shared expert
    moe_fixed += 0 if c.moe_latent_size is None else 2 * D * c.moe_latent_size
    full = {
        "mamba": mamba,
        "attention": attention,
        "moe": moe_fixed + E * expert,
        "mlp": 2 * D * c.intermediate_size,
    }
    layers = {kind: full[kind] + D for kind in full if kind in c.layers_block_type}
    active_layers = layers | ({"moe": moe_fixed + K * expert + D} if "moe" in layers else {})
    embedding = c.vocab_size * D
    head = 0 if c.tie_word_embeddings else embedding
    active = sum(active_layers[kind] for kind in c.layers_block_type) + D
    return ParameterCounts(
        layers=layers,
        active_layers=active_layers,
        embedding=embedding,
        head=head,
        final_norm=D,
        total=sum(layers[kind] for kind in c.layers_block_type) + D + embedding + head,
        active=active,
        active_with_head=active + embedding,
        active_with_embedding=active + embedding + head,
    )


@dataclass(frozen=True)
class MemoryCounts:
    """Bytes. Keys and values grow with the context; conv and scan states are per sequence and do not."""

    bytes_weights: int
    bytes_kv_per_token: int
    bytes_kv: int
    bytes_scan_state: int
    bytes_conv_state: int


def count_memory(c: ModelConfig, context: int, bytes_per_value: int = 2) -> MemoryCounts:
    """Memory of weights, keys and values, and states of one sequence at `context` tokens; scan states are fp32."""
    if context < 0:
        raise ValueError(f"count_memory: context must be >= 0, got {context}")
    kinds = Counter(c.layers_block_type)
    kv_per_token = kinds["attention"] * 2 * c.num_key_value_heads * c.head_dim * bytes_per_value
    return MemoryCounts(
        bytes_weights=count_parameters(c).total * bytes_per_value,
        bytes_kv_per_token=kv_per_token,
        bytes_kv=kv_per_token * context,
        bytes_scan_state=kinds["mamba"] * c.d_inner * c.ssm_state_size * 4,
        bytes_conv_state=kinds["mamba"] * c.conv_dim * (c.conv_kernel - 1) * bytes_per_value,
    )


def describe(c: ModelConfig, context: int = 65536) -> str:
    """The model card as a plain text table: layers, total and active parameters, memory in bf16 at `context`."""
    counts, memory = count_parameters(c), count_memory(c, context)
    kinds = Counter(c.layers_block_type)
    details = {
        "mamba": f"{c.mamba_num_heads} heads x {c.mamba_head_dim}, state {c.ssm_state_size}, {c.n_groups} groups",
        "attention": f"{c.num_attention_heads} query / {c.num_key_value_heads} key heads x {c.head_dim}, no positions",
        "moe": f"{c.n_routed_experts} experts top-{c.num_experts_per_tok} x {c.moe_intermediate_size}"
        + (f" at latent {c.moe_latent_size}" if c.moe_latent_size else "")
        + f", shared {c.moe_shared_expert_intermediate_size}",
        "mlp": f"{c.intermediate_size} wide",
    }
    lines = [
        f"layers   {c.num_hidden_layers}  {c.pattern}",
        f"width    {c.hidden_size}, vocabulary {c.vocab_size:,}",
        "",
    ]
    lines.append(f"{'part':<12}{'count':>6}{'each':>18}{'total':>18}{'active':>18}  shape")
    for kind in counts.layers:
        each, n, active = counts.layers[kind], kinds[kind], counts.active_layers[kind]
        lines.append(f"{kind:<12}{n:>6}{each:>18,}{each * n:>18,}{active * n:>18,}  {details[kind]}")
    for name, size in (
        ("embedding", counts.embedding),
        ("head", counts.head),
        ("final norm", counts.final_norm),
    ):
        lines.append(f"{name:<12}{1:>6}{size:>18,}{size:>18,}{size:>18,}{'  tied' if not size else ''}")
    lines += [
        "",
        f"total parameters    {counts.total:>18,}",
        f"active per token    {counts.active:>18,}  layers",
        f"                    {counts.active_with_head:>18,}  + head",
        f"                    {counts.active_with_embedding:>18,}  + embedding",
        "",
        f"weights in bf16     {_gigabytes(memory.bytes_weights)}",
        f"keys and values     {_gigabytes(memory.bytes_kv)}  at {context:,} tokens,"
        f" {memory.bytes_kv_per_token:,} B a token",
        f"scan state, fp32    {_gigabytes(memory.bytes_scan_state)}  a sequence, whatever its length",
        f"conv state          {_gigabytes(memory.bytes_conv_state)}",
    ]
    return "\n".join(lines)


def _gigabytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:>12.2f} {unit}"
    return f"{n:>12} B "

"""Floors: the least time a model can take, from its operations and the bytes that must move, operator by operator.

An operator's floor is the greater of its operations over the machine's rate of products and its bytes over the rate of
reading memory; operators follow one another, routing is uniform. Activations that fit the last-level cache cost no
bytes (`Machine.cache`; 0 where everything counts). Real programs stay above; the ratio of two models' floors says
what a measured ratio could be at best.

    python bench/floors.py        the real sizes on an H100, against dense models of comparable quality; needs no GPU

Q sequences, L new tokens of each, T = Q * L, K inputs of a product, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from hebatron.config import ModelConfig
from hebatron.sizes import count_parameters


@dataclass(frozen=True)
class Machine:
    name: str
    products: float  # operations a second
    read: float  # bytes a second
    cache: float = 0.0  # bytes of activations that never see memory


# What a well-made kernel reaches, not the data sheet: 800 of 989 TFLOP/s, 3.0 of 3.35 TB/s.
H100 = Machine("H100", 800e12, 3.0e12)


@dataclass(frozen=True)
class Work:
    """A call of the model. `context` tokens are in the cache before; logits of the last token each, or of all."""

    sequences: int
    new_tokens: int
    context: int = 0
    all_logits: bool = False
    bytes_weight: int = 2

    @property
    def tokens(self) -> int:
        return self.sequences * self.new_tokens


@dataclass(frozen=True)
class Op:
    name: str
    operations: float
    streamed: float  # bytes of weights, keys and states
    activations: float = 0.0

    def seconds(self, machine: Machine) -> float:
        moved = self.streamed + (self.activations if self.activations > machine.cache else 0)
        return max(self.operations / machine.products, moved / machine.read)


@dataclass(frozen=True)
class Transformer:
    """A dense model with gated MLPs; `windowed` of its layers see only `window` tokens."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    windowed: int = 0
    window: int = 0
    tied: bool = False  # its head is its table of embeddings


GEMMA_27B = Transformer("Gemma-3-27B", 62, 5376, 32, 16, 128, 21504, 262144, 52, 1024, tied=True)
MISTRAL_24B = Transformer("Mistral-Small-24B", 40, 5120, 32, 8, 128, 32768, 131072)


def linear(
    name: str, work: Work, inputs: int, outputs: int, rows: int | None = None, bytes_weight: int | None = None
) -> Op:
    rows = work.tokens if rows is None else rows
    weights = inputs * outputs * (bytes_weight or work.bytes_weight)
    return Op(name, 2 * rows * inputs * outputs, weights, 2 * rows * (inputs + outputs))


def elementwise(name: str, work: Work, values: int) -> Op:
    """`values` numbers of two bytes a token read or written."""
    return Op(name, 0, 0, 2 * work.tokens * values)


def attention(work: Work, heads: int, kv_heads: int, head_dim: int, window: int | None = None) -> Op:
    new, before = work.new_tokens, work.context
    pairs = new * before + new * (new + 1) // 2
    seen = before + new
    if window is not None and seen > window:
        seen, pairs = min(seen, window + new), min(pairs, new * window)
    keys = work.sequences * seen * 2 * kv_heads * head_dim * 2
    return Op(
        "attention", 4 * work.sequences * pairs * heads * head_dim, keys, 4 * work.tokens * heads * head_dim
    )


def experts(c: ModelConfig, work: Work) -> list[Op]:
    """The routed products. A token's experts are drawn without favour, so T tokens use E (1 - (1 - K/E)^T) of E."""
    E, K, F, D = c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.expert_dim
    T = work.tokens
    used = E * (1 - (1 - K / E) ** T)
    products, weights = 2 * T * K * F * D, used * F * D * work.bytes_weight
    return [
        Op("experts up", products, weights, 2 * T * (D + K * F)),
        Op("experts down", products, weights, 2 * T * K * (D + F)),
        elementwise("combine", work, (K + 2) * D),  # the routed rows, the shared expert's, and the sum
    ]


def layer(c: ModelConfig, kind: str, work: Work) -> list[Op]:
    D, T = c.hidden_size, work.tokens
    ops = [elementwise("residual and norm", work, 4 * D)]
    if kind == "mamba":
        inner, conv, heads = c.d_inner, c.conv_dim, c.mamba_num_heads
        state, scan = inner * c.ssm_state_size, inner + conv
        chunk = c.chunk_size if work.new_tokens > 1 else 0
        inside = T * chunk * (c.n_groups * c.ssm_state_size + inner)  # half of a chunk's square, twice
        ops += [
            linear("in_proj", work, D, inner + conv + heads),
            Op("conv", 2 * T * conv * c.conv_kernel, 0, 2 * T * conv * 2),
            Op("scan", 4 * T * state + inside, work.sequences * state * 8, 2 * T * scan),
            elementwise("gated norm", work, 3 * inner),
            linear("out_proj", work, inner, D),
        ]
    elif kind == "attention":
        heads, kv = c.num_attention_heads, c.num_key_value_heads
        ops += [
            linear("qkv", work, D, (heads + 2 * kv) * c.head_dim),
            attention(work, heads, kv, c.head_dim),
            linear("o_proj", work, heads * c.head_dim, D),
        ]
    elif kind == "moe":
        shared = c.moe_shared_expert_intermediate_size
        router = linear("router", work, D, c.n_routed_experts, bytes_weight=4)  # fp32 whatever the rest is
        ops += [router, *experts(c, work)]
        ops += [linear("shared up", work, D, shared), linear("shared down", work, shared, D)]
        if c.moe_latent_size is not None:
            ops += [
                linear("latent", work, D, c.moe_latent_size),
                linear("latent", work, c.moe_latent_size, D),
            ]
    else:
        ops += [
            linear("mlp up", work, D, c.intermediate_size),
            linear("mlp down", work, c.intermediate_size, D),
        ]
    return ops


def forward(model: ModelConfig | Transformer, work: Work) -> list[Op]:
    rows = work.tokens if work.all_logits else work.sequences
    if isinstance(model, Transformer):
        return _transformer(model, work, rows)
    ops = [op for kind in model.layers_block_type for op in layer(model, kind, work)]
    return [*ops, linear("head", work, model.hidden_size, model.vocab_size, rows)]


def _transformer(t: Transformer, work: Work, rows: int) -> list[Op]:
    ops: list[Op] = []
    for n in range(t.layers):
        ops += [
            *[elementwise("residual and norm", work, 4 * t.width)] * 2,
            linear("qkv", work, t.width, (t.heads + 2 * t.kv_heads) * t.head_dim),
            attention(work, t.heads, t.kv_heads, t.head_dim, t.window if n < t.windowed else None),
            linear("o_proj", work, t.heads * t.head_dim, t.width),
            linear("gate and up", work, t.width, 2 * t.mlp),
            linear("down", work, t.mlp, t.width),
        ]
    return [*ops, linear("head", work, t.width, t.vocab, rows)]


def training(c: ModelConfig, tokens: int) -> list[Op]:
    """Forward, backward (twice the forward's work, attention 2.5 times), clipping and AdamW on fp32 master weights."""
    ops = forward(c, Work(1, tokens, all_logits=True, bytes_weight=4))
    times = {"attention": 3.5}
    both = [
        Op(
            op.name,
            op.operations * times.get(op.name, 3),
            op.streamed * 3,
            op.activations * times.get(op.name, 3),
        )
        for op in ops
    ]
    # the norm reads the gradient; AdamW reads it again, reads and writes weight and both moments
    return [*both, Op("clip and AdamW", 0, count_parameters(c).total * 4 * (1 + 1 + 6))]


def seconds(ops: list[Op], machine: Machine) -> float:
    return sum(op.seconds(machine) for op in ops)


def operations(ops: list[Op]) -> float:
    return sum(op.operations for op in ops)


def streamed(ops: list[Op]) -> float:
    return sum(op.streamed for op in ops)


def bytes_per_sequence(model: ModelConfig | Transformer, context: int) -> float:
    """Keys, values and states of one sequence."""
    if isinstance(model, ModelConfig):
        kinds = model.layers_block_type
        keys = kinds.count("attention") * context * 4 * model.num_key_value_heads * model.head_dim
        scan, conv = model.d_inner * model.ssm_state_size * 4, model.conv_dim * (model.conv_kernel - 1) * 2
        return keys + kinds.count("mamba") * (scan + conv)
    seen = (model.layers - model.windowed) * context + model.windowed * min(context, model.window)
    return seen * 4 * model.kv_heads * model.head_dim


def bytes_of_weights(model: ModelConfig | Transformer) -> float:
    if isinstance(model, ModelConfig):
        return 2 * count_parameters(model).total
    one_table = 2 * model.vocab * model.width
    return streamed(forward(model, Work(1, 1))) + (0 if model.tied else one_table)


# what is asked of the model: name, work
QUESTIONS = [
    *((f"prefill {tokens:,}", Work(1, tokens)) for tokens in (1024, 4096, 8192, 32768, 65536)),
    *(
        (f"decode batch {batch}, context {context:,}", Work(batch, 1, context))
        for batch, context in ((1, 1024), (1, 65536), (8, 1024), (32, 1024), (32, 65536), (256, 1024))
    ),
]


def capped(
    model: ModelConfig | Transformer, machine: Machine, memory: float, context: int
) -> tuple[int, float]:
    """The largest batch whose weights and caches fit, 4 % left for activations, and its tokens a second."""
    batch = int((0.96 * memory - bytes_of_weights(model)) // bytes_per_sequence(model, context))
    return batch, batch / seconds(forward(model, Work(batch, 1, context)), machine) if batch > 0 else 0.0


def real_sizes() -> list[dict[str, object]]:
    """The floors of Nemotron-3-Nano-30B-A3B and of two dense models on an H100, one row a question."""
    from hebatron.presets import nano_30b_a3b

    models: dict[str, ModelConfig | Transformer] = {"30B-A3B": nano_30b_a3b()}
    models |= {dense.name: dense for dense in (GEMMA_27B, MISTRAL_24B)}
    rows: list[dict[str, object]] = []
    for name, work in QUESTIONS:
        taken = {model: seconds(forward(shape, work), H100) for model, shape in models.items()}
        first = next(iter(taken.values()))
        rows.append({"case": name, "ms": {m: round(1e3 * t, 2) for m, t in taken.items()}})
        rows[-1]["ratio"] = {m: round(t / first, 2) for m, t in taken.items()}
    for card, memory in (("80 GB", 80e9), ("141 GB", 141e9)):
        found = {m: capped(shape, H100, memory, 65536) for m, shape in models.items()}
        first = found["30B-A3B"][1]
        rows.append({"case": f"decode, context 65,536, the batch that fits {card}"})
        rows[-1]["batch"] = {m: batch for m, (batch, _) in found.items()}
        rows[-1]["tokens_per_s"] = {m: round(rate) for m, (_, rate) in found.items()}
        rows[-1]["ratio"] = {m: round(first / rate, 2) if rate else None for m, (_, rate) in found.items()}
    return rows


def show_real_sizes() -> list[dict[str, object]]:
    rows = real_sizes()
    print(f"Floors on an {H100.name}: {H100.products / 1e12:.0f} TFLOP/s, {H100.read / 1e12:.1f} TB/s, bf16")
    for row in rows:
        unit = "ms" if "ms" in row else "tokens_per_s"
        cells = [f"{m} {v:,} {'ms' if unit == 'ms' else 'tok/s'}" for m, v in row[unit].items()]  # type: ignore[attr-defined]
        ratios = [f"{r}x" for r in list(row["ratio"].values())[1:]]  # type: ignore[attr-defined]
        print(f"{row['case']:<48} {', '.join(cells)}; {' and '.join(ratios)}")
    return rows


if __name__ == "__main__":
    show_real_sizes()

"""What bench/bench_model.py --device cuda asks of each whole model, and the arithmetic around it: the batch that fits,
the chunks of a prefill, floors, ratios. No GPU is needed for any of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import floors
from dense import BLOCK_TOKENS, ring_blocks
from floors import GEMMA_27B, H100, MISTRAL_24B, Machine, Transformer, Work
from gpu_targets import DECODE_STEP

from hebatron.config import ModelConfig
from hebatron.presets import nano_30b_a3b, tiny

Shape = ModelConfig | Transformer
Row = dict[str, Any]

ROOM_TOKENS = BLOCK_TOKENS  # behind a context: the steps that are timed
# Left free beside weights and caches: cuBLAS's and the graph's own memory, logits, one step's activations.
RESERVE_BYTES = 1.5e9
FITS = 0  # as a case's batch: the largest that fits


@dataclass(frozen=True)
class Case:
    """Prefill of `tokens` tokens, or, where `batch` is given, a decoding step after `tokens` tokens of context."""

    tokens: int
    batch: int | None = None

    @property
    def name(self) -> str:
        if self.batch is None:
            return f"prefill {self.tokens:,}"
        batch = "the batch that fits" if self.batch == FITS else f"batch {self.batch}"
        return f"decode {batch}, context {self.tokens:,}"

    def work(self, batch: int) -> Work:
        return Work(1, self.tokens) if self.batch is None else Work(batch, 1, self.tokens)


@dataclass(frozen=True)
class Plan:
    """The models by name, ours first; the cases, most wanted first; and how long a measurement is."""

    shapes: dict[str, Shape]
    cases: tuple[Case, ...]
    copy_bytes: int
    matmul_size: int
    repeats: int
    seconds_each: float  # of the repeats of one case


def _cases(decode: Iterable[tuple[int, int]], prefill: Iterable[int]) -> tuple[Case, ...]:
    return (*(Case(context, batch) for batch, context in decode), *(Case(tokens) for tokens in prefill))


REAL = Plan(
    {"30B-A3B": nano_30b_a3b(), GEMMA_27B.name: GEMMA_27B, MISTRAL_24B.name: MISTRAL_24B},
    _cases(
        ((1, 1024), (1, 65536), (FITS, 65536), (32, 1024), (8, 1024)),
        (8192, 65536, 4096, 16384, 1024),
    ),
    4 << 30,
    8192,
    15,
    6.0,
)
# The real head dims, states and windows cut by blocks, so that the same kernels run; also what is held to fp64 before
# anything is timed.
SMALL_SHAPES: dict[str, Shape] = {
    "30B-A3B": tiny().replace(
        layers_block_type=("mamba", "moe", "attention") * 2,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=8,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=2,
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=128,
        vocab_size=256,
    ),
    GEMMA_27B.name: Transformer("small", 3, 128, 4, 2, 128, 256, 256, 2, 40, tied=True),
    MISTRAL_24B.name: Transformer("small", 2, 128, 4, 1, 128, 256, 256),
}
TOY = Plan(SMALL_SHAPES, _cases(((1, 32), (FITS, 128), (2, 32)), (48, 16)), 1 << 16, 32, 2, 0.05)


def bytes_a_sequence(shape: Shape, context: int) -> int:
    """What the caches of one sequence hold in whole blocks, with room for the steps that are timed."""
    blocks = -(-(context + ROOM_TOKENS) // BLOCK_TOKENS)
    if isinstance(shape, ModelConfig):
        return round(floors.bytes_per_sequence(shape, blocks * BLOCK_TOKENS))
    ring = ring_blocks(shape, blocks * BLOCK_TOKENS)
    held = (shape.layers - shape.windowed) * blocks + shape.windowed * ring
    return held * BLOCK_TOKENS * bytes_a_token(shape)


def bytes_a_token(shape: Shape) -> int:
    """Of keys and values of one attention layer."""
    kv_heads = shape.num_key_value_heads if isinstance(shape, ModelConfig) else shape.kv_heads
    return 2 * kv_heads * shape.head_dim * 2


def bytes_to_decode(shape: Shape, context: int, backend: str) -> int:
    """Of one sequence: its caches, its logits in bf16 and fp32, and in the torch form copies of one layer's pages:
    gathered, masked, transposed and once more in SDPA."""
    copies = 4 if backend == "torch" else 0
    logits = shape.vocab_size if isinstance(shape, ModelConfig) else shape.vocab
    return (
        bytes_a_sequence(shape, context)
        + 6 * logits
        + copies * bytes_a_token(shape) * (context + ROOM_TOKENS)
    )


def experts_used(shape: ModelConfig, tokens: int) -> float:
    """Of a layer, where every token chooses evenly: what floors.py counts as read."""
    experts = shape.n_routed_experts
    return experts * (1 - (1 - shape.num_experts_per_tok / experts) ** tokens)


def largest_batch(free: float, shape: Shape, context: int, backend: str) -> int:
    """Sequences whose caches fit beside the weights, 0 where none does; `free` is what the weights left."""
    return max(0, int((free - RESERVE_BYTES) // bytes_to_decode(shape, context, backend)))


def bytes_to_prefill(shape: ModelConfig, backend: str) -> int:
    """A token's activations where a layer holds most of them; an estimate: what does not fit is halved.

    An expert layer holds the routed rows at both widths, the shared expert's three times (up, relu, square) and some
    vectors of the width; a Mamba layer the projection, the convolution and three vectors of the inner width. The torch
    form holds about three times that, and in the scan four fp32 squares of a chunk for each head.
    """
    c = shape
    experts = c.num_experts_per_tok * (c.moe_intermediate_size + c.expert_dim)
    experts += 3 * c.moe_shared_expert_intermediate_size + 8 * c.hidden_size
    mamba = c.d_inner + c.conv_dim + c.mamba_num_heads + c.conv_dim + 3 * c.d_inner + 2 * c.hidden_size
    if backend == "torch":
        return 2 * max(3 * experts, 3 * mamba + 8 * c.mamba_num_heads * c.chunk_size)
    return 2 * max(experts, mamba)


def prefill_chunk(free: float, shape: ModelConfig, tokens: int, backend: str) -> int:
    """All tokens at once where their activations fit beside the cache, else the largest half of a half that does."""
    usable = free - RESERVE_BYTES - bytes_a_sequence(shape, tokens)
    chunk = tokens
    while chunk > 1024 and chunk * bytes_to_prefill(shape, backend) > usable:
        chunk = -(-chunk // 2)
    return chunk


def repeats(plan: Plan, first_seconds: float) -> int:
    """At least two after the one that warms up, but for a call so long that the first must do: 0."""
    if first_seconds > 3 * plan.seconds_each:
        return 0
    return max(2, min(plan.repeats, int(plan.seconds_each / max(first_seconds, 1e-6))))


def least_seconds(shape: Shape, case: Case) -> float:
    """A case cannot take less: four calls at the H100's floor. What has less time left is not begun."""
    return 4 * floors.seconds(floors.forward(shape, case.work(case.batch or 1)), H100)


def with_floors(row: Row, shape: Shape, case: Case, measured: Machine) -> Row:
    """The row of a timed case with its floors and its rate; `row` has ms and, where decoded, batch."""
    batch = row.get("batch", 1)
    ops = floors.forward(shape, case.work(batch))
    for suffix, machine in (("", measured), ("_h100", H100)):
        floor_ms = 1e3 * floors.seconds(ops, machine)
        row[f"floor{suffix}_ms"] = round(floor_ms, 4)
        row[f"percent_of{suffix}_floor"] = round(100 * floor_ms / row["ms"], 1)
    tokens = case.tokens if case.batch is None else batch
    row["tokens_per_s"] = round(1e3 * tokens / row["ms"], 1)
    if shape == REAL.shapes["30B-A3B"] and case == Case(65536, 1):
        row["target"] = DECODE_STEP.as_row(0, 0)
    return row


def ratios(rows: list[Row], plan: Plan, measured: Machine) -> list[Row]:
    """For each case and dense model: how many times ours is its speed, by backend and the fastest of each, and beside
    it the ratio of floors. Speeds are tokens a second, so that batches may differ."""

    def speed(row: Row, machine: Machine | None = None) -> float:
        batch = row.get("batch", 1)  # a prefill has the same tokens on both sides
        if machine is None:
            return float(batch / row["ms"])
        work = cases[row["case"]].work(batch)
        return float(batch / floors.seconds(floors.forward(plan.shapes[row["model"]], work), machine))

    found: list[Row] = []
    cases = {case.name: case for case in plan.cases}
    ours = next(iter(plan.shapes))
    timed = [row for row in rows if "ms" in row]
    for case in cases:
        by_model: dict[str, list[Row]] = {}
        for row in timed:
            if row["case"] == case:
                by_model.setdefault(row["model"], []).append(row)
        mine = by_model.pop(ours, [])
        for model, theirs in by_model.items():
            pairs = [(a, b) for a in mine for b in theirs if a["backend"] == b["backend"]]
            named = {a["backend"]: (a, b) for a, b in pairs}
            if mine:  # the best form of each
                best = [max(side, key=speed) for side in (mine, theirs)]
                named["fastest"] = (best[0], best[1])
            for backend, (a, b) in named.items():
                row = {"case": case, "dense": model, "backend": backend}
                for of, machine in (("measured", None), ("floors", measured), ("floors_h100", H100)):
                    row[of] = round(speed(a, machine) / speed(b, machine), 2)
                row["batches"] = [side.get("batch", 1) for side in (a, b)]
                if backend == "fastest":
                    row["backends"] = [a["backend"], b["backend"]]
                found.append(row)
    return found

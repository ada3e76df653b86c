"""The expert layer's cases for bench/gpu_sanitize.py, and the table of all: ragged and small, compared with numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from gpu_sanitize_conv import conv_cases
from gpu_sanitize_loss import loss_cases
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def route_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    for tokens, experts, top_k, groups, kept in (
        (9, 128, 6, 1, 1),
        (70, 40, 3, 1, 1),
        (5, 24, 5, 4, 2),
        (3, 512, 22, 1, 1),
    ):
        logits = run.rounded(random.standard_normal((tokens, experts)).astype(np.float32))
        forward = {
            "tokens": tokens,
            "experts": experts,
            "top_k": top_k,
            "groups": groups,
            "kept_groups": kept,
            "workers": 1,
            "normalize": 1,
            "scale": 2.5,
            "dtype": run.dtype,
            "logits": run.put(logits),
            "logits_stride": experts,
            "bias": run.card.put(np.zeros(experts, np.float32)),
        }
        weights, ids = run.card.empty(4 * tokens * top_k), run.card.empty(8 * tokens * top_k)
        counts = run.card.empty(8 * experts)
        run.call("moe_route_fwd", **forward, weights=weights, ids=ids, counts=counts)
        score = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
        rated = score.reshape(tokens, groups, -1)
        best_two = np.sort(rated, -1)[..., -2:].sum(-1)
        outside = np.argsort(-best_two, 1, kind="stable")[:, kept:]
        np.put_along_axis(rated, outside[..., None], -1, 1)
        want = np.argsort(-rated.reshape(tokens, experts), 1, kind="stable")[:, :top_k]
        chosen = np.take_along_axis(1 / (1 + np.exp(-logits.astype(np.float64))), want, 1)
        got = run.card.get(ids, want.shape, np.int64)
        if not np.array_equal(got, want):
            raise AssertionError(f"ids differ in {(got != want).sum()} places")
        run.compare(
            "weights", weights, (2.5 * chosen / chosen.sum(1, keepdims=True)).astype(np.float32), fp32=True
        )
        if not np.array_equal(
            run.card.get(counts, (experts,), np.int64), np.bincount(want.ravel(), minlength=experts)
        ):
            raise AssertionError("counts differ")
        grad = random.standard_normal(want.shape).astype(np.float32)
        grad_logits = run.output(tokens, experts)
        run.call("moe_route_bwd", **forward, grad_weights=run.card.put(grad), grad_logits=grad_logits)
        total = chosen.sum(1, keepdims=True)
        mean = (grad * chosen / total).sum(1, keepdims=True)
        expected = np.zeros((tokens, experts))
        np.put_along_axis(expected, want, 2.5 / total * (grad - mean) * chosen * (1 - chosen), 1)
        run.compare("grad_logits", grad_logits, expected.astype(np.float32))
        yield f"{tokens} tokens, {top_k} of {experts} in {groups} groups"


def choices(random: np.random.Generator, tokens: int, experts: int, top_k: int) -> tuple[Ints, Ints, Ints]:
    """ids, the order of their slots, the cumulative ends."""
    ids = np.argsort(random.random((tokens, experts)), 1)[:, :top_k].astype(np.int64)
    return ids, np.argsort(ids.ravel(), kind="stable"), np.cumsum(np.bincount(ids.ravel(), minlength=experts))


def permute_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    for tokens, experts, top_k, width in ((9, 5, 2, 7), (700, 40, 3, 16), (3, 512, 22, 264)):
        ids, order, ends = choices(random, tokens, experts, top_k)
        x = run.rounded(random.standard_normal((tokens, width)).astype(np.float32))
        slots = tokens * top_k
        rows, position = run.output(slots, width), run.card.empty(4 * slots)
        found, offsets = run.card.empty(8 * slots), run.card.empty(4 * experts)
        run.call(
            "moe_permute_fwd",
            tokens=tokens,
            top_k=top_k,
            experts=experts,
            width=width,
            dtype=run.dtype,
            x=run.put(x),
            x_stride=width,
            ids=run.card.put(ids),
            rows=rows,
            order=found,
            position=position,
            offsets=offsets,
        )
        if not np.array_equal(run.card.get(found, (slots,), np.int64), order):
            raise AssertionError("order differs")
        if not np.array_equal(run.card.get(position, (slots,), np.int32)[order], np.arange(slots)):
            raise AssertionError("position differs")
        if not np.array_equal(run.card.get(offsets, (experts,), np.int32), ends):
            raise AssertionError("offsets differ")
        run.compare("rows", rows, x[order // top_k])
        yield f"{tokens} tokens, {top_k} of {experts}, width {width}"


def combine_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    def draw(*shape: int) -> Floats:
        return run.rounded(random.standard_normal(shape).astype(np.float32))

    for tokens, experts, top_k, width in ((9, 5, 2, 7), (40, 9, 3, 264), (3, 30, 22, 16)):
        _, order, _ = choices(random, tokens, experts, top_k)
        rows, shared, residual, norm = (
            draw(tokens * top_k, width),
            draw(tokens, width),
            draw(tokens, width),
            draw(width),
        )
        weights = run.rounded(random.random((tokens, top_k), dtype=np.float32))
        given = {
            "tokens": tokens,
            "top_k": top_k,
            "width": width,
            "dtype": run.dtype,
            "rows": run.put(rows),
            "rows_stride": width,
            "order": run.card.put(order),
            "position": None,
            "weights": run.card.put(weights),
        }
        y, normalized = run.output(tokens, width), run.output(tokens, width)
        run.call(
            "moe_combine_fwd",
            **given,
            eps=1e-5,
            norm_dtype=run.dtype,
            shared=run.put(shared),
            shared_stride=width,
            residual=run.put(residual),
            residual_stride=width,
            norm=run.put(norm),
            y=y,
            normalized=normalized,
        )
        by_slot = np.empty_like(rows)
        by_slot[order] = rows
        by_slot = by_slot.reshape(tokens, top_k, width)
        total = run.rounded((by_slot * weights[..., None]).sum(1) + shared + residual)
        run.compare("y", y, total)
        run.compare(
            "normalized", normalized, total / np.sqrt((total**2).mean(1, keepdims=True) + 1e-5) * norm
        )
        grad = draw(tokens, width)
        grad_rows, grad_weights = run.output(tokens * top_k, width), run.card.empty(4 * tokens * top_k)
        run.call(
            "moe_combine_bwd", **given, grad_y=run.put(grad), grad_rows=grad_rows, grad_weights=grad_weights
        )
        run.compare("grad_weights", grad_weights, (by_slot * grad[:, None]).sum(2), fp32=True)
        run.compare("grad_rows", grad_rows, (weights[..., None] * grad[:, None]).reshape(-1, width)[order])
        yield f"{tokens} tokens, {top_k} rows each, width {width}"


class Layer:
    """An expert layer's tensors, on both sides; `given`: what moe_mlp_fwd, moe_mlp_bwd and moe_decode all take."""

    def __init__(
        self,
        run: Any,
        random: np.random.Generator,
        tokens: int,
        experts: int,
        top_k: int,
        width: int,
        expert_width: int,
    ) -> None:
        def draw(*shape: int, scale: float = 1.0) -> Floats:
            return run.rounded((random.standard_normal(shape) * scale).astype(np.float32))

        self.ids, _, _ = choices(random, tokens, experts, top_k)
        self.weights = random.random((tokens, top_k), dtype=np.float32) + np.float32(0.1)
        self.x, self.grad = draw(tokens, width), draw(tokens, width)
        self.up = draw(experts, expert_width, width, scale=width**-0.5)
        self.down = draw(experts, width, expert_width, scale=expert_width**-0.5)
        self.relu = np.maximum(np.einsum("tkfd,td->tkf", self.up[self.ids], self.x), 0)
        self.y = np.einsum("tk,tkdf,tkf->td", self.weights, self.down[self.ids], self.relu**2)
        self.name = f"{tokens} tokens, {top_k} of {experts}, {width} x {expert_width}"
        self.given = {
            "tokens": tokens,
            "top_k": top_k,
            "experts": experts,
            "width": width,
            "expert_width": expert_width,
            "workers": 1,
            "dtype": run.dtype,
            "weight_dtype": run.dtype,
            "packed": 0,
            "x": run.put(self.x),
            "x_stride": width,
            "ids": run.card.put(self.ids),
            "weights": run.card.put(self.weights),
            "up": run.put(self.up),
            "up_expert_stride": expert_width * width,
            "up_stride": width,
            "down": run.put(self.down),
            "down_expert_stride": expert_width * width,
            "down_stride": expert_width,
        }


def decode_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    # tails of 16 rows and of 32 of K, one token, several groups of 8 tokens an expert
    for sizes in ((9, 5, 2, 72, 136), (1, 3, 3, 8, 8), (33, 3, 1, 40, 24)):
        layer, y = Layer(run, random, *sizes), run.output(sizes[0], sizes[3])
        run.call("moe_decode", **layer.given, hidden=None, y=y)
        run.compare("y", y, layer.y)
        yield layer.name


def layer_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    for sizes in ((9, 5, 2, 72, 136), (1, 3, 3, 8, 8)):
        layer, (tokens, _, top_k, width, expert_width) = Layer(run, random, *sizes), sizes
        hidden, y = run.output(tokens * top_k, expert_width), run.output(tokens, width)
        given = layer.given | {"hidden": hidden}
        run.call("moe_mlp_fwd", **given, y=y)
        run.compare("y", y, layer.y)
        grads = [run.output(*array.shape) for array in (layer.x, layer.up, layer.down)]
        grad_weights = run.card.empty(4 * tokens * top_k)
        outputs = dict(zip(("grad_x", "grad_up", "grad_down"), grads))
        run.call("moe_mlp_bwd", **given, **outputs, grad_y=run.put(layer.grad), grad_weights=grad_weights)
        back = np.einsum("tkdf,td->tkf", layer.down[layer.ids], layer.grad)
        of_hidden = 2 * layer.weights[..., None] * layer.relu * back
        run.compare("grad_x", grads[0], np.einsum("tkfd,tkf->td", layer.up[layer.ids], of_hidden))
        for pointer, like, product in (
            (grads[1], layer.up, np.einsum("tkf,td->tkfd", of_hidden, layer.x)),
            (grads[2], layer.down, np.einsum("td,tk,tkf->tkdf", layer.grad, layer.weights, layer.relu**2)),
        ):
            want = np.zeros_like(like)
            np.add.at(want, layer.ids, product)
            run.compare("weights' gradient", pointer, want)
        yield layer.name


# each kernel's cases, and the dtypes they run in
CASES: dict[str, tuple[Callable[[Any, np.random.Generator], Iterator[str]], tuple[str, ...]]] = {
    "conv": (conv_cases, ("bfloat16", "float32")),
    "loss": (loss_cases, ("bfloat16", "float32")),
    "moe_route": (route_cases, ("float32",)),
    "moe_permute": (permute_cases, ("bfloat16", "float32")),
    "moe_combine": (combine_cases, ("bfloat16", "float32")),
    "moe_decode": (decode_cases, ("bfloat16",)),
    "moe": (layer_cases, ("bfloat16",)),
}

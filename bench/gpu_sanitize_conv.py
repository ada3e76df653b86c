"""The convolution's cases for bench/gpu_sanitize.py: ragged and small, compared with numpy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def conv_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    def draw(*shape: int) -> Floats:
        return run.rounded(random.standard_normal(shape).astype(np.float32))

    for channels, taps, ends in ((264, 4, [0, 17, 64, 64, 67, 70]), (7, 4, [0, 2, 33]), (5, 8, [0, 40])):
        tokens, sequences = ends[-1], len(ends) - 1
        x, grad = draw(tokens, channels), draw(tokens, channels)
        past, grad_last = draw(sequences, taps - 1, channels), draw(sequences, taps - 1, channels)
        weight, bias = draw(taps, channels), draw(channels)
        given = {
            "tokens": tokens,
            "channels": channels,
            "taps": taps,
            "sequences": sequences,
            "silu": 1,
            "dtype": run.dtype,
            "x": run.put(x),
            "x_stride": channels,
            "past": run.put(past),
            "weight": run.card.put(weight),
            "bias": run.card.put(bias),
            "cu_seqlens": run.card.put(np.array(ends, np.int32)),
        }
        y, last = run.output(tokens, channels), run.output(*past.shape)
        run.call("causal_conv1d_fwd", **given, y=y, last=last)
        grads = [run.output(*shape) for shape in (x.shape, past.shape)]
        sums = [run.card.empty(4 * count) for count in (weight.size, channels)]
        names = ("grad_x", "grad_past", "grad_weight", "grad_bias")
        outputs = dict(zip(names, [*grads, *sums]))
        run.call("causal_conv1d_bwd", **given, **outputs, grad_y=run.put(grad), grad_last=run.put(grad_last))
        want = _expected(x, past, weight, bias, ends, grad, grad_last)
        for name, pointer in {"y": y, "last": last, **outputs}.items():
            run.compare(name, pointer, want[name], fp32=name in ("grad_weight", "grad_bias"))
        state, out = run.put(past.transpose(0, 2, 1)), run.output(sequences, channels)
        run.call(
            "causal_conv1d_update",
            **{name: given[name] for name in ("sequences", "channels", "taps", "silu", "dtype", "x", "bias")},
            x_stride=channels,
            state=state,
            weight=run.card.put(weight.T),
            y=out,
        )
        inputs = np.concatenate([past, x[:sequences, None]], 1)
        run.compare("y of one token", out, _silu((inputs * weight).sum(1) + bias))
        run.compare("state", state, inputs[:, 1:].transpose(0, 2, 1))
        yield f"{tokens} tokens, {channels} channels, {taps} taps, {sequences} sequences"


def _silu(v: Floats) -> Floats:
    return v / (1 + np.exp(-v))


def _expected(
    x: Floats,
    past: Floats,
    weight: Floats,
    bias: Floats,
    ends: list[int],
    grad: Floats,
    grad_last: Floats,
) -> dict[str, Floats]:
    """Token by token."""
    taps, history = len(weight), len(weight) - 1
    found = {name: np.zeros_like(value) for name, value in zip(("y", "grad_x"), (x, x))}
    found |= {name: np.zeros_like(past) for name in ("last", "grad_past")}
    found |= {"grad_weight": np.zeros_like(weight), "grad_bias": np.zeros_like(bias)}
    for q, (begin, end) in enumerate(pairwise(ends)):
        inputs = np.concatenate([past[q], x[begin:end]])
        grad_in = np.zeros_like(inputs)
        grad_in[end - begin :] += grad_last[q]
        for t in range(end - begin):
            v = (inputs[t : t + taps] * weight).sum(0) + bias
            s = 1 / (1 + np.exp(-v))
            found["y"][begin + t] = v * s
            g = grad[begin + t] * s * (1 + v * (1 - s))
            grad_in[t : t + taps] += g * weight
            found["grad_weight"] += g * inputs[t : t + taps]
            found["grad_bias"] += g
        found["last"][q] = inputs[end - begin :]
        found["grad_past"][q], found["grad_x"][begin:end] = grad_in[:history], grad_in[history:]
    return found

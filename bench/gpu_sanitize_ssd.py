"""The state-space scan's cases for bench/gpu_sanitize.py: ragged and small, compared with the recurrence in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def draws(
    run: Any, random: np.random.Generator, rows: int, sizes: tuple[int, int, int, int]
) -> dict[str, Array]:
    heads, head_dim, groups, state = sizes
    shapes = {"x": (rows, heads, head_dim), "B": (rows, groups, state), "C": (rows, groups, state)}
    drawn = {
        name: run.rounded(random.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()
    }
    for name, shape in (("dt", (rows, heads)), ("D", (heads,)), ("dt_bias", (heads,))):
        drawn[name] = random.standard_normal(shape).astype(np.float32)
    drawn["A"] = -random.random(heads, dtype=np.float32) - np.float32(0.1)
    return drawn


def one_token(state: Array, t: int, given: dict[str, Array]) -> tuple[Array, Array]:
    """y of row t and the state (heads, head_dim, state) behind it."""
    each = given["x"].shape[1] // given["B"].shape[1]
    B, C = (given[name][t].repeat(each, 0) for name in ("B", "C"))
    dt = np.logaddexp(given["dt"][t] + given["dt_bias"], 0)
    x = given["x"][t]
    state = np.exp(dt * given["A"])[:, None, None] * state + (dt[:, None] * x)[..., None] * B[:, None]
    return (state * C[:, None]).sum(-1) + given["D"][:, None] * x, state


def keywords(run: Any, given: dict[str, Array]) -> dict[str, Any]:
    _, heads, head_dim = given["x"].shape
    groups, state = given["B"].shape[1:]
    pointers = {name: run.put(given[name]) for name in ("x", "B", "C")}
    pointers |= {name: run.card.put(given[name]) for name in ("dt", "A", "D", "dt_bias")}
    return {
        "heads": heads,
        "head_dim": head_dim,
        "groups": groups,
        "state_dim": state,
        "dt_min": 0.0,
        "dt_max": math.inf,
        "dtype": run.dtype,
        "x_stride": heads * head_dim,
        "B_stride": groups * state,
        "C_stride": groups * state,
        **pointers,
    }


def scan_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    cases = [((1, 24, 1, 24), [0, 1, 1, 35], 64)]
    if run.dtype == "bfloat16":  # two segments; slices of a head. In fp32 they take the emulator a minute
        cases += [((1, 24, 1, 40), [0, 3, 3, 20], 1), ((1, 72, 1, 128), [0, 70], 64)]
    for sizes, ends, chunk in cases:
        tokens, sequences = ends[-1], len(ends) - 1
        given = draws(run, random, tokens, sizes)
        initial = random.standard_normal((sequences, *given["x"].shape[1:], sizes[3])).astype(np.float32)
        y, last = run.output(*given["x"].shape), run.card.empty(initial.nbytes)
        run.call(
            "ssd_scan_fwd",
            **keywords(run, given),
            tokens=tokens,
            sequences=sequences,
            chunk=chunk,
            workers=1,
            cu_seqlens=run.card.put(np.array(ends, np.int32)),
            initial=run.card.put(initial),
            y=y,
            last=last,
        )
        want, states = np.zeros(given["x"].shape), initial.astype(np.float64)
        for q, (begin, end) in enumerate(pairwise(ends)):
            for t in range(begin, end):
                want[t], states[q] = one_token(states[q], t, given)
        run.compare("y", y, want.astype(np.float32))
        run.compare("last", last, states.astype(np.float32), fp32=True)
        yield f"{tokens} tokens in {sequences} sequences, {sizes}"


def grads_of_tokens(
    given: dict[str, Array], ends: list[int], initial: Array, grad_y: Array, grad_last: Array
) -> dict[str, Array]:
    """The recurrence and its gradients, in fp64."""
    heads, groups = given["x"].shape[1], given["B"].shape[1]
    found = {name: np.zeros(given[name].shape) for name in given} | {"initial": np.zeros(initial.shape)}
    each = heads // groups
    raw = given["dt"] + given["dt_bias"]
    dt = np.logaddexp(raw, 0).astype(np.float64)
    decay = np.exp(dt * given["A"])
    for q, (begin, end) in enumerate(pairwise(ends)):
        states = [initial[q].astype(np.float64)]
        for t in range(begin, end):
            states.append(one_token(states[-1], t, given)[1])
        grad = grad_last[q].astype(np.float64)  # of the state behind token t
        for t in reversed(range(begin, end)):
            x, dy = given["x"][t], grad_y[t]
            B, C = (given[name][t].repeat(each, 0) for name in ("B", "C"))
            grad = grad + dy[..., None] * C[:, None]
            by_head = (dy[..., None] * states[t - begin + 1]).sum(1)
            found["C"][t] = by_head.reshape(groups, each, -1).sum(1)
            of_u = (grad * B[:, None]).sum(-1)
            by_head = (grad * (dt[t][:, None] * x)[..., None]).sum(1)
            found["B"][t] = by_head.reshape(groups, each, -1).sum(1)
            of_log = (grad * states[t - begin]).sum((1, 2)) * decay[t]
            of_dt = (of_log * given["A"] + (x * of_u).sum(1)) / (1 + np.exp(-raw[t]))
            found["x"][t] = dt[t][:, None] * of_u + given["D"][:, None] * dy
            found["dt"][t] = of_dt
            found["A"] += of_log * dt[t]
            found["D"] += (x * dy).sum(1)
            found["dt_bias"] += of_dt
            grad = decay[t][:, None, None] * grad
        found["initial"][q] = grad
    return {name: value.astype(np.float32) for name, value in found.items()}


def backward_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    cases = [((2, 24, 1, 24), [0, 1, 1, 35], 64)]
    if run.dtype == "bfloat16":
        cases += [((1, 72, 1, 128), [0, 70], 64)]
    for sizes, ends, chunk in cases:
        tokens, sequences = ends[-1], len(ends) - 1
        given = draws(run, random, tokens, sizes)
        states = (sequences, *given["x"].shape[1:], sizes[3])
        initial, grad_last = (random.standard_normal(states).astype(np.float32) for _ in range(2))
        grad_y = run.rounded(random.standard_normal(given["x"].shape).astype(np.float32))
        wide = {name: run.output(*given[name].shape) for name in ("x", "B", "C")}
        narrow = {name: run.card.empty(given[name].nbytes) for name in ("dt", "A", "D", "dt_bias")}
        narrow["initial"] = run.card.empty(initial.nbytes)
        run.call(
            "ssd_scan_bwd",
            **keywords(run, given),
            tokens=tokens,
            sequences=sequences,
            chunk=chunk,
            workers=1,
            cu_seqlens=run.card.put(np.array(ends, np.int32)),
            initial=run.card.put(initial),
            grad_y=run.put(grad_y),
            grad_last=run.card.put(grad_last),
            **{f"grad_{name}": pointer for name, pointer in (wide | narrow).items()},
        )
        want = grads_of_tokens(given, ends, initial, grad_y, grad_last)
        for name, pointer in wide.items():
            run.compare(f"grad_{name}", pointer, want[name])
        for name, pointer in narrow.items():
            run.compare(f"grad_{name}", pointer, want[name], fp32=True)
        yield f"{tokens} tokens in {sequences} sequences, {sizes}"


def update_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    for sizes in ((2, 21, 1, 8), (3, 5, 3, 37)):
        given = draws(run, random, 3, sizes)
        states = random.standard_normal((3, *given["x"].shape[1:], sizes[3])).astype(np.float32)
        state, y = run.card.put(states), run.output(*given["x"].shape)
        run.call("ssd_update", **keywords(run, given), sequences=3, state=state, y=y)
        pairs = [one_token(states[q].astype(np.float64), q, given) for q in range(3)]
        run.compare("y", y, np.stack([pair[0] for pair in pairs]).astype(np.float32))
        run.compare("state", state, np.stack([pair[1] for pair in pairs]).astype(np.float32), fp32=True)
        yield f"3 sequences, {sizes}"


CASES: dict[str, tuple[Callable[[Any, np.random.Generator], Iterator[str]], tuple[str, ...]]] = {
    "ssd_scan": (scan_cases, ("bfloat16", "float32")),
    "ssd_scan_bwd": (backward_cases, ("bfloat16", "float32")),
    "ssd_update": (update_cases, ("bfloat16", "float32")),
}

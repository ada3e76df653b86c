"""Every operator names the argument, what it must be what it got, for 25 wrong calls and more; nothing is written."""

import re

import pytest
import torch
from bad_calls import BACKEND, FREE, NO_BACKEND, RIGHT, RULES

import hebatron_kernels as hk
from hebatron_kernels import _check


def grown(value, dim):
    """One more entry in this dimension: the last again."""
    return torch.cat([value, value.narrow(dim, -1, 1)], dim)


def tensor_faults(op):
    """What is wrong for any tensor of the right call: no tensor, its rank, dtype and device, each size."""
    right = RIGHT[op]()
    for arg, value in right.items():
        if not torch.is_tensor(value):
            continue
        other = torch.int16 if value.is_floating_point() else torch.float64
        yield {arg: [1.0]}, f"{arg} must be a tensor, got list"
        shape = ", ".join(rf"(\*|{n})" for n in value.shape)
        for rank in (value.unsqueeze(0), value.sum(-1).to(value.dtype)):
            yield {arg: rank}, rf"{arg} must have shape \({shape}\), got {re.escape(_check.describe(rank))}"
        typed = value.to(other)
        yield {arg: typed}, f"{arg} must have dtype .*, got {re.escape(_check.describe(typed))}"
        if op not in NO_BACKEND:  # which of the two is named depends on the order they are looked at
            yield (
                {arg: value.to("meta")},
                r"\w+ must be on (cpu|meta)( like the first argument)?, got (meta|cpu)",
            )
        for dim in range(value.dim()):
            if (op, arg, dim) not in FREE:
                yield {arg: grown(value, dim)}, r"\w+ must .+, got .+"


def table(op):
    return [*tensor_faults(op), *RULES[op], *([] if op in NO_BACKEND else BACKEND)]


CALLS = [(op, wrong, message) for op in RIGHT for wrong, message in table(op)]


def names(wrong):
    return ",".join(f"{arg}={_check.describe(value)}" for arg, value in wrong.items())[:60]


@pytest.mark.parametrize(
    ("op", "wrong", "message"), CALLS, ids=[f"{n}-{op}-{names(w)}" for n, (op, w, _) in enumerate(CALLS)]
)
def test_a_bad_call_is_refused_by_name_and_changes_nothing(op, wrong, message):
    given = {**RIGHT[op](), **wrong}
    before = {arg: value.clone() for arg, value in given.items() if torch.is_tensor(value)}
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(hk, op)(**given)
    for arg, value in before.items():
        assert value.is_meta or torch.equal(given[arg], value), arg


@pytest.mark.parametrize("op", RIGHT)
def test_the_right_call_passes_and_25_wrong_ones_are_known(op):
    getattr(hk, op)(**RIGHT[op]())
    assert len(table(op)) >= 25 and len({names(wrong) for wrong, _ in table(op)}) >= 25


@pytest.mark.parametrize(("op", "arg", "dim"), sorted(FREE))
def test_a_free_size_is_free(op, arg, dim):
    right = RIGHT[op]()
    if (op, arg) == ("causal_conv1d", "cu_seqlens"):
        right["initial_state"] = None
    getattr(hk, op)(**{**right, arg: grown(right[arg], dim)})


def test_every_exported_operator_has_a_table():
    others = {
        "BackendError",
        "OPERATORS",
        "build_info",
        "explain",
        "host_reads",
        "named_backend",
        "use_backend",
    }
    # a matrix is one expert's; and whole layers, which are no operators of their own (test_step.py)
    others |= {
        "linear_pack",
        "linear_unpack",
        "AttentionStep",
        "MambaStep",
        "MoeStep",
        "DecodeStep",
        "step_available",
    }
    assert set(RIGHT) == set(hk.__all__) - others and set(RULES) == set(RIGHT)

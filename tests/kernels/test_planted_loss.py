"""Bugs planted in the loss's CUDA kernels, each of which the emulator's tests must find."""

import pytest
import torch
from loss_cases import make
from planted import planted

import hebatron_kernels as hk
from hebatron_kernels import testing
from hebatron_kernels.loss import native

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulator")]


@pytest.fixture(autouse=True)
def _slabs(monkeypatch):
    """Two slabs of the vocabulary."""
    monkeypatch.setattr(native, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(native, "SLAB_ENTRIES", 4352)


def loss(dtype, scale=1.0):
    x, weight, targets = make(6, 8, 8704)
    testing.check_oracle(
        hk.linear_cross_entropy, [x * scale, weight, targets, -100, "none"], dtype, "emulator"
    )


def of_bf16():
    loss(torch.bfloat16)


def of_large_logits():
    loss(torch.bfloat16, 100.0)


# what stands there, what is put in its place, what finds it, what the report says ("": a wrong value)
BUGS = {
    "a gradient written over logits not read yet": (
        "if constexpr (sizeof(T) < sizeof(float)) block_sync();",
        "",
        of_bf16,
        "data race in logits",
    ),
    "the sum kept when a larger logit comes": (
        "sum *= exp2_approx((largest - top) * kLog2E);",
        "",
        of_large_logits,
        "",
    ),
    "a thread's sum against its own largest": (
        "total.sum * exp2_approx((total.largest - largest) * kLog2E)",
        "total.sum",
        of_large_logits,
        "",
    ),
    "every thread's own largest for the block's": (
        "block_max(total.largest, slots)",
        "total.largest",
        of_large_logits,
        "",
    ),
    "slots written while they are still read": (
        "  block_sync();\n  return v;\n}\n\n// A sum of exponentials",
        "  return v;\n}\n\n// A sum of exponentials",
        of_bf16,
        "data race in shared memory",
    ),
    "the target sought in every slab": ("a.first + at + i == target", "at + i == target", of_bf16, ""),
    "a token that is ignored has a gradient": (
        "value[i] = ignored ? 0.0f : upstream * p;",
        "value[i] = upstream * p;",
        of_bf16,
        "",
    ),
    "the last packs of a row left out": (
        "at < a.entries; at += kAhead * step",
        "at + kAhead * step <= a.entries; at += kAhead * step",
        of_bf16,
        "",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_planted_in_the_loss_is_found(name):
    right, wrong, find, report = BUGS[name]
    with planted("cuda/loss.cu", right, wrong), pytest.raises((RuntimeError, AssertionError), match=report):
        find()


def test_nothing_is_found_in_the_loss_as_it_is():
    with testing.emulate(checked=True):
        of_bf16()
        of_large_logits()

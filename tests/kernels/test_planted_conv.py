"""Bugs planted in the convolution's CUDA kernels, each of which the emulator's tests must find."""

import pytest
import torch
from conv_cases import make
from planted import planted

import hebatron_kernels as hk
from hebatron_kernels import testing

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulator")]

ENDS = [0, 17, 64, 64, 65, 90]


def sequences():
    testing.check_oracle(hk.causal_conv1d, make(90, 40, ends=ENDS), torch.float32, "emulator")


def one_token():
    x, weight, bias, act, _, _ = testing._cast(make(3, 16), torch.float32)
    states = [torch.randn(3, 16, 3)] * 2
    states[1] = states[0].clone()
    got, want = (
        hk.causal_conv1d_update(x, state, weight, bias, act, backend=backend)
        for state, backend in zip(states, ("emulator", "torch"))
    )
    torch.testing.assert_close(got, want)
    assert torch.equal(*states)


# what stands there, what is put in its place, what finds it, what the report says ("": a wrong value)
BUGS = {
    "taps that reach into the document before": (
        "row = t >= begin ",
        "row = t >= 0 ",
        sequences,
        "",
    ),
    "a document's first token taken for the last of the one before": (
        "(bound(middle) <= t ? low : high)",
        "(bound(middle) < t ? low : high)",
        sequences,
        "",
    ),
    "outputs behind a run forgotten in its gradient": (
        "high = in.end < last + history ? in.end : last + history;",
        "high = last;",
        sequences,
        "",
    ),
    "outputs behind a run counted twice in the weights' gradient": (
        "if (t >= last) continue;",
        "",
        sequences,
        "data race in grad_x|",
    ),
    "a block's sums read before they are all written": (
        "  block_sync();\n  if (warp > 0",
        "  if (warp > 0",
        sequences,
        "data race in shared memory|is read before anybody wrote it",
    ),
    "the last partial row not summed": ("p < count; p++", "p < count - 1; p++", sequences, ""),
    "the last inputs in the wrong order": (
        "in.end - history + row % history",
        "in.end - 1 - row % history",
        sequences,
        "",
    ),
    "tokens loaded past the end": (
        "if (t + j < stop) load<kCount>(static_cast<const T*>(a.x)",
        "load<kCount>(static_cast<const T*>(a.x)",
        sequences,
        "past the end of x",
    ),
    "a short document's own past passed over": ("if (row >= tokens)", "if (row > tokens)", sequences, ""),
    "a state that keeps its oldest input": ("x[at % kPast + 1]", "x[at % kPast]", one_token, ""),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_planted_in_the_convolution_is_found(name):
    right, wrong, find, report = BUGS[name]
    with planted("cuda/conv.cu", right, wrong), pytest.raises((RuntimeError, AssertionError), match=report):
        find()


def test_nothing_is_found_in_the_convolution_as_it_is():
    with testing.emulate(checked=True):
        sequences()
        one_token()

"""The CUDA form of linear_cross_entropy, its kernels run by the emulator and its products by torch on the CPU: values
against the oracle, the same bits in every order of work, and nothing for the checked build to report."""

from functools import partial

import numpy as np
import pytest
import torch
from emulated import same_bits
from loss_cases import REDUCTIONS, make
from torch.nn import functional as F

import hebatron_kernels as hk
from hebatron_kernels import _native, testing
from hebatron_kernels.loss import native

pytestmark = pytest.mark.usefixtures("emulator")

BF16, FP32 = torch.bfloat16, torch.float32
# tokens, width, entries: one of each; odd sizes, whose rows start on no pack; packs of both dtypes; more entries than a
# block takes at once (512 threads of 8, then of 4 times 4); nothing
SHAPES = [(1, 1, 1), (5, 33, 113), (20, 24, 64), (3, 8, 4360), (2, 5, 9001), (0, 4, 9)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven tokens a chunk; slabs of eight entries."""
    for name, value in (("CHUNK_LOGITS", 1), ("CHUNK_TOKENS", 7), ("SLAB_ENTRIES", 8)):
        monkeypatch.setattr(native, name, value)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("tokens", "width", "entries"), SHAPES)
def test_linear_cross_entropy_emulated_matches_oracle(dtype, reduction, tokens, width, entries):
    if tokens == 0 and reduction == "mean":
        return  # refused
    args = [*make(tokens, width, entries), -100, reduction]
    testing.check_oracle(hk.linear_cross_entropy, args, dtype, "emulator")


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("entries", [40, 51])  # whole slabs of packs, and neither
def test_linear_cross_entropy_emulated_in_chunks_is_the_whole(small_chunks, dtype, entries):
    args = [*make(30, 16, entries), -100, "mean"]
    testing.check_oracle(hk.linear_cross_entropy, args, dtype, "emulator")


@pytest.mark.parametrize(
    "entries", [113, 128]
)  # a thread that has no number beside it: an element each, a pack each
def test_linear_cross_entropy_emulated_keeps_nan(entries):
    x, weight, targets = make(4, 8, entries, dtype=FP32, ignored=0)
    weight[60:64] = torch.nan
    targets[:] = 3
    loss = hk.linear_cross_entropy(x, weight, targets, -100, "none", backend="emulator")
    assert loss.isnan().all()


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any result."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_linear_cross_entropy_emulated_never_holds_the_logits(small_chunks):
    x, weight, targets = make(70, 4, 90, FP32)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with Sizes() as seen:
        loss = hk.linear_cross_entropy(x, weight, targets, backend="emulator")
        torch.autograd.grad(loss, leaves)
    assert seen.largest <= 7 * 90  # of 70 x 90


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_emulated_takes_strided_tensors_and_bad_ignored_rows(small_chunks, reduction):
    x, weight, targets = make(40, 33, 90, FP32)
    want = testing.run(hk.linear_cross_entropy, [x, weight, targets, -100, reduction], backend="emulator")
    assert want["grad0"][targets == -100].count_nonzero() == 0
    wide_targets = torch.full((40, 2), -7)
    wide_targets[:, 1] = targets
    bad = x.clone()
    bad[targets == -100] = torch.nan
    views = [testing.strided(bad), testing.strided(weight), wide_targets[:, 1], -100, reduction]
    got = testing.run(hk.linear_cross_entropy, views, backend="emulator")
    for name in want:  # strides are another product of torch's
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_emulated_survives_a_wrong_target_and_huge_logits():
    x, weight, targets = make(4, 3, 5, FP32, ignored=0)
    private = torch.ops.hebatron._linear_cross_entropy  # where the targets may not be read
    targets[1:3] = torch.tensor([5, -3])
    found = private(x, weight, targets, -100, "none", "emulator")
    assert found[1:3].isnan().all() and found[[0, 3]].isfinite().all()
    x = torch.tensor([[1e4, 0.0], [-1e4, 1.0], [0.0, 0.0]])
    args = [x, torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, 2]), -100, "none"]
    found = testing.run(hk.linear_cross_entropy, args, backend="emulator")
    torch.testing.assert_close(found["out0"], torch.tensor([2e4, 0.0, torch.tensor(3.0).log()]))
    assert all(value.isfinite().all() for value in found.values())


def test_linear_cross_entropy_emulated_keeps_nan_to_its_token_and_its_precision_under_autocast():
    x, weight, targets = make(9, 16, 40, FP32, ignored=0)
    want = hk.linear_cross_entropy(x, weight, targets, reduction="none", backend="emulator")
    with torch.autocast("cpu", torch.bfloat16):
        got = hk.linear_cross_entropy(x, weight, targets, reduction="none", backend="emulator")
    assert torch.equal(got, want)
    x[3] = torch.nan
    got = hk.linear_cross_entropy(x, weight, targets, reduction="none", backend="emulator")
    others = torch.arange(9) != 3
    assert got[3].isnan() and torch.equal(got[others], want[others])


# ---- the kernels alone ----


def losses_of(logits, targets, ignore_index=-100):
    found = [torch.empty(len(logits)) for _ in range(2)]
    numbers = dict(rows=len(logits), entries=logits.shape[1], ignore_index=ignore_index)
    tensors = dict(logits=logits, targets=targets, losses=found[0], lse=found[1])
    strides = dict(logits_stride=logits.stride(0), targets_stride=targets.stride(0))
    _native.emulated(partial(_native.call, "cross_entropy_fwd", **numbers, **tensors, **strides))
    return found


def test_cross_entropy_rows_of_infinities():
    inf = torch.inf
    logits = torch.randn(4, 9)
    logits[0, :5], logits[1, 3], logits[2] = -inf, inf, -inf
    losses, lse = losses_of(logits, torch.tensor([7, 3, 1, 8]))
    want = F.cross_entropy(logits.double(), torch.tensor([7, 3, 1, 8]), reduction="none")
    assert losses[1:3].isnan().all() and want[1:3].isnan().all()
    torch.testing.assert_close(losses[[0, 3]].double(), want[[0, 3]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse[[0, 3]], torch.logsumexp(logits, 1)[[0, 3]])


def test_cross_entropy_offsets_pass_int32():
    stride = 2**30 + 4  # row 2 starts past 2^31 elements; only the rows' pages are ever touched
    wide = torch.from_numpy(np.zeros(2 * stride + 8, dtype=np.float32))
    logits = wide.as_strided((3, 8), (stride, 1))
    logits.copy_(torch.randn(3, 8))
    targets = torch.tensor([1, 7, 0])
    losses, lse = losses_of(logits, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    want = (torch.softmax(logits, 1) - F.one_hot(targets, 8)).to(BF16)
    numbers = dict(rows=3, entries=8, first=0, ignore_index=-100, dtype="bfloat16", logits_stride=stride)
    tensors = dict(logits=logits, targets=targets, targets_stride=1, lse=lse, upstream=torch.ones(3))
    _native.emulated(partial(_native.call, "cross_entropy_bwd", **numbers, **tensors))
    torch.testing.assert_close(logits.view(BF16)[:, :8], want, rtol=2**-7, atol=1e-6)


def test_cross_entropy_emulated_gives_the_same_bits_in_every_order():
    same_bits(hk.linear_cross_entropy, [*make(7, 8, 4400, BF16), -100, "none"])


@pytest.mark.parametrize("order", [{}, dict(mode="random", seed=7)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], (2, 4, 40)])
def test_cross_entropy_has_no_race(checked, shape, dtype, order):
    with testing.emulate(**order):
        testing.check_oracle(hk.linear_cross_entropy, [*make(*shape), -100, "none"], dtype, "emulator")


def test_linear_cross_entropy_emulated_refuses_by_name():
    x, weight, targets = make(4, 3, 5)
    with pytest.raises(hk.BackendError, match="computes float32 and bfloat16, got float64"):
        hk.linear_cross_entropy(x, weight, targets, backend="emulator")
    with pytest.raises(
        ValueError, match=r"cross_entropy\[cuda\]: logits_stride must be at least the entries"
    ):
        losses_of(torch.ones(3, 4).T[:1].expand(3, 3), targets[:3])


def test_linear_cross_entropy_emulated_registers_and_compiles_to_one_graph():
    args = [*make(10, 4, 6, FP32), -100, "mean"]
    testing.check_registration("linear_cross_entropy", *args, backend="emulator")
    testing.check_fullgraph(hk.linear_cross_entropy, args, "emulator")

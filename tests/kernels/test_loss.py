import pytest
import torch
from loss_cases import REDUCTIONS, make
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hebatron_kernels as hk
from hebatron_kernels import _native, testing
from hebatron_kernels.loss import native, torch_ops

BACKENDS = ["torch", "reference"]


def textbook(x, weight, targets, ignore_index=-100, reduction="mean"):
    return F.cross_entropy(
        (x @ weight.T).to(torch_ops._compute(x)), targets, ignore_index=ignore_index, reduction=reduction
    )


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven tokens a chunk."""
    monkeypatch.setattr(torch_ops, "CHUNK_MIN_TOKENS", 7)
    monkeypatch.setattr(torch_ops, "CHUNK_LOGITS", 1)


# tokens, width, entries: one of each; one token; under, at and past a chunk; odd sizes; many chunks; nothing
SHAPES = [(1, 1, 1), (1, 5, 3), (6, 4, 9), (7, 16, 40), (8, 33, 113), (113, 24, 51), (0, 4, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("tokens", "width", "entries"), SHAPES)
def test_linear_cross_entropy_torch_matches_oracle(small_chunks, dtype, reduction, tokens, width, entries):
    if tokens == 0 and reduction == "mean":
        return  # refused: below

    def loss(*args, backend):
        return (
            textbook(*args) if backend == "torch" else hk.linear_cross_entropy(*args, backend=forms[backend])
        )

    forms = {"reference": "reference", "under test": "torch"}
    testing.check_oracle(loss, [*make(tokens, width, entries), -100, reduction], dtype, "under test")


def test_linear_cross_entropy_defaults_and_ignore_index():
    x, weight, targets = make(20, 6, 11, ignored=0)
    want = F.cross_entropy(x @ weight.T, targets)
    for backend in BACKENDS:
        torch.testing.assert_close(hk.linear_cross_entropy(x, weight, targets, backend=backend), want)
        for reduction in REDUCTIONS:  # an ignore_index inside the vocabulary, as a pad token is
            got = hk.linear_cross_entropy(x, weight, targets, 3, reduction, backend=backend)
            torch.testing.assert_close(got, textbook(x, weight, targets, 3, reduction))
    assert "-> torch" in hk.explain(hk.linear_cross_entropy, x, weight, targets)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="public in torch 2.13")
def test_linear_cross_entropy_agrees_with_the_one_of_torch():
    args = make(33, 8, 50)
    for reduction in REDUCTIONS:
        want = testing.run(lambda *a: F.linear_cross_entropy(*a, reduction=reduction), args)  # noqa: B023
        got = testing.run(hk.linear_cross_entropy, [*args, -100, reduction])
        for name in want:
            torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_chunk_size_does_not_change_the_result(monkeypatch, reduction):
    args = [*make(50, 8, 30), -100, reduction]
    want = testing.run(hk.linear_cross_entropy, args)
    for rows in (1, 3, 25, 49, 51):
        monkeypatch.setattr(torch_ops, "CHUNK_MIN_TOKENS", rows)
        monkeypatch.setattr(torch_ops, "CHUNK_LOGITS", 1)
        got = testing.run(hk.linear_cross_entropy, args)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-12, msg=name)


class Shapes(TorchDispatchMode):
    """The most elements of any result, and how many matrix products ran."""

    largest, products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return out


# three products a chunk where the gradient is made in the forward; the logits again for "none"; only what is asked
@pytest.mark.parametrize(
    ("reduction", "wants", "products"),
    [
        ("mean", "xw", 3),
        ("sum", "xw", 3),
        ("none", "xw", 4),
        ("sum", "x", 2),
        ("sum", "w", 2),
        ("sum", "", 1),
    ],
)
def test_linear_cross_entropy_never_holds_the_logits(small_chunks, reduction, wants, products):
    x, weight, targets = make(70, 4, 90, torch.float32)
    leaves = [leaf.requires_grad_(name in wants) for name, leaf in (("x", x), ("w", weight))]
    with Shapes() as seen:
        loss = hk.linear_cross_entropy(x, weight, targets, -100, reduction, backend="torch")
        if wants:
            torch.autograd.grad(loss.sum(), [leaf for leaf in leaves if leaf.requires_grad])
    assert seen.largest <= 7 * 90  # one chunk of the 70 x 90 logits
    assert seen.products == 10 * products
    with Shapes() as seen, torch.no_grad():
        hk.linear_cross_entropy(x, weight, targets, -100, reduction, backend="torch")
    assert seen.products == 10


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_ignored_tokens_get_a_zero_gradient(small_chunks, reduction):
    x, weight, targets = make(40, 6, 11, torch.float32)
    found = testing.run(hk.linear_cross_entropy, [x, weight, targets, -100, reduction])
    ignored = targets == -100
    assert ignored.sum() > 3 and found["grad0"][ignored].count_nonzero() == 0
    assert (found["grad0"][~ignored].abs().amax(1) > 0).all()
    kept = testing.run(hk.linear_cross_entropy, [x[~ignored], weight, targets[~ignored], -100, "sum"])
    alone = testing.run(hk.linear_cross_entropy, [x, weight, targets, -100, "sum"])
    torch.testing.assert_close(alone["out0"], kept["out0"])
    torch.testing.assert_close(alone["grad1"], kept["grad1"])


def test_linear_cross_entropy_backward_runs_twice_with_any_upstream():
    x, weight, targets = make(9, 4, 7)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    want = torch.autograd.grad(textbook(x, weight, targets), leaves)
    loss = hk.linear_cross_entropy(x, weight, targets)
    for scale in (1.0, -3.5, 0.0):
        got = torch.autograd.grad(loss, leaves, torch.tensor(scale, dtype=torch.float64), retain_graph=True)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, scale * w)


def test_linear_cross_entropy_is_fp32_for_half_precision():
    x, weight, targets = make(200, 64, 500, torch.bfloat16)
    got = hk.linear_cross_entropy(8 * x, weight, targets, reduction="none")
    want = hk.linear_cross_entropy(
        (8 * x).double(), weight.double(), targets, reduction="none", backend="reference"
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)  # bf16 logits: 0.2 off


def test_linear_cross_entropy_survives_huge_logits():
    x = torch.tensor([[1e4, 0.0], [-1e4, 1.0], [0.0, 0.0]])
    args = [x, torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, 2]), -100, "none"]
    found = testing.run(hk.linear_cross_entropy, args)
    torch.testing.assert_close(found["out0"], torch.tensor([2e4, 0.0, torch.tensor(3.0).log()]))
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_takes_strided_tensors(reduction):
    x, weight, targets = make(12, 6, 10)
    want = testing.run(hk.linear_cross_entropy, [x, weight, targets, -100, reduction])
    wide_targets = torch.full((12, 2), -7)
    wide_targets[:, 1] = targets
    for views in (
        [testing.strided(x), testing.strided(weight), wide_targets[:, 1]],
        [x.T.contiguous().T, weight.T.contiguous().T, targets],
    ):
        got = testing.run(hk.linear_cross_entropy, [*views, -100, reduction])
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy_gradcheck(backend, reduction):
    x, weight, targets = make(5, 3, 4)
    assert torch.autograd.gradcheck(
        lambda a, b: hk.linear_cross_entropy(a, b, targets, -100, reduction, backend=backend),
        [x.requires_grad_(), weight.requires_grad_()],
        check_undefined_grad=False,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy_registration_and_fullgraph(small_chunks, backend):
    args = make(10, 4, 6, torch.float32)
    testing.check_registration("linear_cross_entropy", *args, -100, "none", backend=backend)
    for reduction in ("mean", "none"):
        testing.check_fullgraph(hk.linear_cross_entropy, [*args, -100, reduction], backend)


@pytest.mark.parametrize("tokens", [0, 4])
def test_linear_cross_entropy_of_no_token(tokens):
    x, weight, _ = make(tokens, 3, 5)
    targets = torch.full((tokens,), -100)
    with pytest.raises(
        ValueError,
        match=rf'have a token that is not ignored when reduction is "mean" .*, got {tokens} ignored',
    ):
        hk.linear_cross_entropy(x, weight, targets)
    for backend in BACKENDS:
        for reduction in ("sum", "none"):
            found = testing.run(
                hk.linear_cross_entropy, [x, weight, targets, -100, reduction], backend=backend
            )
            assert all(value.count_nonzero() == 0 for value in found.values())
        private = torch.ops.hebatron._linear_cross_entropy  # where the targets may not be read
        assert private(x, weight, targets, -100, "mean", backend).isnan()


# one of each; odd sizes below and past a strip, a panel, a block of 512 entries and one of 256 tokens; nothing
NATIVE = [(1, 1, 1), (5, 33, 113), (270, 24, 51), (50, 130, 1100), (9, 3, 1537), (0, 4, 9)]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("tokens", "width", "entries"), NATIVE)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
def test_linear_cross_entropy_native_matches_oracle(
    isa, dtype, reduction, tokens, width, entries, kept, monkeypatch
):
    if tokens == 0 and reduction == "mean":
        return  # refused: above
    if not kept:
        monkeypatch.setattr(native, "KEPT_LOGITS", -1)
    with testing.use_isa(isa):
        args = [*make(tokens, width, entries), -100, reduction]
        testing.check_oracle(hk.linear_cross_entropy, args, dtype, "native")


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_native_gives_the_same_bits_whether_it_keeps_the_logits(isa, dtype, monkeypatch):
    args = [*make(300, 40, 700, dtype), -100, "mean"]
    with testing.use_isa(isa):
        kept = testing.run(hk.linear_cross_entropy, args, backend="native")
        monkeypatch.setattr(native, "KEPT_LOGITS", 300 * 700 - 1)
        again = testing.run(hk.linear_cross_entropy, args, backend="native")
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


@pytest.mark.parametrize("tokens", [1023, 1024, 1025])
def test_linear_cross_entropy_native_keeps_at_most_34_megabytes(tokens):
    kept = native.kept_logits(torch.empty(tokens, 1), torch.empty(8192, 1))
    assert kept == ((0, 0) if tokens > 1024 else (tokens, 8256))


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_native_keeps_the_digits_of_a_small_loss(isa, dtype):
    # log(1 + exp(-10)) = 4.5e-5 beside a logit of 40, of which fp32 keeps 2e-6: not a difference to the logsumexp
    x, weight = torch.ones(1, 1, dtype=dtype), torch.tensor([[40.0], [30.0], [-5.0]], dtype=dtype)
    with testing.use_isa(isa):
        loss = hk.linear_cross_entropy(x, weight, torch.tensor([0]), backend="native")
    assert abs(float(loss) - 4.5398899e-5) < 1e-7


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_native_gives_a_token_the_same_bits_in_any_batch(isa, dtype):
    x, weight, targets = make(70, 40, 700, dtype, ignored=0)
    with testing.use_isa(isa):
        want = testing.run(hk.linear_cross_entropy, [x, weight, targets, -100, "none"], backend="native")
        for count in (1, 2, 7, 64):
            some = slice(3, 3 + count)
            got = hk.linear_cross_entropy(x[some], weight, targets[some], reduction="none", backend="native")
            assert torch.equal(got, want["out0"][some])
            leaf = x[some].detach().requires_grad_()
            loss = hk.linear_cross_entropy(leaf, weight, targets[some], reduction="none", backend="native")
            upstream = torch.cos(torch.arange(70, dtype=torch.float64) * 0.7 + 1).float()[some]
            assert torch.equal(torch.autograd.grad(loss, leaf, upstream)[0], want["grad0"][some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_native_does_not_depend_on_threads_or_runs(dtype):
    args = [*make(300, 70, 1500, dtype), -100, "mean"]
    want = testing.run(hk.linear_cross_entropy, args, backend="native")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, *[2] * 10):
            torch.set_num_threads(threads)
            got = testing.run(hk.linear_cross_entropy, args, backend="native")
            assert all(torch.equal(got[name], want[name]) for name in want), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_native_takes_strided_tensors_and_bad_ignored_rows(reduction):
    x, weight, targets = make(40, 33, 90, torch.float32)
    want = testing.run(hk.linear_cross_entropy, [x, weight, targets, -100, reduction], backend="native")
    wide_targets = torch.full((40, 2), -7)
    wide_targets[:, 1] = targets
    bad = x.clone()
    bad[targets == -100] = float("nan")
    views = [testing.strided(bad), testing.strided(weight), wide_targets[:, 1], -100, reduction]
    got = testing.run(hk.linear_cross_entropy, views, backend="native")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_native_registration_and_fullgraph(reduction):
    args = [*make(10, 4, 6, torch.float32), -100, reduction]
    testing.check_registration("linear_cross_entropy", *args, backend="native")
    testing.check_fullgraph(hk.linear_cross_entropy, args, "native")
    assert "-> native" in hk.explain(hk.linear_cross_entropy, *args)


def test_linear_cross_entropy_native_refuses_a_dtype_and_survives_a_wrong_target():
    x, weight, targets = make(4, 3, 5)
    with pytest.raises(hk.BackendError, match="computes float32 and bfloat16, got float64"):
        hk.linear_cross_entropy(x, weight, targets, backend="native")
    private = torch.ops.hebatron._linear_cross_entropy  # where the targets may not be read
    targets[1:3] = torch.tensor([5, -3])
    found = private(x.float(), weight.float(), targets, -100, "none", "native")
    assert found[1:3].isnan().all() and found[0].isfinite()


def test_linear_cross_entropy_native_needs_a_few_megabytes():
    # 131,072 entries of 2,688 in bf16, 1,024 tokens: all logits would be 512 MB in fp32, the weight is 705
    numbers = dict(tokens=1024, entries=131072, width=2688, ignore_index=-100, dtype="bfloat16", workers=2)
    pointers = dict(x=None, x_stride=2688, weight=None, weight_stride=2688, targets=None, targets_stride=1)
    module, given = _native.cpu_module, {**numbers, **pointers, "lse": None, "z": None, "z_stride": 0}
    assert module.linear_cross_entropy_fwd_workspace(**given, losses=None) < 4e6
    backward = module.linear_cross_entropy_bwd_workspace(
        **given, upstream=None, grad_x=None, grad_weight=None
    )
    assert backward < 16e6 + 1024 * 2688 * 4  # and grad_x in fp32

"""linear and linear_packed: the oracle rule on every ISA, and the bits that do not depend on the batch."""

import random

import pytest
import torch

import hebatron_kernels as hk
from hebatron_kernels import testing

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [FP32, BF16]
# tokens, inputs, outputs: both edges of a strip of 6 rows and a panel of 32 or 64 columns, an odd inner width, several
# chains of 512 steps, several blocks of 384 rows, one of each, none
SIZES = [
    (37, 48, 32),
    (13, 65, 63),
    (6, 33, 129),
    (7, 1, 1),
    (1, 96, 17),
    (5, 2100, 3),
    (800, 24, 40),
    (0, 8, 8),
]


def problem(tokens, inputs, outputs, dtype=torch.float64):
    return [torch.randn(tokens, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_linear_native_matches_oracle(isa, dtype, size):
    with testing.use_isa(isa):
        testing.check_oracle(hk.linear, problem(*size), dtype, "native", size[0] > 0)


def test_linear_native_matches_oracle_at_random_sizes():
    draw = random.Random(5)
    for _ in range(40):
        size = draw.randint(1, 90), draw.randint(1, 200), draw.randint(1, 200)
        testing.check_oracle(hk.linear, problem(*size), draw.choice(DTYPES), "native")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_linear_of_other_backends_matches_oracle(backend, dtype):
    testing.check_oracle(hk.linear, problem(13, 20, 31), dtype, backend)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 500])
def test_linear_of_fp32_weights_is_that_of_their_rounding(tokens):
    x, weight = problem(tokens, 70, 90, torch.float32)
    x = x.bfloat16().requires_grad_()
    masters, rounded = weight.requires_grad_(), weight.detach().bfloat16().requires_grad_()
    upstream = torch.randn(tokens, 90).bfloat16()
    results, grads = [], []
    for w in (masters, rounded):
        results.append(hk.linear(x, w, backend="native"))
        grads.append(torch.autograd.grad(results[-1], [x, w], upstream))
    assert torch.equal(*results)
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[0][1].dtype == torch.float32
    assert torch.equal(grads[0][1].bfloat16(), grads[1][1])  # not rounded twice


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_a_token_does_not_depend_on_the_batch(isa, dtype):
    x, weight = (a.to(dtype) for a in problem(500, 1100, 70, torch.float32))
    with testing.use_isa(isa):
        packed = hk.linear_pack(weight)
        whole = hk.linear(x, weight, backend="native")
        for count in (1, 2, 7, 64, 500):
            for begin in {0, 500 - count}:
                part = x[begin : begin + count]
                assert torch.equal(hk.linear(part, weight, backend="native"), whole[begin : begin + count])
                assert torch.equal(hk.linear_packed(part, packed, 70), whole[begin : begin + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_linear_packed_is_linear_to_the_bit(dtype, size):
    x, weight = problem(*size, torch.float32)
    x = x.to(dtype)
    packed = hk.linear_pack(weight, dtype)
    want = hk.linear(x, weight, backend="native")
    assert torch.equal(hk.linear_packed(x, packed, size[2]), want)
    assert torch.equal(hk.linear_unpack(packed, size[2], size[1]), weight.to(dtype))
    for backend in ("torch", "reference"):
        got = hk.linear_packed(x, packed, size[2], backend=backend)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_linear_takes_slices_and_gives_only_the_gradients_asked_for():
    wide = torch.randn(9, 50)
    weight = torch.randn(20, 40)[:, 5:35].requires_grad_()
    x = wide[:, 10:40]
    y = hk.linear(x, weight, backend="native")
    torch.testing.assert_close(y, x @ weight.T)
    (grad,) = torch.autograd.grad(y.sum(), [weight])
    torch.testing.assert_close(grad, torch.ones(9, 20).T @ x)
    needs = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(hk.linear(needs, weight.detach(), backend="native").sum(), [needs])
    torch.testing.assert_close(grad, torch.ones(9, 20) @ weight.detach())


def test_linear_chooses_by_dtype_and_device():
    x, weight = problem(3, 4, 5, torch.float32)
    assert "native: chosen" in hk.explain("linear", x, weight) or "native" in hk.explain("linear", x, weight)
    assert hk.linear(x.double(), weight).dtype == torch.float64  # torch
    assert hk.linear(x, weight.bfloat16()).dtype == torch.float32  # torch
    with pytest.raises(hk.BackendError, match=r"linear\[native\]: multiplies weights of float32"):
        hk.linear(x, weight.bfloat16(), backend="native")


def test_linear_passes_opcheck_gradcheck_and_fullgraph():
    args = [a.requires_grad_() for a in problem(5, 6, 7)]
    assert torch.autograd.gradcheck(lambda *a: hk.linear(*a, backend="torch"), args)
    x, weight = (a.detach().float() for a in args)
    torch.library.opcheck(torch.ops.hebatron._linear.default, (x, weight, "native"))
    torch.library.opcheck(torch.ops.hebatron._linear_keep.default, (x, weight, "native"))
    packed = hk.linear_pack(weight)
    torch.library.opcheck(torch.ops.hebatron._linear_packed.default, (x, packed, 7, "native"))
    compiled = torch.compile(lambda *a: hk.linear(*a), fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    got, want = compiled(*leaves), hk.linear(*leaves)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)):
        assert torch.equal(a, b)


BAD = [
    ({"x": torch.zeros(3)}, r"x_TD must have shape \(\*, \*\)"),
    ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x_TD must have dtype"),
    ({"x": [[1.0]]}, "x_TD must be a tensor, got list"),
    ({"weight": torch.zeros(4, 5)}, r"weight_MD must have shape \(\*, 4\), got float32\[4, 5\]"),
    ({"weight": torch.zeros(0, 4)}, "weight_MD must have no empty dimension"),
    (
        {"weight": torch.zeros(5, 4, device="meta")},
        "weight_MD must be on cpu like the first argument, got meta",
    ),
    ({"backend": "fast"}, "linear: backend must be one of"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_linear_refuses(wrong, message):
    given = {"x": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "backend": None} | wrong
    with pytest.raises(ValueError, match=message):
        hk.linear(given["x"], given["weight"], backend=given["backend"])


def test_linear_packed_refuses():
    x, packed = torch.zeros(3, 4), hk.linear_pack(torch.zeros(5, 4))
    for args, message in [
        ((x, packed, 6), "linear: packed weights must have as many outputs, theirs, got 5"),
        ((x, packed, 96), r"linear_packed: packed must be the packed form of \(1, 96, 4\) weights"),
        ((x[:, :3], packed, 5), r"linear_packed: packed must be"),
        ((x.bfloat16(), packed, 5), "linear_packed: packed must have dtype bfloat16"),
        ((x, packed, 5.0), "linear_packed: outputs must be an integer"),
        ((x, torch.zeros_like(packed), 5), "linear: packed weights must come from moe_pack"),
        ((x.clone().requires_grad_(), packed, 5), "must not require a gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            hk.linear_packed(*args)
    with pytest.raises(ValueError, match="linear_pack: weight_MD must have shape"):
        hk.linear_pack(torch.zeros(4))


# ---- the products of CUDA, which are torch's ----


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)])
def test_linear_emulated_matches_oracle_and_keeps_the_gradient_of_fp32_weights(emulator, dtypes):
    args = [torch.randn(33, 20).to(dtypes[0]), torch.randn(7, 20).to(dtypes[1])]
    testing.check_oracle(hk.linear, args, None, "emulator")
    got = testing.run(hk.linear, args, backend="emulator")
    assert got["out0"].dtype == dtypes[0] and got["grad1"].dtype == dtypes[1]
    with torch.autocast("cpu", torch.bfloat16):
        again = testing.run(hk.linear, args, backend="emulator")
    assert all(torch.equal(again[name], got[name]) for name in got)


def test_linear_on_cuda_is_named_and_never_chosen(monkeypatch):
    class OnCuda:  # what the choice asks of a tensor, where there is no GPU
        is_cuda = True

    operator = hk.OPERATORS["linear"]
    monkeypatch.setattr(operator, "refusal", lambda backend, args: None)
    assert operator.passed_over("native", [OnCuda()]) == "torch's own products, only by name"

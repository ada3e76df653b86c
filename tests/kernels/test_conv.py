from itertools import pairwise

import numpy as np
import pytest
import torch
from conv_cases import FORMS, make, single

import hebatron_kernels as hk
from hebatron_kernels import testing

# tokens, channels, taps, ends of the sequences (None: one, without cu_seqlens)
SHAPES = [
    (0, 5, 4, None),
    (0, 3, 4, [0]),  # no sequence at all
    (1, 1, 4, None),
    (2, 17, 4, None),  # shorter than its own history
    (
        113,
        17,
        4,
        [0, 1, 1, 3, 40, 113],
    ),  # one token, empty, shorter than the history, over a block of 64 tokens
    (12, 65, 2, [0, 0, 12, 12]),  # empty at both ends; one channel over a block of 64
    (9, 33, 1, [0, 4, 9]),  # one tap: no state
    (130, 8, 16, None),  # the most taps, more than two blocks of tokens
]
DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = ["native", "torch", "reference"]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_conv1d_native_matches_oracle(isa, dtype, form, shape):
    with testing.use_isa(isa):
        testing.check_oracle(hk.causal_conv1d, make(*shape, *form), dtype, "native")


# the gradients of weight and bias are fp32 sums over the tokens; the worst over these shapes is 4.4e-7 of the largest
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_conv1d_torch_matches_oracle(dtype, limit, form, shape):
    args = [
        a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in make(*shape, *form)
    ]
    got = testing.run(hk.causal_conv1d, args, backend="torch")
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    for name, want in testing.run(hk.causal_conv1d, exact, backend="reference").items():
        scale = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(got[name].double(), want, rtol=0, atol=limit * scale, msg=name)


# torch's vector loops round the last elements of a tensor unlike the others, so only native is the same to the bit
EXACT = {"native": dict(rtol=0, atol=0), "torch": dict(rtol=2e-6, atol=2e-6)}


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_causal_conv1d_split_anywhere_is_the_whole(backend):
    x, weight, bias, act, _, state = single(make())
    whole, last = hk.causal_conv1d(x, weight, bias, act, None, state, backend=backend)
    for k in range(x.shape[0] + 1):
        first, middle = hk.causal_conv1d(x[:k], weight, bias, act, None, state, backend=backend)
        second, end = hk.causal_conv1d(x[k:], weight, bias, act, None, middle, backend=backend)
        torch.testing.assert_close(torch.cat([first, second]), whole, **EXACT[backend])
        assert torch.equal(end, last), k


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_conv1d_token_by_token_is_prefill(backend, dtype):
    x, weight, bias, act, _, state = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in make()]
    whole, last = hk.causal_conv1d(x, weight, bias, act, None, state, backend=backend)
    y, state = hk.causal_conv1d(x[:5], weight, bias, act, None, state, backend=backend)
    for t in range(5, x.shape[0]):
        one = hk.causal_conv1d_update(x[t : t + 1], state, weight, bias, act, backend=backend)
        y = torch.cat([y, one])
    loose = dict(rtol=2**-7, atol=2e-6) if backend == "torch" and dtype == torch.bfloat16 else EXACT[backend]
    torch.testing.assert_close(y, whole, **loose)
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_causal_conv1d_document_alone_is_packed(backend):
    ends = [0, 7, 7, 9, 80, 150]
    args = single(make(150, 21, ends=ends))
    packed = testing.run(hk.causal_conv1d, args, grad=False, backend=backend)
    for q, (begin, end) in enumerate(pairwise(ends)):
        alone = hk.causal_conv1d(args[0][begin:end], *args[1:4], None, args[5][q : q + 1], backend=backend)
        torch.testing.assert_close(alone[0], packed["out0"][begin:end], **EXACT[backend])
        assert torch.equal(alone[1][0], packed["out1"][q])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_causal_conv1d_keeps_a_poisoned_document_to_itself(backend):
    ends = [0, 30, 31, 64, 90]
    args = single(make(90, 21, ends=ends))
    clean = testing.run(hk.causal_conv1d, args, backend=backend)
    args[0][31:64], args[5][2] = float("nan"), float("nan")
    got = testing.run(hk.causal_conv1d, args, backend=backend)
    assert got["out0"][31:64].isnan().all()
    for name in ("out0", "grad0"):
        assert torch.equal(got[name][:31], clean[name][:31]) and torch.equal(got[name][64:], clean[name][64:])
    for name in ("out1", "grad5"):
        assert torch.equal(got[name][[0, 1, 3]], clean[name][[0, 1, 3]])


def test_causal_conv1d_does_not_depend_on_threads():
    args = single(make(300, 150, ends=[0, 100, 101, 300]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = testing.run(hk.causal_conv1d, args, backend="native")
        torch.set_num_threads(3)
        three = testing.run(hk.causal_conv1d, args, backend="native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_conv1d_takes_strided_rows_and_an_expanded_gradient(backend):
    args = single(make(ends=[0, 5, 23]))
    flat = testing.run(hk.causal_conv1d, args, backend=backend)
    views = [
        testing.strided(args[0]),
        testing.strided(args[1]),
        args[2],
        *args[3:5],
        testing.strided(args[5]),
    ]
    sliced = testing.run(hk.causal_conv1d, views, backend=backend)
    assert all(torch.equal(sliced[name], flat[name]) for name in flat)
    x = args[0].requires_grad_()
    y, _ = hk.causal_conv1d(x, *args[1:], backend=backend)
    expanded = torch.autograd.grad(y, x, torch.ones(()).expand_as(y), retain_graph=True)
    assert torch.equal(expanded[0], torch.autograd.grad(y, x, torch.ones_like(y))[0])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_causal_conv1d_offsets_pass_int32(backend):
    stride = 2**30 + 8  # row 2 starts past 2^31 elements; only the rows' pages are ever touched
    wide = torch.from_numpy(np.zeros(2 * stride + 8, dtype=np.int16)).view(torch.bfloat16)
    x = wide.as_strided((3, 8), (stride, 1))
    x.copy_(torch.randn(3, 8))
    args = [a.bfloat16() if isinstance(a, torch.Tensor) else a for a in make(3, 8)[1:]]
    got = hk.causal_conv1d(x, *args, backend=backend)
    want = hk.causal_conv1d(x.clone(memory_format=torch.contiguous_format), *args, backend=backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "taps", "form"), [(33, 4, FORMS[0]), (16, 1, FORMS[1]), (1, 16, FORMS[0])]
)
def test_causal_conv1d_update_matches_oracle(isa, dtype, channels, taps, form):
    x, weight, bias, act, _, _ = make(3, channels, taps, None, *form)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    states = [torch.randn(3, channels, taps - 1).to(dtype)]
    states += [states[0].clone(), states[0].double()]
    with testing.use_isa(isa):
        native = hk.causal_conv1d_update(x, states[0], weight, bias, act, backend="native")
    torch_form = hk.causal_conv1d_update(testing.strided(x), states[1], weight, bias, act, backend="torch")
    exact = hk.causal_conv1d_update(x.double(), states[2], weight, bias, act, backend="reference")
    for y in (native, torch_form):
        torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=4e-6)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0].double(), states[2])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("ends", [None, [0, 0, 2, 6]])
def test_causal_conv1d_gradcheck(backend, ends):
    x, weight, bias, act, cu_seqlens, state = make(6, 3, 4, ends)
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: hk.causal_conv1d(a, b, c, act, cu_seqlens, d, backend=backend),
        leaves,
        check_undefined_grad=False,
    )


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_conv1d_registration_and_fullgraph(backend, form):
    args = single(make(11, 6, 4, [0, 2, 11], *form))
    testing.check_registration("causal_conv1d", *args, backend=backend)
    testing.check_fullgraph(hk.causal_conv1d, args, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_conv1d_update_registration_and_fullgraph(backend):
    x, weight, bias, act, _, _ = single(make(2, 6))
    state = torch.randn(2, 6, 3)
    testing.check_registration("causal_conv1d_update", x, state, weight, bias, act, backend=backend)
    states = [state.clone(), state.clone()]
    torch._dynamo.reset()
    compiled = torch.compile(hk.causal_conv1d_update, fullgraph=True, backend="aot_eager")
    want = hk.causal_conv1d_update(x, states[0], weight, bias, act, backend=backend)
    got = compiled(x, states[1], weight, bias, act, backend=backend)
    torch.testing.assert_close(got, want)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], state)


def test_causal_conv1d_torch_form_never_reads_values():
    """On the meta device a shape that depends on a value raises: so nothing waits for a GPU either."""
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in make(ends=[0, 5, 23])]
    y, state = hk.causal_conv1d(*args, backend="torch")
    assert y.shape == (23, 10) and state.shape == (2, 10, 3)


def test_causal_conv1d_chooses_native_and_says_why_not():
    args = make()
    assert "-> native" in hk.explain(hk.causal_conv1d, *single(args))
    assert "-> torch" in hk.explain(hk.causal_conv1d, *args)
    with pytest.raises(hk.BackendError, match=r"causal_conv1d\[native\]: takes at most 16 taps, got 17"):
        hk.causal_conv1d(*single(make(5, 4, 17)), backend="native")
    x, weight, bias, act, _, _ = single(make(2, 6))
    with pytest.raises(ValueError, match="causal_conv1d_update: arguments must not require a gradient"):
        hk.causal_conv1d_update(x.requires_grad_(), torch.zeros(2, 6, 3), weight, bias, act)

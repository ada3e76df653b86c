from contextlib import nullcontext

import pytest
import torch
from moe_cases import BACKENDS, DTYPES, FORMS, check_against, groups, with_form

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

# experts, width, outputs, offsets, rows: ragged; empty first, middle and last; all to one; none at all; rows past
# the end; widths that are not multiples of 16 bytes; one expert
GROUPS = [
    (4, 16, 24, [3, 5, 9, 14], 14),
    (5, 8, 16, [0, 4, 4, 7, 7], 7),
    (3, 16, 8, [0, 11, 11], 11),
    (3, 16, 8, [0, 0, 0], 0),
    (3, 16, 8, [0, 0, 0], 5),
    (4, 16, 24, [2, 2, 6, 7], 12),
    (3, 7, 24, [2, 5, 9], 9),
    (3, 16, 5, [2, 5, 9], 11),
    (1, 1, 1, [1], 1),
    (2, 113, 1023, [1, 6], 6),
]


def plain(a, b, ends, rows, scale, activation):
    left = a if rows is None else a[rows.long()]
    offsets = ends.tolist()
    parts = [left[begin:end] @ b[e] for e, (begin, end) in enumerate(zip([0, *offsets], offsets))]
    parts.append(left.new_zeros(left.shape[0] - offsets[-1], b.shape[2]))
    out = torch.cat(parts)
    out = out.relu().square() if activation == "relu2" else out
    return out if scale is None else out * scale.unsqueeze(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("stored", ["outputs last", "width last"])
@pytest.mark.parametrize(("experts", "width", "outputs", "offsets", "rows"), GROUPS)
def test_grouped_gemm_matches_oracle(dtype, stored, form, experts, width, outputs, offsets, rows):
    args = with_form(groups(experts, width, outputs, offsets, rows), form)
    if stored == "outputs last":
        args[1] = args[1].contiguous()
    check_against(hk.grouped_gemm, plain, args, dtype, rows > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_grouped_gemm_gradcheck(backend, form):
    args = with_form(groups(3, 4, 3, [2, 2, 5], 6), form)
    leaves = [i for i in (0, 1, 4) if args[i] is not None]

    def call(*values):
        given = list(args)
        for i, value in zip(leaves, values):
            given[i] = value
        return hk.grouped_gemm(*given, backend=backend)

    inputs = [args[i].detach().requires_grad_() for i in leaves]
    assert torch.autograd.gradcheck(call, inputs, check_undefined_grad=False)


def test_grouped_gemm_sums_the_gradient_of_a_row_used_often_in_fp32():
    # 2,048 uses of one row, each with a gradient of 1: bf16 stops counting at 256
    a = torch.ones(3, 8, dtype=torch.bfloat16, requires_grad=True)
    b = torch.eye(8, dtype=torch.bfloat16).expand(1, 8, 8)
    rows = torch.ones(2048, dtype=torch.int32)
    hk.grouped_gemm(a, b, torch.tensor([2048]).int(), rows).sum().backward()
    assert a.grad.tolist() == [[0.0] * 8, [2048.0] * 8, [0.0] * 8]


@pytest.mark.parametrize("backend", [*BACKENDS, "native"])
@pytest.mark.parametrize(("form", "rows"), [(FORMS[1], 0), (FORMS[4], 0), (FORMS[4], 4)])
def test_grouped_gemm_of_no_rows(backend, form, rows):
    """Nothing of a is used, and nothing of b."""
    args = with_form(groups(3, 16, 8, [0, 0, 0], rows, torch.float32), form, torch.float32)
    found = testing.run(hk.grouped_gemm, args, backend=backend)
    assert found["out0"].shape == (rows, 8)
    assert all(value.eq(0).all() for value in found.values())


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("rows", [0, 1])
def test_grouped_gemm_takes_a_row_or_none_with_any_stride(rows, stored):
    """Contiguous to torch whatever the stride, which grouped_mm refuses where it is no multiple of 16 bytes."""
    a = torch.randn(3, 11)[:rows, :8].requires_grad_()
    b = torch.randn(2, 16, 8).transpose(1, 2) if stored else torch.randn(2, 8, 16)
    ends = torch.tensor([0, rows], dtype=torch.int32)
    y = hk.grouped_gemm(a, b.requires_grad_(), ends, backend="torch")
    torch.testing.assert_close(y, a @ b[1])
    upstream = torch.randn(3, 19)[:rows, :16]
    grads = [torch.autograd.grad(out, (a, b), upstream, retain_graph=True) for out in (y, a @ b[1])]
    torch.testing.assert_close(*grads)


# the native form with the ISA it is given; fp64 it refuses
NATIVE = [("native", isa, dtype) for isa in testing.isas() for dtype in DTYPES[1:]]
EVERY = [(backend, None, dtype) for backend in BACKENDS for dtype in DTYPES] + NATIVE


def isa_of(isa):
    return testing.use_isa(isa) if isa else nullcontext()


@pytest.mark.parametrize(("backend", "isa", "dtype"), NATIVE)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[4]])
@pytest.mark.parametrize("stored", ["outputs last", "width last"])
@pytest.mark.parametrize(("experts", "width", "outputs", "offsets", "rows"), GROUPS)
def test_grouped_gemm_native_matches_oracle(
    backend, isa, dtype, stored, form, experts, width, outputs, offsets, rows
):
    args = with_form(groups(experts, width, outputs, offsets, rows), form)
    if stored == "outputs last":
        args[1] = args[1].contiguous()
    with isa_of(isa):
        testing.check_oracle(hk.grouped_gemm, args, dtype, backend, rows > 0)


@pytest.mark.parametrize(("backend", "isa", "dtype"), NATIVE)
def test_grouped_gemm_native_of_a_row_does_not_depend_on_the_others_to_the_bit(backend, isa, dtype):
    a, b, ends = groups(2, 1100, 70, [400, 404], 404, dtype)
    with isa_of(isa):
        whole = hk.grouped_gemm(a, b.transpose(1, 2), ends, backend=backend)
        for count in (1, 2, 7, 64):
            some = hk.grouped_gemm(a[:count], b.transpose(1, 2), ends.clamp(max=count), backend=backend)
            assert torch.equal(some, whole[:count])


def test_grouped_gemm_native_checks_its_numbers():
    a, b, ends = groups(2, 8, 4, [2, 5], 5, torch.float32)
    good = dict(
        rows=5, a_rows=5, experts=2, n=4, k=8, workers=1, dtype="float32", relu2=0, a=a, a_stride=8,
        rows_of_a=None, b=b, b_expert_stride=32, b_stride=8, b_k_major=1, offsets=ends, scale=None, kept=None,
        row_sums=None, out=torch.empty(5, 4), implementation=0, tile_m=0, tile_n=0,
    )  # fmt: skip
    for wrong, message in [
        (dict(rows=-1), "rows must be >= 0, got -1"),
        (dict(rows=4), "offsets must rise from 0 to the rows, got 5"),
        (dict(offsets=torch.tensor([3, 2]).int()), "offsets must rise from 0 to the rows, got 2"),
        (dict(rows_of_a=torch.full((5,), 5).int()), "rows must be rows of a, got 5"),
        (dict(experts=0), "experts must be > 0, got 0"),
        (dict(n=0), "n must be > 0, got 0"),
        (dict(k=0), "k must be > 0, got 0"),
        (dict(workers=0), "workers must be > 0, got 0"),
        (dict(implementation=1), "implementation must be 0 on the CPU, got 1"),
        (dict(kept=a), "kept and row_sums must be null on the CPU; rows, got 5"),
    ]:
        with pytest.raises(ValueError, match=f"^grouped_gemm: {message}"):
            _native.call("grouped_gemm_fwd", **{**good, **wrong})


def test_grouped_gemm_wgrad_checks_its_numbers():
    a, b = torch.ones(5, 8), torch.ones(5, 4)
    good = dict(
        rows=5, a_rows=5, experts=2, m=8, n=4, workers=1, dtype="float32", out_dtype="float32", a=a, a_stride=8,
        rows_of_a=None, b=b, b_stride=4, offsets=torch.tensor([2, 5]).int(), out=torch.empty(2, 8, 4),
        transposed=0, implementation=0, tile_m=0, tile_n=0,
    )  # fmt: skip
    for wrong, message in [
        (dict(rows=-1), "rows must be >= 0, got -1"),
        (dict(rows=4), "offsets must rise from 0 to the rows, got 5"),
        (dict(offsets=torch.tensor([3, 2]).int()), "offsets must rise from 0 to the rows, got 2"),
        (dict(rows_of_a=torch.full((5,), 5).int()), "rows must be rows of a, got 5"),
        (dict(experts=0), "experts must be > 0, got 0"),
        (dict(m=0), "m must be > 0, got 0"),
        (dict(n=0), "n must be > 0, got 0"),
        (dict(workers=0), "workers must be > 0, got 0"),
        (dict(implementation=1), "implementation must be 0 on the CPU, got 1"),
    ]:
        with pytest.raises(ValueError, match=f"^grouped_gemm_wgrad: {message}"):
            _native.call("grouped_gemm_wgrad", **{**good, **wrong})


@pytest.mark.parametrize("stored", ["outputs last", "width last"])
def test_grouped_gemm_native_computes_the_gradients_that_are_wanted_in_the_layout_of_b(stored, monkeypatch):
    a, b, ends, rows, scale, activation = with_form(groups(3, 16, 8, [2, 2, 5], 6), FORMS[4], torch.float32)
    a, b = a.float(), (b.contiguous() if stored == "outputs last" else b).float()
    called = []
    real = _native.call
    monkeypatch.setattr(_native, "call", lambda op, **k: (called.append(op), real(op, **k))[1])
    product, of_b = "grouped_gemm_fwd", "grouped_gemm_wgrad"
    for wanted, ops in ((a, [product] * 3), (b, [product, product, of_b]), (scale, [product] * 2)):
        for value in (a, b, scale):
            value.requires_grad_(value is wanted)
        called.clear()
        out = hk.grouped_gemm(a, b, ends, rows, scale, activation, backend="native")
        (grad,) = torch.autograd.grad(out.sum(), wanted)
        assert called == ops and grad.shape == wanted.shape
        assert wanted is not b or grad.stride() == b.stride()


@pytest.mark.parametrize("form", FORMS)
def test_grouped_gemm_native_uses_no_gradient_past_the_end(form):
    args = with_form(groups(3, 16, 8, [2, 2, 5], 8, torch.float32), form, torch.float32)
    leaves = [v.detach().requires_grad_() for v in args if torch.is_tensor(v) and v.is_floating_point()]
    out = hk.grouped_gemm(
        leaves[0], leaves[1], *args[2:4], *(leaves[2:] or [None]), args[5], backend="native"
    )
    upstream = torch.ones_like(out)
    want = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    upstream[5:] = torch.nan
    for got, value in zip(torch.autograd.grad(out, leaves, upstream), want):
        assert torch.equal(got, value)


@pytest.mark.parametrize(("backend", "isa", "dtype"), EVERY)
def test_grouped_gemm_never_reads_past_the_end(backend, isa, dtype):
    with isa_of(isa):
        never_reads_past_the_end(backend, dtype)


def never_reads_past_the_end(backend, dtype):
    a, b, ends = groups(3, 16, 8, [2, 2, 5], 9, dtype)
    a[5:], b[1] = torch.nan, torch.nan
    a.requires_grad_(), b.requires_grad_()
    out = hk.grouped_gemm(a, b.transpose(1, 2), ends, backend=backend)
    assert out[:5].isfinite().all() and out[5:].eq(0).all()
    upstream = torch.ones_like(out)
    upstream[5:] = torch.nan
    out.backward(upstream)
    assert a.grad[:5].isfinite().all() and a.grad[5:].eq(0).all()
    assert b.grad.isfinite().all() and b.grad[1].eq(0).all() and b.grad[0].ne(0).all()


@pytest.mark.parametrize(("backend", "isa", "dtype"), EVERY)
def test_grouped_gemm_uses_no_scale_past_the_end(backend, isa, dtype):
    with isa_of(isa):
        uses_no_scale_past_the_end(backend, dtype)


def uses_no_scale_past_the_end(backend, dtype):
    a, b, ends, rows, scale, activation = with_form(groups(3, 16, 8, [2, 2, 5], 9, dtype), FORMS[4], dtype)
    scale[5:] = torch.nan
    a.requires_grad_(), b.requires_grad_(), scale.requires_grad_()
    out = hk.grouped_gemm(a, b, ends, rows, scale, activation, backend=backend)
    assert out[:5].isfinite().all() and out[5:].eq(0).all()
    upstream = torch.ones_like(out)
    upstream[5:] = torch.nan
    out.backward(upstream)
    assert a.grad.isfinite().all() and b.grad.isfinite().all()
    assert scale.grad[:5].isfinite().all() and scale.grad[5:].eq(0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "native"])
def test_grouped_gemm_keeps_nan_to_its_row(backend):
    a, b, ends, *_ = with_form(groups(3, 16, 8, [2, 2, 5], 5, torch.float32), FORMS[0], torch.float32)
    a[3, 7] = torch.nan
    out = hk.grouped_gemm(a, b, ends, activation="relu2", backend=backend)
    assert out[3].isnan().all() and out[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_gemm_takes_any_strides_and_an_expanded_gradient(dtype):
    a, stored, ends = groups(4, 16, 24, [3, 5, 9, 14], 14, dtype)
    b = stored.transpose(1, 2).contiguous()
    want = testing.run(hk.grouped_gemm, [a, b, ends], backend="torch")
    views = [
        (testing.strided(a), testing.strided(b)),
        (a.t().contiguous().t(), b.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
        (testing.strided(a.t().contiguous()).t(), b.repeat_interleave(8, 2)[..., ::8]),
    ]
    for left, right in views:
        got = testing.run(hk.grouped_gemm, [left, right, ends], backend="torch")
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    spread = hk.grouped_gemm(a, b[:, :1].expand(4, 16, 24), ends)
    torch.testing.assert_close(spread, hk.grouped_gemm(a, b[:, :1].repeat(1, 16, 1), ends))
    a.requires_grad_(), stored.requires_grad_()
    hk.grouped_gemm(a, stored.transpose(1, 2), ends).sum().backward()
    torch.testing.assert_close(a.grad[0], stored[0].sum(0).detach())
    view = stored.detach().transpose(1, 2).requires_grad_()
    (grad,) = torch.autograd.grad(hk.grouped_gemm(a, view, ends, backend="torch").sum(), view)
    assert grad.stride() == view.stride()  # no copy on its way to the stored weights


def calls(dtype, width=16):
    plain_form = with_form(groups(4, width, 8, [3, 5, 9, 14], 14, dtype), FORMS[0], dtype)
    whole = with_form(groups(4, width, 8, [3, 5, 9, 11], 14, dtype), FORMS[4], dtype)
    return {"plain": plain_form, "whole": whole}


@pytest.mark.parametrize("backend", [*BACKENDS, "native"])
@pytest.mark.parametrize("name", ["plain", "whole"])
def test_grouped_gemm_registration(name, backend):
    testing.check_registration("grouped_gemm", *calls(torch.float32)[name], None, backend=backend)


@pytest.mark.parametrize(("dtype", "width"), [*((d, 16) for d in DTYPES), (torch.float32, 15)])
@pytest.mark.parametrize("name", ["plain", "whole"])
def test_grouped_gemm_compiles_to_one_graph(name, dtype, width):
    testing.check_fullgraph(hk.grouped_gemm, calls(dtype, width)[name], "torch")


@pytest.mark.parametrize("name", ["plain", "whole"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_grouped_gemm_opaque_forms_compile_to_one_graph(name, backend):
    testing.check_fullgraph(hk.grouped_gemm, calls(torch.float32)[name], backend)


def test_grouped_gemm_products_of_the_torch_form_are_registered():
    a, stored, ends = groups(3, 16, 8, [2, 2, 5], 5, torch.float32)
    for width in (16, 15):  # grouped_mm and the loop
        left = a[:, :width].contiguous()
        right = stored[:, :, :width].transpose(1, 2)
        torch.library.opcheck(torch.ops.hebatron._torch_gemm, (left, right, ends))
        torch.library.opcheck(torch.ops.hebatron._torch_weight_gemm, (left, a, ends))


def test_grouped_gemm_explains_its_choice():
    a, b, ends, *_ = calls(torch.bfloat16)["plain"]
    text = hk.explain(hk.grouped_gemm, a, b, ends)
    assert text.startswith("grouped_gemm: native")
    assert hk.explain(hk.grouped_gemm, a.half(), b.half(), ends).startswith("grouped_gemm: torch")
    for backend in [*BACKENDS, "native"]:
        with pytest.raises(
            hk.BackendError, match=rf"{backend}\]: has no implementation sm90a:128x208.* only"
        ):
            hk.grouped_gemm(a, b, ends, implementation="sm90a:128x208", backend=backend)
    with pytest.raises(hk.BackendError, match="no automatic backend serves these arguments; see explain"):
        hk.grouped_gemm(a, b, ends, implementation="sm80")

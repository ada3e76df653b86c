import subprocess
import sys

import pytest
import torch

import hebatron_kernels as hk
from hebatron_kernels import testing

# rows, width, group: one row, odd sizes around the vector width (8 and 16 lanes), one column, the model's gated form
SHAPES = [
    (1, 1, 1),
    (3, 113, 113),
    (2, 1023, 341),
    (65, 48, 16),
    (5, 17, 17),
    (0, 32, 8),
    (130, 33, 11),
    (2, 4096, 512),
]
# residual, gate
FORMS = [(False, False), (True, False), (False, True), (True, True)]
DTYPES = [torch.float32, torch.bfloat16]


def make(rows, width, residual, gate, dtype=torch.float64):
    def noise():
        return torch.randn(rows, width, dtype=dtype)

    weight = 1 + 0.3 * torch.randn(width, dtype=dtype)
    return [noise(), weight, 1e-5, noise() if residual else None, noise() if gate else None]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("residual", "gate"), FORMS)
@pytest.mark.parametrize(("rows", "width", "group"), SHAPES)
def test_rms_norm_native_matches_oracle(isa, dtype, residual, gate, rows, width, group):
    with testing.use_isa(isa):
        testing.check_oracle(
            hk.rms_norm, [*make(rows, width, residual, gate), group], dtype, "native", width > 1
        )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize(("residual", "gate"), FORMS)
@pytest.mark.parametrize(("rows", "width", "group"), SHAPES)
def test_rms_norm_torch_matches_oracle(dtype, residual, gate, rows, width, group):
    # one column: the gradient is the difference of two equal terms, all rounding, so only the forward is held
    testing.check_oracle(hk.rms_norm, [*make(rows, width, residual, gate), group], dtype, "torch", width > 1)


@pytest.mark.parametrize("isa", testing.isas())
def test_rms_norm_takes_strided_rows_and_a_wider_weight(isa):
    x, weight, eps, residual, gate = make(9, 48, True, True, torch.float32)
    views = [testing.strided(x), weight, eps, testing.strided(residual), testing.strided(gate), 16]
    with testing.use_isa(isa):
        flat = testing.run(hk.rms_norm, [x, weight, eps, residual, gate, 16], backend="native")
        sliced = testing.run(hk.rms_norm, views, backend="native")
        assert all(torch.equal(sliced[name], flat[name]) for name in flat)
        half = [x.bfloat16(), weight, eps]
        got = hk.rms_norm(*half, backend="native")
        want = hk.rms_norm(x.bfloat16().double(), weight.double(), eps, backend="reference")
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rms_norm_rounds_the_sum_before_it_normalises(backend):
    x, weight, eps, residual, _ = make(7, 48, True, False, torch.bfloat16)
    y, total = hk.rms_norm(x, weight, eps, residual, backend=backend)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, hk.rms_norm(total, weight, eps, backend=backend))


def test_rms_norm_does_not_depend_on_threads_or_neighbours():
    args = [*make(300, 96, True, True, torch.float32), 32]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = testing.run(hk.rms_norm, args, backend="native")
        torch.set_num_threads(2)
        two = testing.run(hk.rms_norm, args, backend="native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    alone = hk.rms_norm(args[0][7:8], args[1], 1e-5, args[3][7:8], args[4][7:8], 32, backend="native")
    assert torch.equal(alone[0], one["out0"][7:8])


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize(
    "extreme", [-88.0, -89.0, -100.0, -1e30, -1e38, -torch.inf, 89.0, torch.inf, torch.nan]
)
def test_rms_norm_gate_is_silu_at_the_ends_of_fp32(isa, extreme):
    x, weight, eps, _, gate = make(2, 20, False, True, torch.float32)
    gate[0, 3] = extreme
    with testing.use_isa(isa):
        got = hk.rms_norm(x, weight, eps, None, gate, 1, backend="native")
    want = hk.rms_norm(x, weight, eps, None, gate, 1, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-30, equal_nan=True)


def test_rms_norm_keeps_a_bad_row_to_itself():
    x, weight, eps, _, _ = make(4, 40, False, False, torch.float32)
    clean = hk.rms_norm(x, weight, eps, backend="native")
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    got = hk.rms_norm(x, weight, eps, backend="native")
    assert got[1].isnan().all() and not got[2].isfinite().all()
    assert torch.equal(got[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rms_norm_gradcheck(backend):
    x, weight, eps, residual, gate = make(3, 6, True, True)
    leaves = [t.requires_grad_() for t in (x, weight, residual, gate)]
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: hk.rms_norm(a, b, eps, c, d, 3, backend=backend),
        leaves,
        check_undefined_grad=False,
    )


@pytest.mark.parametrize(("residual", "gate"), FORMS)
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_rms_norm_registration_and_fullgraph(backend, residual, gate):
    args = [*make(5, 12, residual, gate, torch.float32), 4]
    testing.check_registration("rms_norm", *args, backend=backend)
    testing.check_fullgraph(hk.rms_norm, args, backend)


def test_rms_norm_chooses_native_and_says_why_not():
    x, weight, *_ = make(2, 8, False, False)
    assert "-> native" in hk.explain(hk.rms_norm, x.float(), weight.float())
    text = hk.explain("rms_norm", x, weight)
    assert "-> torch" in text and "computes float32 and bfloat16, got float64" in text
    with pytest.raises(
        hk.BackendError, match=r"rms_norm\[native\]: computes float32 and bfloat16, got float64"
    ):
        hk.rms_norm(x, weight, backend="native")
    with pytest.raises(hk.BackendError, match="needs a contiguous last dimension"):
        hk.rms_norm(x.float().t().contiguous().t(), weight.float(), backend="native")
    with pytest.raises(hk.BackendError, match="not written for this operator"):
        hk.rms_norm(x, weight, backend="triton")
    with hk.use_backend("reference"):
        assert "-> reference" in hk.explain("rms_norm", x, weight)
        assert "-> torch" in hk.explain("rms_norm", x, weight, backend="torch")
    with (
        pytest.raises(ValueError, match=r"use_backend: backend must be one of .* got 'fast'"),
        hk.use_backend("fast"),
    ):
        pass


def test_environment_names_the_backend_and_the_isa():
    code = (
        "import torch, hebatron_kernels as hk;"
        "print(hk.explain('rms_norm', torch.ones(1, 4), torch.ones(4)).splitlines()[0]);"
        "hk.rms_norm(torch.ones(1, 4), torch.ones(4), backend='native');"
        "from hebatron_kernels import _native; print(_native.cpu_module.current_isa())"
    )

    def python(**env):
        import os

        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
        )

    good = python(HEBATRON_BACKEND="reference", HEBATRON_ISA="portable")
    assert good.stdout.split() == ["rms_norm:", "reference", "portable"], good.stderr
    assert "HEBATRON_BACKEND must be one of native" in python(HEBATRON_BACKEND="fast").stderr
    assert "HEBATRON_ISA must be one of portable" in python(HEBATRON_ISA="sse").stderr

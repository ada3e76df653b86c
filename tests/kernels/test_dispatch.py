"""What every operator gets from the dispatch and the native boundary, whatever it computes."""

from types import ModuleType

import pytest
import torch

import hebatron_kernels as hk
from hebatron_kernels import _dispatch, _evidence, _native, testing


def conv_args(dtype=torch.float32):
    return [
        torch.randn(9, 48, dtype=dtype),
        torch.randn(48, 4, dtype=dtype),
        torch.randn(48, dtype=dtype),
        "silu",
    ]


def norm_args(dtype=torch.float32):
    return [torch.randn(9, 48, dtype=dtype), torch.randn(48, dtype=dtype)]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("op", "make"), [(hk.rms_norm, norm_args), (hk.causal_conv1d, conv_args)])
def test_native_does_not_depend_on_the_default_dtype(op, make, default):
    args = make()
    wanted = testing.run(op, args, backend="native")
    torch.set_default_dtype(default)
    try:
        got = testing.run(op, args, backend="native")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_updates_in_place_are_seen_by_autograd(backend):
    conv_state = torch.randn(2, 4, 3)
    ssm_state = torch.randn(2, 4, 8, 16)
    before = conv_state._version, ssm_state._version
    hk.causal_conv1d_update(torch.randn(2, 4), conv_state, torch.randn(4, 4), None, "silu", backend=backend)
    x, dt, A, B, C = (
        torch.randn(2, 4, 8),
        torch.randn(2, 4),
        -torch.rand(4),
        torch.randn(2, 2, 16),
        torch.randn(2, 2, 16),
    )
    hk.ssd_update(ssm_state, x, dt, A, B, C, None, None, backend=backend)
    assert conv_state._version > before[0] and ssm_state._version > before[1]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_second_order_through_an_opaque_form_raises(backend):
    x, weight = (a.requires_grad_() for a in norm_args())
    loss = (hk.rms_norm(x, weight, backend=backend) + x**3).sum()
    with pytest.raises(RuntimeError, match="_rms_norm: has gradients of first order only"):
        torch.autograd.grad(loss, [x], create_graph=True)


def test_autocast_leaves_the_documented_precision():
    x, dt, B = torch.randn(40, 2, 8), torch.randn(40, 2), torch.randn(40, 1, 16)
    scan = [x, dt, -torch.rand(2), B, B, None, None]
    targets = torch.randint(0, 50, (40,))
    calls = [
        lambda: hk.ssd_scan(*scan)[0],
        lambda: hk.linear_cross_entropy(x.flatten(1), torch.ones(50, 16), targets),
        lambda: hk.attention_prefill(x, x, x),
    ]
    for call in calls:
        wanted = call()
        with torch.autocast("cpu", torch.bfloat16):
            got = call()
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_an_empty_backend_name_is_refused():
    with pytest.raises(ValueError, match=r"rms_norm: backend must be one of .* got ''"):
        hk.rms_norm(*norm_args(), backend="")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_tokens_pass_registration(backend):
    testing.check_registration(
        "causal_conv1d", torch.randn(0, 4), torch.randn(4, 4), None, None, None, None, backend=backend
    )
    x = torch.randn(0, 2, 8, dtype=torch.float64)
    B, dt = torch.randn(0, 1, 4, dtype=torch.float64), torch.randn(0, 2, dtype=torch.float64)
    scan = [x, dt, -torch.rand(2, dtype=torch.float64), B, B, None, None, (0.0, 1.0), None, None, 8]
    testing.check_registration("ssd_scan", *scan, backend="reference", dtype=torch.float64)
    empty = torch.empty(0, 2, dtype=torch.int64)
    testing.check_registration(
        "moe_combine", torch.randn(0, 4), empty.flatten(), torch.randn(0, 2), 0, backend="reference"
    )


def test_a_native_form_without_backward_differentiates_the_torch_form():
    """The door through which a kernel comes before its backward does."""

    def module(function):
        made = ModuleType("square")
        made.square = function
        return made

    forms = {
        "native": module(lambda x: x.detach() ** 2),
        "torch": module(lambda x: x * x),
        "reference": module(lambda x: x**2),
    }
    square = _dispatch.Operator("square", "Tensor x", "Tensor", forms, lambda x: torch.empty_like(x))
    try:
        x = torch.tensor([3.0, -2.0], requires_grad=True)
        out = square(x, backend="native")
        out.backward(torch.ones(2))
        assert torch.equal(out, torch.tensor([9.0, 4.0])) and torch.equal(x.grad, torch.tensor([6.0, -4.0]))
    finally:
        del _dispatch.OPERATORS["square"]


def test_a_form_keeps_tensors_for_its_backward_and_is_told_which_gradients_are_wanted():
    told = []

    def module(**functions):
        made = ModuleType("scaled")
        for name, function in functions.items():
            setattr(made, name, function)
        return made

    def keep_bwd(grads, kept, wanted, x, weight, factor):
        told.append(list(wanted))
        grad = grads[0] * factor
        found = [lambda: grad * weight, lambda: grad * kept[0]]
        return [make() if want else x.new_empty(0) for make, want in zip(found, wanted)]

    def plain(x, weight, factor):
        return x * weight * factor

    forms = {
        "native": module(
            scaled=plain,
            scaled_keep=lambda x, weight, factor: (x * weight * factor, x.clone()),
            scaled_keep_bwd=keep_bwd,
        ),
        "torch": module(scaled=plain),
        "reference": module(scaled=plain),
    }
    scaled = _dispatch.Operator(
        "scaled",
        "Tensor x, Tensor weight, float factor",
        "Tensor",
        forms,
        lambda x, *_: torch.empty_like(x),
        fake_keep=lambda x, *_: (torch.empty_like(x),),
    )
    try:
        args = [torch.randn(5), torch.randn(5), 2.0]
        want = testing.run(scaled, args, backend="torch")
        for backend in ("native", "reference"):
            got = testing.run(scaled, args, backend=backend)
            assert all(torch.equal(got[name], want[name]) for name in want)
        weight = args[1].clone().requires_grad_()
        scaled(args[0], weight, 2.0, backend="native").sum().backward()
        assert torch.equal(weight.grad, 2 * args[0]) and told == [[True, True], [False, True]]
        assert torch.equal(scaled(*args, backend="native"), want["out0"]) and len(told) == 2
        testing.check_registration("scaled", *args, backend="native")
        testing.check_fullgraph(scaled, args, "native")
    finally:
        del _dispatch.OPERATORS["scaled"]


def test_a_tensor_on_another_device_is_named():
    """The last check before the pointers cross; no operator lets it come so far."""

    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 3

    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"some_op: weight must be on cpu like the others, got "):
        _native.call("some_op", rows=2, x=x, weight=torch.ones(4).as_subclass(Elsewhere))


def test_a_module_older_than_the_code_asks_for_a_rebuild():
    with pytest.raises(
        hk.BackendError, match=r"an_op_to_come: hebatron_kernels._cpu is older .*; rebuild: pip"
    ):
        _native.call("an_op_to_come", rows=1, a=torch.ones(1))


def test_the_emulator_says_how_to_load_it(monkeypatch):
    monkeypatch.setattr(_native, "emulator_module", None)
    with pytest.raises(
        hk.BackendError, match=r"rms_norm\[emulator\]: call hebatron_kernels.testing.load_emulator"
    ):
        hk.rms_norm(*norm_args(), backend="emulator")
    assert "emulator  call hebatron_kernels.testing.load_emulator() first" in hk.explain(
        "rms_norm", *norm_args()
    )
    with pytest.raises(hk.BackendError, match=r"linear_packed\[emulator\]: not written for this operator"):
        hk.linear_packed(torch.ones(2, 3), hk.linear_pack(torch.ones(4, 3)), 4, backend="emulator")


@pytest.mark.parametrize("missing", ["compiler", "cmake", "pybind11", "source"])
def test_load_emulator_names_what_is_missing(monkeypatch, tmp_path, missing):
    testing._emulator.cache_clear()
    if missing == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
        message = r"a C\+\+ compiler \(no-such-compiler\)"
    elif missing == "cmake":
        monkeypatch.setattr(testing, "_tool", lambda name: None if name == "cmake" else name)
        message = "cmake"
    elif missing == "pybind11":
        monkeypatch.setattr(testing, "find_spec", lambda name: None)
        message = "pybind11"
    else:
        monkeypatch.setattr(testing, "ROOT", tmp_path)
        message = "the source tree"
    with pytest.raises(hk.BackendError, match=f"load_emulator: needs {message}"):
        testing.load_emulator()
    testing._emulator.cache_clear()


def test_cuda_kernels_are_chosen_by_their_evidence_alone(monkeypatch):
    entry = dict(kernel="norm", digest="d1", toolkit=13, arch="sm_90", gpu="NVIDIA H100", date="2026-12-01")
    monkeypatch.setattr(_evidence, "entries", (entry,))
    monkeypatch.setattr(_native, "digests", {"norm": "d1", "grouped_gemm_sm80": "d2"})
    monkeypatch.setattr(_native, "toolkit", 13)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device))

    def choice(x, kernels, device):
        return x + 1 if _native.unproven(kernels, device) is None else x - 1

    assert _native.unproven(["norm"], 0) is None
    assert (
        _native.unproven(["norm"], 1)
        == "never run on sm_91 with CUDA 13, only on sm_90 with CUDA 13, only by name"
    )
    assert _native.unproven(["norm", "grouped_gemm_sm80"], 0) == "never run on hardware, only by name"
    assert "without conv; rebuild" in _native.unproven(["conv"], 0)
    compiled = torch.compile(choice, fullgraph=True, backend="eager", dynamic=False)
    assert compiled(torch.zeros(1), ["norm"], 0).item() == 1
    assert compiled(torch.zeros(1), ["norm"], 1).item() == -1

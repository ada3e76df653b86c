"""rms_norm's CUDA kernels on a GPU."""

import pytest
import torch
from gpu_cases import (
    assert_same_bits,
    at,
    check_graph,
    check_never_waits,
    check_oracle,
    check_pointer_errors,
    check_stream,
    need_memory,
)

import hebatron_kernels as hk

pytestmark = pytest.mark.gpu

FORMS = ["plain", "residual", "gated"]
SHAPES = [
    (1, 8, None),  # one pack
    (5, 7, None),  # no whole pack: single elements
    (113, 2688, None),  # the model's width
    (33, 4096, 512),  # the gated norm's groups
    (1023, 520, None),  # more rows than partial rows of the weight gradient; a thread with half its packs
    (3, 8192, None),  # the widest group
    (0, 64, None),
]


def arguments(form, rows, width, group, dtype=torch.float64, device="cpu"):
    x, other = torch.randn(2, rows, width, dtype=torch.float64).to(device, dtype)
    weight = (1 + 0.1 * torch.randn(width, dtype=torch.float64)).to(device, dtype)
    residual, gate = (other if form == name else None for name in ("residual", "gated"))
    return [x, weight, 1e-5, residual, gate, group]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width", "group"), SHAPES)
def test_norm_matches_oracle(place, form, dtype, rows, width, group):
    check_oracle(place, at(place, hk.rms_norm), arguments(form, rows, width, group), dtype, "native")


@pytest.mark.parametrize("padding", [3, 8])  # rows that start on no pack, and on one
@pytest.mark.parametrize("form", FORMS)
def test_norm_takes_strided_rows(place, form, padding):
    call = at(place, hk.rms_norm, padding)
    check_oracle(place, call, arguments(form, 19, 264, None), torch.bfloat16, "native")


def test_norm_takes_a_weight_of_another_dtype(place):
    def with_fp32_weight(x, weight, *rest, backend):
        return hk.rms_norm(
            x, weight.float() if weight.dtype == torch.bfloat16 else weight, *rest, backend=backend
        )

    call = at(place, with_fp32_weight)
    check_oracle(place, call, arguments("residual", 41, 2688, None), torch.bfloat16, "native")


def both_ways(args):
    leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    out = hk.rms_norm(*leaves, backend="native")
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    wanted = [a for a in leaves if isinstance(a, torch.Tensor)]
    return [*outputs, *torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])]


@pytest.mark.parametrize("form", FORMS)
def test_norm_gives_the_same_bits_every_time(gpu, form):
    args = arguments(form, 3000, 2688, None, torch.bfloat16, gpu.device)
    want = both_ways(args)
    for _ in range(5):
        assert_same_bits(both_ways(args), want)


def test_norm_runs_on_the_current_stream(gpu, proves):
    proves("streams")
    args = arguments("residual", 300, 2688, None, torch.bfloat16, gpu.device)
    check_stream(lambda: hk.rms_norm(*args, backend="native"), args[0])
    check_stream(lambda: both_ways(args), args[0])


def test_norm_replays_from_a_graph(gpu, proves):
    proves("graphs")
    args = arguments("gated", 300, 4096, 512, torch.bfloat16, gpu.device)
    check_graph(lambda: hk.rms_norm(*args, backend="native"), args[0])
    check_graph(lambda: both_ways(args), args[0])


def test_norm_never_waits_for_the_gpu(gpu, proves):
    proves("streams")
    args = arguments("residual", 300, 2688, None, torch.bfloat16, gpu.device)
    check_never_waits(lambda: hk.rms_norm(*args, backend="native"))


def test_norm_refuses_pointers_it_cannot_follow(gpu, monkeypatch, proves):
    proves("errors")
    args = arguments("residual", 8, 64, None, torch.bfloat16, gpu.device)
    pointers = ["x", "residual", "weight", "y", "sum"]
    check_pointer_errors(monkeypatch, "rms_norm_fwd", pointers, lambda: hk.rms_norm(*args, backend="native"))


def test_norm_beyond_two_to_the_31_elements(gpu):
    rows, width = 800_000, 2688  # 2.15e9 elements
    need_memory(4.4 * 4)
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    weight = 1 + 0.1 * torch.randn(width, device="cuda")
    got = hk.rms_norm(x, weight, backend="native")
    for begin in (0, rows // 2, rows - 200):
        part = slice(begin, begin + 200)
        assert_same_bits(got[part].clone(), hk.rms_norm(x[part].clone(), weight, backend="native"))

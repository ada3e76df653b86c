"""ssd_scan's Triton form on a GPU: values with gradients, streams, graphs, no waiting, more than 2^31 elements."""

import pytest
import torch
from gpu_cases import (
    assert_same_bits,
    at,
    check_graph,
    check_never_waits,
    check_oracle,
    check_stream,
    need_memory,
)
from ssd_cases import ROWS
from test_gpu_ssd import BF16, DTYPES, FP32, SCANS, card, scan_args

import hebatron_kernels as hk

pytestmark = pytest.mark.gpu

# a head dim over 64 and a state over 128, for smaller blocks; sizes that are multiples of nothing
MORE = {
    "large": (200, 4, 128, 2, 256, [0, 70, 200]),
    "odd": (90, 3, 37, 1, 19, [0, 1, 1, 90]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SCANS, *MORE])
def test_scan_triton_matches_oracle(on_triton, name, dtype):
    sizes = (SCANS | MORE)[name]
    check_oracle(on_triton, at(on_triton, hk.ssd_scan), scan_args(*sizes), dtype, "native", sizes[0] > 0)


def test_scan_triton_matches_oracle_without_options(on_triton):
    args = scan_args(*SCANS["smallest"], False)
    check_oracle(on_triton, at(on_triton, hk.ssd_scan), args, BF16, "native")


def test_scan_triton_keeps_small_decays_after_a_large_step(on_triton):
    args = card(scan_args(64, 2, 64, 1, 128, None), FP32)
    args[1][[5, 6, 40]] = 1e4
    args[2][0], args[2][1] = -1e4, -0.01
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    want = hk.ssd_scan(*exact, backend="reference")[0]
    got = hk.ssd_scan(*args, backend="triton")[0]
    rows = [t for t in range(64) if t not in (5, 6, 40)]  # the large steps' own rows would hide the others
    scale = want[rows].abs().amax((0, 2), keepdim=True)
    assert ((got[rows].double() - want[rows]).abs() <= 4e-6 * scale).all()


def calls(name="documents", dtype=BF16):
    """x, and the scan by itself and with its gradients."""
    args = card(scan_args(*SCANS[name]), dtype)

    def back():
        leaves = [
            a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in args
        ]
        wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
        y, last = hk.ssd_scan(*leaves, backend="triton")
        return torch.autograd.grad((y, last), wanted, (torch.ones_like(y), torch.ones_like(last)))

    return args[0], [lambda: hk.ssd_scan(*args, backend="triton"), back]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_triton_gives_the_same_bits_every_time(on_triton, dtype):
    for call in calls("model", dtype)[1]:
        want = call()
        for _ in range(5):
            assert_same_bits(call(), want)


def test_scan_triton_runs_on_the_current_stream_and_never_waits(on_triton, proves):
    proves("streams")
    x, both = calls()
    for call in both:
        check_stream(call, x)
        check_never_waits(call)


def test_scan_triton_replays_from_a_graph(on_triton, proves):
    proves("graphs")
    for name in ("model", "documents"):  # without cu_seqlens, and with
        x, both = calls(name)
        for call in both:
            check_graph(call, x)


def test_scan_triton_beyond_two_to_the_31_elements(on_triton):
    tokens = 600_000  # x: 2.46e9 elements, the chunks' states 4.9e9
    need_memory(4.9 * 2 + 20 + 10 + 6)
    x = torch.empty(tokens, 64, 64, dtype=BF16, device="cuda").normal_()
    dt, A = torch.randn(tokens, 64, device="cuda"), -torch.linspace(1, 8, 64, device="cuda")
    B, C = torch.randn(2, tokens, 8, 128, device="cuda", dtype=BF16)
    y, _ = hk.ssd_scan(x, dt, A, B, C, None, None, backend="triton")
    begin = (
        tokens - 1024 - tokens % 64
    )  # a chunk's start; the 4,096 tokens before it say all of the state that is left
    first = begin - 4096
    args = [(x, dt, A, B, C)[i][first:] if i in ROWS else A for i in range(5)]
    part = hk.ssd_scan(*args, None, None, backend="triton")[0]
    torch.testing.assert_close(y[begin:].float(), part[begin - first :].float(), rtol=2e-2, atol=1e-2)

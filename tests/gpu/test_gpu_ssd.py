"""The state-space scan's CUDA kernels on a GPU."""

import math

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
from ssd_cases import ROWS, make

import hebatron_kernels as hk

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [BF16, FP32]

# tokens, heads, head dim, groups, state, ends: the smallest, the model's shape over segments, documents cut anywhere, a
# group a head and slices of a head, nothing
SCANS = {
    "smallest": (3, 1, 8, 1, 8, None),
    "model": (1100, 16, 64, 2, 128, None),
    "documents": (700, 8, 64, 2, 128, [0, 0, 1, 66, 130, 130, 700]),
    "slices": (150, 3, 136, 3, 40, [0, 23, 150]),
    "none": (0, 2, 8, 1, 8, [0, 0, 0]),
}


def scan_args(tokens, heads, head_dim, groups, state, ends, options=True):
    return [*make(tokens, heads, head_dim, groups, state, ends, *[options] * 3), 128]


def card(args, dtype):
    """On the GPU; x, B and C in this dtype, the rest in fp32."""
    moved = []
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            a = a.to(dtype if i in ROWS else FP32)
        moved.append(a.cuda() if isinstance(a, torch.Tensor) else a)
    return moved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCANS)
def test_scan_matches_oracle(place, name, dtype):
    check_oracle(place, at(place, hk.ssd_scan), scan_args(*SCANS[name]), dtype, "native", False)


def test_scan_matches_oracle_without_options(place):
    check_oracle(place, at(place, hk.ssd_scan), scan_args(*SCANS["smallest"], False), BF16, "native", False)


def test_scan_forward_keeps_small_decays_after_a_large_step(gpu):
    args = card(scan_args(64, 2, 64, 1, 128, None), FP32)
    args[1][[5, 6, 40]] = 1e4
    args[2][0], args[2][1] = -1e4, -0.01
    want = hk.ssd_scan(
        *[a.double() if isinstance(a, torch.Tensor) else a for a in args], backend="reference"
    )[0]
    got = hk.ssd_scan(*args, backend="native")[0]
    rows = [t for t in range(64) if t not in (5, 6, 40)]
    scale = want[rows].abs().amax((0, 2), keepdim=True)
    assert ((got[rows].double() - want[rows]).abs() <= 4e-6 * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_pieces_of_whole_segments_are_the_whole(gpu, dtype):
    args = card(scan_args(5000, 8, 64, 2, 128, None), dtype)
    whole = hk.ssd_scan(*args, backend="native")
    state, parts, begin = args[9], [], 0
    for end in (1024, 3072, 5000):
        piece = [a[begin:end] if i in ROWS else a for i, a in enumerate(args)]
        piece[9] = state
        y, state = hk.ssd_scan(*piece, backend="native")
        parts.append(y)
        begin = end
    assert_same_bits((torch.cat(parts), state), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_gives_the_same_bits_every_time(gpu, dtype):
    args = card(scan_args(4096, 64, 64, 8, 128, [0, 100, 101, 4096]), dtype)
    want = hk.ssd_scan(*args, backend="native")
    for _ in range(5):
        assert_same_bits(hk.ssd_scan(*args, backend="native"), want)


def test_scan_runs_on_the_current_stream(gpu, proves):
    proves("streams")
    args = card(scan_args(*SCANS["documents"]), BF16)
    check_stream(lambda: hk.ssd_scan(*args, backend="native"), args[0])


def test_scan_replays_from_a_graph(gpu, proves):
    proves("graphs")
    for name in ("model", "documents"):  # without cu_seqlens, and with
        args = card(scan_args(*SCANS[name]), BF16)
        check_graph(lambda args=args: hk.ssd_scan(*args, backend="native"), args[0])


def test_scan_never_waits_for_the_gpu(gpu, proves):
    proves("streams")
    args = card(scan_args(*SCANS["documents"]), BF16)
    check_never_waits(lambda: hk.ssd_scan(*args, backend="native"))


def test_scan_forward_refuses_pointers_it_cannot_follow(gpu, monkeypatch, proves):
    proves("errors")
    args = card(scan_args(*SCANS["documents"]), BF16)
    pointers = ["x", "dt", "A", "B", "C", "D", "dt_bias", "cu_seqlens", "initial", "y", "last"]
    check_pointer_errors(monkeypatch, "ssd_scan_fwd", pointers, lambda: hk.ssd_scan(*args, backend="native"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCANS)
def test_scan_gradients_match_oracle(place, name, dtype):
    check_oracle(place, at(place, hk.ssd_scan), scan_args(*SCANS[name]), dtype, "native")


def scan_step(dtype=BF16, name="documents"):
    """A call that runs the scan and its gradients."""
    args = [
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in card(scan_args(*SCANS[name]), dtype)
    ]
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def step():
        y, last = hk.ssd_scan(*args, backend="native")
        return torch.autograd.grad((y, last), wanted, (torch.ones_like(y), torch.ones_like(last)))

    return step, args[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_gradients_are_the_same_bits_every_time(gpu, dtype):
    step, _ = scan_step(dtype, "model")
    want = step()
    for _ in range(5):
        assert_same_bits(step(), want)


def test_scan_gradients_run_on_the_current_stream_and_never_wait(gpu, proves):
    proves("streams")
    step, x = scan_step()
    check_stream(step, x.detach())
    check_never_waits(step)


def test_scan_gradients_replay_from_a_graph(gpu, proves):
    proves("graphs")
    step, x = scan_step()
    check_graph(step, x.detach())


def test_scan_gradients_refuse_pointers_they_cannot_follow(gpu, monkeypatch, proves):
    proves("errors")
    pointers = [
        "x",
        "dt",
        "A",
        "B",
        "C",
        "grad_y",
        "grad_last",
        "grad_x",
        "grad_dt",
        "grad_B",
        "grad_C",
        "grad_A",
    ]
    check_pointer_errors(monkeypatch, "ssd_scan_bwd", pointers, scan_step()[0])


def test_scan_forward_beyond_two_to_the_31_elements(gpu):
    tokens = 600_000  # x: 2.46e9 elements
    need_memory(4.9 * 3 + 6)
    x = torch.empty(tokens, 64, 64, dtype=BF16, device="cuda").normal_()
    dt, A = torch.randn(tokens, 64, device="cuda"), -torch.linspace(1, 8, 64, device="cuda")
    B, C = torch.randn(2, tokens, 8, 128, device="cuda", dtype=BF16)
    y, _ = hk.ssd_scan(x, dt, A, B, C, None, None, backend="native")
    begin = (
        tokens - tokens % 1024 - 1024
    )  # a segment's start; eight segments before it say all of the state that is left
    first = begin - 8 * 1024
    part = hk.ssd_scan(x[first:], dt[first:], A, B[first:], C[first:], None, None, backend="native")[0]
    torch.testing.assert_close(y[begin:].float(), part[begin - first :].float(), rtol=2e-2, atol=1e-2)


# ---- ssd_update ----


def token_args(sequences, heads, head_dim, groups, state, dtype):
    args = card(make(sequences, heads, head_dim, groups, state)[:7], dtype)
    return [torch.randn(sequences, heads, head_dim, state).to(args[0].device), *args, (0.0, math.inf)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3, 64, 64, 8, 128), (2, 3, 5, 3, 37), (70_000, 1, 3, 1, 4)])
def test_update_matches_oracle(gpu, dtype, size):
    args = token_args(*size, dtype)
    state = args[0].clone()
    y = hk.ssd_update(state, *args[1:], backend="native")
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    want = hk.ssd_update(*exact, backend="torch")
    scale = want.abs().max().item()
    torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-6 * scale)
    torch.testing.assert_close(state.double(), exact[0], rtol=2e-6, atol=4e-6)


def test_update_streams_graphs_and_pointers(gpu, monkeypatch, proves):
    proves("streams")
    args = token_args(4, 64, 64, 8, 128, BF16)

    def call():
        return hk.ssd_update(args[0].clone(), *args[1:], backend="native")

    check_stream(call, args[1])
    check_never_waits(call)
    pointers = ["state", "x", "dt", "A", "B", "C", "D", "dt_bias", "y"]
    check_pointer_errors(monkeypatch, "ssd_update", pointers, lambda: hk.ssd_update(*args, backend="native"))


def test_update_replays_from_a_graph(gpu, proves):
    proves("graphs")
    args = token_args(4, 64, 64, 8, 128, BF16)
    check_graph(lambda: hk.ssd_update(args[0].clone(), *args[1:], backend="native"), args[1])

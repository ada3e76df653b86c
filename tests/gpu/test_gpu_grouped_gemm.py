"""grouped_gemm's CUDA kernels on a GPU, every tile of every implementation by name."""

import pytest
import torch
from common import GROUPED_GEMM, grouped_gemm_forms
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
from hebatron_kernels import _native

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
TILES = [f"{name}:{tile}" for name, (_, tiles) in GROUPED_GEMM.items() for tile in tiles]
FIRST = [f"{name}:{tiles[0]}" for name, (_, tiles) in GROUPED_GEMM.items()]

# rows of each expert, rows past the last end, width, outputs
PROBLEMS = {
    "ragged": ([0, 1, 113, 0, 128, 257, 3], 5, 136, 264),
    "one takes all": ([0, 0, 520, 0], 0, 72, 40),
    "no rows for any": ([0, 0, 0], 17, 64, 64),
    "smallest": ([1], 0, 8, 8),
    "up": ([70, 0, 200, 129], 0, 2688, 1856),
    "down": ([0, 131, 1, 260], 3, 1856, 2688),
    "one token": ([1 if e % 21 == 5 else 0 for e in range(128)], 0, 256, 512),
}


@pytest.fixture
def run_form(place):
    """Skips a form that this build or GPU does not have."""

    def skip_or_name(form):
        if place.backend == "emulator":
            if form.startswith("cutlass"):
                pytest.skip("the emulator does not hold CUTLASS")
            return form
        major, minor = torch.cuda.get_device_capability()
        if form not in grouped_gemm_forms(_native.cuda_module.kernels(), 10 * major + minor):
            pytest.skip(f"{form} is not compiled, or not for sm_{major}{minor}")
        return form

    return skip_or_name


def gathers(form):
    return not form.startswith("cutlass")


def arguments(counts, tail, width, outputs, whole=True, gather=True, device="cpu", dtype=torch.float64):
    """`whole`: with the activation, a scale and, where the form gathers, rows taken from a smaller a."""
    rows, experts = sum(counts) + tail, len(counts)
    source = max(rows // 3, 1) if whole and gather else rows
    with torch.device(device):
        a = torch.randn(source, width, dtype=torch.float64)
        b = torch.randn(experts, outputs, width, dtype=torch.float64) * width**-0.5
        offsets = torch.tensor(counts).cumsum(0).int()
        taken = torch.randint(source, (rows,), dtype=torch.int32) if whole and gather else None
        scale = (torch.rand(rows, dtype=torch.float64) + 0.5).float() if whole else None
    return [a.to(dtype), b.to(dtype).transpose(1, 2), offsets, taken, scale, "relu2" if whole else None]


@pytest.mark.parametrize("whole", [False, True], ids=["product", "whole"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("form", TILES)
def test_grouped_gemm_matches_oracle(place, run_form, form, problem, whole):
    call = at(place, hk.grouped_gemm, implementation=run_form(form))
    args = arguments(*PROBLEMS[problem], whole, gathers(form), place.device)
    check_oracle(place, call, args, BF16, "native", grad=False)


@pytest.mark.parametrize("form", [t for t in TILES if t.startswith("sm80")])
def test_grouped_gemm_takes_weights_stored_by_width(place, run_form, form):
    args = arguments(*PROBLEMS["ragged"])
    args[1] = args[1].contiguous()
    call = at(place, hk.grouped_gemm, implementation=run_form(form))
    check_oracle(place, call, args, BF16, "native", grad=False)


@pytest.mark.parametrize("form", TILES)
def test_grouped_gemm_takes_strided_rows(place, run_form, form):
    args = arguments(*PROBLEMS["ragged"], True, gathers(form))
    call = at(place, hk.grouped_gemm, 8, implementation=run_form(form))
    check_oracle(place, call, args, BF16, "native", grad=False)


@pytest.mark.parametrize("form", TILES)
def test_grouped_gemm_reads_nothing_that_is_not_its_own(place, run_form, form):
    """NaN in the experts without rows, in the rows that nobody takes, past the last end and in the scale there."""
    form = run_form(form)
    counts, tail, width, outputs = PROBLEMS["ragged"]
    args = arguments(counts, tail, width, outputs, True, gathers(form), place.device, BF16)
    want = hk.grouped_gemm(*args, implementation=form, backend=place.backend)
    a, b, offsets, taken, scale, activation = args
    empty = torch.tensor(counts, device=a.device) == 0
    b = torch.where(empty[:, None, None], torch.nan, b.transpose(1, 2)).transpose(1, 2)
    end = int(offsets[-1])
    scale[end:] = torch.nan
    if taken is None:
        a[end:] = torch.nan
    else:
        a = torch.cat([a, torch.full_like(a[:7], torch.nan)])
        taken[end:] = a.shape[0] - 1
    got = hk.grouped_gemm(a, b, offsets, taken, scale, activation, implementation=form, backend=place.backend)
    assert_same_bits(got, want)
    assert not got[end:].any()


def test_grouped_gemm_automatic_choice_has_gradients(place):
    if place.backend == "native" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs sm_80")
    args = arguments(*PROBLEMS["ragged"])
    check_oracle(place, at(place, hk.grouped_gemm), args, BF16, "native")


def on_gpu(form, rows_of_each=150):
    args = arguments([rows_of_each, 0, 3, 200], 0, 256, 512, True, gathers(form), "cuda", BF16)
    return args, lambda: hk.grouped_gemm(*args, implementation=form, backend="native")


@pytest.mark.parametrize("form", TILES)
def test_grouped_gemm_gives_the_same_bits_every_time(gpu, run_form, form):
    _, call = on_gpu(run_form(form), 3000)
    want = call()
    for _ in range(5):
        assert_same_bits(call(), want)


@pytest.mark.parametrize("form", TILES)
def test_grouped_gemm_runs_on_the_current_stream(gpu, run_form, form, proves):
    proves("streams")
    args, call = on_gpu(run_form(form))
    check_stream(call, args[0])


@pytest.mark.parametrize("form", TILES)
def test_grouped_gemm_replays_from_a_graph(gpu, run_form, form, proves):
    proves("graphs")
    args, call = on_gpu(run_form(form))
    check_graph(call, args[0])


@pytest.mark.parametrize("form", FIRST)
def test_grouped_gemm_replays_with_another_routing(gpu, run_form, form, proves):
    """The sizes of the experts live on the device: a graph must follow them."""
    proves("graphs")
    args, call = on_gpu(run_form(form))
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    args[2].copy_(torch.tensor([0, 340, 341, 353]))
    graph.replay()
    got = captured.clone()
    assert_same_bits(got, call())


@pytest.mark.parametrize("form", FIRST)
def test_grouped_gemm_never_waits_for_the_gpu(gpu, run_form, form, proves):
    proves("streams")
    check_never_waits(on_gpu(run_form(form))[1])


@pytest.mark.parametrize("form", FIRST)
def test_grouped_gemm_refuses_pointers_it_cannot_follow(gpu, run_form, form, monkeypatch, proves):
    proves("errors")
    _, call = on_gpu(run_form(form))
    pointers = ["a", "b", "offsets", "scale", "out", *(["rows_of_a"] if gathers(form) else [])]
    check_pointer_errors(monkeypatch, "grouped_gemm_fwd", pointers, call)


def rows_again(a, b, offsets, taken, form, part):
    """Rows `part` of the product, computed from copies of what they need."""
    rows = a[part] if taken is None else a[taken[part].long()]
    ends = (offsets.clamp(part.start, part.stop) - part.start).int()
    return hk.grouped_gemm(rows.clone(), b, ends, implementation=form, backend="native")


# rows, rows of a, width, outputs, experts: one tensor of more than 2^31 elements each
LARGE = {
    "out": (1_180_000, 4096, 64, 1856, 4),
    "a": (4096, 820_000, 2688, 64, 4),
    "b": (4000, 4000, 2688, 1856, 440),
}


@pytest.mark.parametrize("large", LARGE)
@pytest.mark.parametrize("form", [t for t in FIRST if gathers(t)])
def test_grouped_gemm_beyond_two_to_the_31_elements(gpu, run_form, form, large):
    form = run_form(form)
    rows, source, width, outputs, experts = LARGE[large]
    need_memory(14)
    a = torch.empty(source, width, dtype=BF16, device="cuda").normal_()
    b = torch.empty(experts, outputs, width, dtype=BF16, device="cuda").normal_().transpose(1, 2)
    offsets = torch.linspace(rows / experts, rows, experts, device="cuda").round().int()
    taken = torch.randint(source, (rows,), dtype=torch.int32, device="cuda")
    taken[-1] = source - 1
    got = hk.grouped_gemm(a, b, offsets, taken, implementation=form, backend="native")
    for begin in (0, rows // 2, rows - 300):
        part = slice(begin, begin + 300)
        assert_same_bits(got[part].clone(), rows_again(a, b, offsets, taken, form, part))

"""The kernels of grouped_gemm's gradients on a GPU, every tile by name: the product with b's outputs contiguous and the
way back through relu2, and the gradient of the weights."""

from functools import partial

import pytest
import torch
from common import GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD, grouped_gemm_forms
from gemm_cases import call_gemm, relu2_args, through_relu2, weight_grad, wgrad_args
from gpu_cases import assert_same_bits, at, check_graph, check_never_waits, check_oracle, check_stream

from hebatron_kernels import _native, testing

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
DGRAD = [f"{name}:{tile}" for name, (_, tiles) in GROUPED_GEMM_DGRAD.items() for tile in tiles]
WGRAD = [f"{name}:{tile}" for name, (_, tiles) in GROUPED_GEMM_WGRAD.items() for tile in tiles]
# the case of gemm_cases, inner width, outputs; the model's own in the gradients of down
PROBLEMS = {
    "smallest": ("one row", 8, 8),
    "ragged": ("edges", 136, 264),
    "one takes all": ("one for all", 72, 40),
    "no rows for any": ("all past the end", 64, 64),
    "model": ("edges", 2688, 1856),
}


@pytest.fixture
def run_form(place):
    """Skips a form that this build or GPU does not have."""

    def skip_or_name(form, table):
        if place.backend == "emulator":
            return form
        major, minor = torch.cuda.get_device_capability()
        if form not in grouped_gemm_forms(_native.cuda_module.kernels(), 10 * major + minor, table):
            pytest.skip(f"{form} is not compiled, or not for sm_{major}{minor}")
        return form

    return skip_or_name


def rows_of(form):
    return int(form.partition(":")[2].partition("x")[0])


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("form", DGRAD)
def test_grouped_gemm_way_back_matches_oracle(place, run_form, form, problem):
    case, inner, outputs = PROBLEMS[problem]
    call = at(place, through_relu2, implementation=run_form(form, GROUPED_GEMM_DGRAD))
    with torch.device(place.device):
        args = relu2_args(case, rows_of(form), inner, outputs, problem != "one takes all")
    # sums of rows whose terms cancel
    check_oracle(place, call, args, BF16, "native", grad=False, floor=1.0)


@pytest.mark.parametrize("fp32", [False, True], ids=["bf16", "fp32"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("form", WGRAD)
def test_grouped_gemm_wgrad_matches_oracle(place, run_form, form, problem, transposed, fp32):
    case, width, outputs = PROBLEMS[problem]
    form = run_form(form, GROUPED_GEMM_WGRAD)
    moved = at(place, weight_grad, implementation=form)

    def call(*args, backend):
        return moved(*args, transposed, torch.float32 if fp32 else BF16, backend=backend)

    with torch.device(place.device):
        args = wgrad_args(case, 100, width, outputs, problem != "one takes all")
    check_oracle(place, call, args, BF16, "native", grad=False)


def on_gpu(form, kind):
    """Tensors on the card, and the call on them."""
    if kind == "way_back":
        args = [t.cuda() for t in testing._cast(relu2_args("edges", 300, 256, 512), BF16)]
        return args, partial(call_gemm, *args, implementation=form)
    args = [t.cuda() for t in testing._cast(wgrad_args("edges", 300, 256, 512), BF16)]
    return args, partial(weight_grad, *args, True, torch.float32, backend="native", implementation=form)


KINDS = [*((form, "way_back") for form in DGRAD), *((form, "wgrad") for form in WGRAD)]
TABLES = {"way_back": GROUPED_GEMM_DGRAD, "wgrad": GROUPED_GEMM_WGRAD}


@pytest.mark.parametrize(("form", "kind"), KINDS)
def test_grouped_gemm_gradient_gives_the_same_bits_every_time(gpu, run_form, form, kind):
    _, call = on_gpu(run_form(form, TABLES[kind]), kind)
    want = call()
    for _ in range(5):
        assert_same_bits(call(), want)


@pytest.mark.parametrize(("form", "kind"), KINDS)
def test_grouped_gemm_gradient_runs_on_the_current_stream(gpu, run_form, form, kind, proves):
    proves("streams")
    args, call = on_gpu(run_form(form, TABLES[kind]), kind)
    check_stream(call, args[0])


@pytest.mark.parametrize(("form", "kind"), KINDS)
def test_grouped_gemm_gradient_replays_from_a_graph(gpu, run_form, form, kind, proves):
    proves("graphs")
    args, call = on_gpu(run_form(form, TABLES[kind]), kind)
    check_graph(call, args[0])


@pytest.mark.parametrize(("form", "kind"), KINDS)
def test_grouped_gemm_gradient_never_waits_for_the_gpu(gpu, run_form, form, kind, proves):
    proves("streams")
    check_never_waits(on_gpu(run_form(form, TABLES[kind]), kind)[1])

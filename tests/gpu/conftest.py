"""Tests that need a GPU: `pytest -m gpu tests/gpu`, or bench/gpu_check.sh, which runs them kernel by kernel.

--gpu-record FILE        a line of JSON at the start and at the end of every test, so that a hang has a name
--gpu-stand-in emulator  the values tests on CPU tensors and the emulator: checks the tests, not the hardware
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from hebatron_kernels import _native, _triton, testing

BENCH = Path(__file__).resolve().parents[2] / "bench"
KERNELS, MODEL = (
    Path(__file__).resolve().parents[1] / name for name in ("kernels", "model")
)  # gemm_cases, model_cases
sys.path[:0] = [str(BENCH), str(BENCH / "conformance"), str(KERNELS), str(MODEL)]
from gpu_cases import Place  # noqa: E402  (bench first: it is on no path of its own)

record = None


def pytest_addoption(parser):
    parser.addoption("--gpu-record", type=Path, default=None)
    parser.addoption("--gpu-stand-in", choices=["emulator"], default=None)


def pytest_configure(config):
    global record
    record = config.getoption("--gpu-record", default=None)


def note(**fields):
    if record is not None:
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")


def pytest_runtest_logstart(nodeid):
    note(test=nodeid, event="start")


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        properties = dict(report.user_properties)
        detail = str(report.longrepr).strip().splitlines()[-1][:400] if report.longrepr else ""
        note(
            test=report.nodeid,
            event=report.outcome,
            check=properties.get("check", "values"),
            seconds=round(report.duration, 2),
            detail=detail,
        )


@pytest.fixture
def place(request):
    """Where the kernels run: the GPU, or the emulator as its stand-in."""
    if request.config.getoption("--gpu-stand-in", default=None) == "emulator":
        if _native.emulator_module is None:
            testing.load_emulator()
        return Place("cpu", "emulator")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if _native.cuda_module is None:
        pytest.skip(f"_cuda is not built: {_native.cuda_missing}")
    return Place("cuda", "native")


@pytest.fixture
def gpu(place):
    """The same where only a GPU will do: streams, graphs, memory of the card."""
    if place.device != "cuda":
        pytest.skip("the emulator has no streams, graphs or card memory")
    return place


@pytest.fixture
def on_triton(gpu):
    """The GPU, with the Triton form under test; bench/gpu_check.sh takes it as a failure when all tests are skipped."""
    reason = _triton.refusal(torch.empty(1, device="cuda"))
    if reason is not None:
        pytest.skip(reason)
    return Place("cuda", "triton")


@pytest.fixture
def proves(record_property):
    """proves("streams"): the test stands for this check of the evidence table, and not for "values"."""
    return lambda check: record_property("check", check)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is filled with NaN; warn_only, because cuBLAS is not deterministic without a setting of its own."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)

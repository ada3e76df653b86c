"""Tests that need a GPU: `pytest -m gpu tests/gpu`, or bench/gpu_check.sh, which runs them kernel by kernel.

--gpu-record FILE        a line of JSON at the start and at the end of every test, so that a hang has a name; a test
                         that the file already names is not run again
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
from gpu_watch import lines_of  # noqa: E402

KEPT_BYTES = 4e9  # of torch's allocator, from one test to the next

record, begun = None, set()


def pytest_addoption(parser):
    parser.addoption("--gpu-record", type=Path, default=None)
    parser.addoption("--gpu-stand-in", choices=["emulator"], default=None)


def pytest_configure(config):
    global record
    record = config.getoption("--gpu-record", default=None)
    if record is not None:
        begun.update(line["test"] for line in lines_of(record) if line.get("event") == "start")


@pytest.hookimpl(trylast=True)  # behind -m and -k
def pytest_collection_modifyitems(items):
    note(found=len(items))
    items[:] = [item for item in items if item.nodeid not in begun]


def note(**fields):
    if record is not None:
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")


def pytest_runtest_logstart(nodeid):
    note(test=nodeid, event="start")


def detail(report):
    """The error's own words: of a crash "RuntimeError: CUDA error: ...", of a skip its reason."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr or "")).strip().splitlines()
    return (lines[0] if crash and lines else " ".join(lines[-1:]))[:400]


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        check = dict(report.user_properties).get("check", "values")
        seconds = round(report.duration, 2)
        note(test=report.nodeid, event=report.outcome, check=check, seconds=seconds, detail=detail(report))


@pytest.hookimpl(trylast=True)  # behind the fixtures
def pytest_runtest_teardown(item):
    """After a fault the CUDA context answers nothing more: the tests left are for another process."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()  # a fault belongs to the test that made it
        except RuntimeError as error:
            item.session.shouldstop = str(error).splitlines()[0]
            raise
        if torch.cuda.memory_reserved() > KEPT_BYTES:  # the tests of other kernels run beside these
            torch.cuda.empty_cache()


def pytest_sessionfinish(exitstatus):
    if exitstatus in (0, 1) or (exitstatus == 5 and begun):
        note(done=True)


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

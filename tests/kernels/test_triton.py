"""The Triton backend: its tests in Triton's interpreter (interpreted_triton.py), and what of it needs no Triton."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import hebatron_kernels as hk
from hebatron_kernels import _evidence, _native, _triton

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = {"moe": "interpreted_triton.py", "ssd": "interpreted_triton_ssd.py"}


def lacks():
    """Why Triton's interpreter cannot run here, or None."""
    if not _triton.version:
        return "Triton is not installed: pip install triton==3.9.0"
    triton, arrays = (tuple(map(int, v.split(".")[:2])) for v in (_triton.version, numpy.__version__))
    if triton < (3, 8) and arrays >= (2, 4):  # seen with 3.6 and numpy 2.4.6; 3.8 and 3.9 are right
        return f"the interpreter of Triton {_triton.version} cannot loop with numpy {numpy.__version__}"
    return None


def python(*words, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("noun", ["moe", "ssd"])
def test_triton_interpreted(noun):
    reason = lacks()
    if reason is not None:
        pytest.skip(reason)
    words = ["-m", "pytest", "-p", "no:cacheprovider", str(HERE / FILES[noun])]
    status, output = python(*words, TRITON_INTERPRET="1")
    assert status == 0, output[-8000:]
    assert " passed" in output and "skipped" not in output, output


@pytest.mark.slow
@pytest.mark.parametrize("noun", FILES)
def test_triton_cases_of_the_sanitizer_pass_in_the_interpreter(noun):
    """What compute-sanitizer runs on a GPU, which compares values there too."""
    reason = lacks()
    if reason is not None:
        pytest.skip(reason)
    words = ["bench/gpu_sanitize.py", "--kernel", f"{noun}/triton", "--stand-in", "interpreter"]
    status, output = python(*words, TRITON_INTERPRET="1")
    assert status == 0 and f"{noun}/triton: passed" in output, output[-8000:]


def test_triton_kernels_are_imported_at_the_first_call_alone():
    """Whether Triton is loaded by then says nothing of us: torch's compiler imports it where it is installed."""
    found = "any(name.endswith('triton_kernels') for name in sys.modules)"
    status, output = python("-c", f"import sys, hebatron_kernels; sys.exit({found})")
    assert status == 0, output


def args(dtype=torch.bfloat16):
    a, b = torch.ones(5, 8, dtype=dtype), torch.ones(2, 8, 8, dtype=dtype)
    return a, b, torch.tensor([2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("", r"Triton is not installed \(torch's CUDA builds bring it"),
        ("3.9.0", r"needs a GPU \(or TRITON_INTER"),
    ],
)
def test_grouped_gemm_triton_says_why_it_refuses(monkeypatch, version, reason):
    monkeypatch.setattr(_triton, "version", version)
    monkeypatch.setattr(_triton, "interpreting", False)
    with pytest.raises(hk.BackendError, match=rf"grouped_gemm\[triton\]: {reason}"):
        hk.grouped_gemm(*args(), backend="triton")
    assert reason.split(r"\(")[0] in hk.explain(hk.grouped_gemm, *args())


class OnGpu:
    """What refusal and unproven ask of a tensor, answered as by one on a GPU."""

    dtype, is_cuda, device = torch.bfloat16, True, torch.device("cuda", 0)

    def get_device(self):
        return 0


def test_triton_kernels_need_sm_80_and_no_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "version", "3.9.0")
    for interpreting, capability, reason in [
        (False, (8, 0), None),
        (False, (10, 0), None),
        (False, (7, 5), "needs compute capability 8.0, got sm_75"),
        (True, (9, 0), "TRITON_INTERPRET=1 is set, under which kernels run on the CPU"),
    ]:
        monkeypatch.setattr(_triton, "interpreting", interpreting)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert _triton.refusal(OnGpu()) == reason


def test_triton_kernels_are_chosen_by_their_evidence_alone(monkeypatch):
    found = _triton.digest("moe")
    entry = dict(
        kernel="moe/triton", digest=found, toolkit="Triton 3.9", arch="sm_120", gpu="B", date="2026-12-01"
    )
    monkeypatch.setattr(_evidence, "entries", (entry,))
    monkeypatch.setattr(_triton, "version", "3.9.0")
    for arch, version, reason in [
        ("sm_120", "3.9.0", None),
        (
            "sm_90",
            "3.9.0",
            "never run on sm_90 with Triton 3.9, only on sm_120 with Triton 3.9, only by name",
        ),
        (
            "sm_120",
            "3.6.1",
            "never run on sm_120 with Triton 3.6, only on sm_120 with Triton 3.9, only by name",
        ),
    ]:
        monkeypatch.setattr(_triton, "version", version)
        monkeypatch.setattr(_native, "arch_of", lambda device, arch=arch: arch)
        assert hk.OPERATORS["grouped_gemm"].modules["triton"].unproven_grouped_gemm(OnGpu()) == reason
    monkeypatch.setattr(_evidence, "entries", ())
    assert _triton.unproven("moe", 0) == "never run on hardware, only by name"


def test_triton_digest_follows_code_and_not_comments(monkeypatch, tmp_path):
    def digest(ops, kernels="def add(x):\n    return x + 1\n"):
        _triton.digest.cache_clear()
        (tmp_path / "noun").mkdir(exist_ok=True)
        (tmp_path / "noun/triton_ops.py").write_text(ops)
        (tmp_path / "noun/triton_kernels.py").write_text(kernels)
        return _triton.digest("noun")

    monkeypatch.setattr(_triton, "__file__", str(tmp_path / "_triton.py"))
    try:
        first = digest('"""What."""\nSIZE = 1\n')
        assert digest('"""What else."""\n\nSIZE = (1)  # one\n') == first
        assert digest("SIZE = 2\n") != first
        assert digest("SIZE = 1\n", "def add(x):\n    return x + 2\n") != first
    finally:
        _triton.digest.cache_clear()

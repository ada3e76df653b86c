"""The CUTLASS baseline's way into the build: its fetch script and HEBATRON_CUTLASS_DIR. No compiling, no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hebatron_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
FETCH = ROOT / "bench" / "fetch_cutlass.sh"


def fails(*command, **environment):
    """The one line a command says when it gives up."""
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    return done.stderr.strip()


def test_fetch_keeps_a_folder_that_is_there(tmp_path):
    (tmp_path / "VERSION").write_text("4.2.0.0\n")
    done = subprocess.run([FETCH, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == f"HEBATRON_CUTLASS_DIR={tmp_path}\n"


@pytest.mark.parametrize("version", [None, "4.1.0.0\n"])
def test_fetch_refuses_a_folder_of_something_else(tmp_path, version):
    if version:
        (tmp_path / "VERSION").write_text(version)
    line = fails(FETCH, tmp_path)
    assert line == f"fetch_cutlass: FOLDER must not exist or hold CUTLASS 4.2.0.0, got {tmp_path}"
    assert not (tmp_path / "include").exists()


def test_fetch_refuses_two_folders():
    assert fails(FETCH, "a", "b") == "fetch_cutlass: takes at most one folder, got 2 arguments"


def test_fetch_needs_pip(tmp_path):
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    line = fails(FETCH, tmp_path / "new", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert line == f"fetch_cutlass: python3 must have pip, got {python}"
    assert not (tmp_path / "new").exists()


def test_build_refuses_a_folder_without_headers(tmp_path):
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    line = fails(
        *[sys.executable, "setup.py", "build_ext"], HEBATRON_CUTLASS_DIR=str(tmp_path), HEBATRON_CUDA="off"
    ).splitlines()[-1]
    assert line == (
        f"hebatron: HEBATRON_CUTLASS_DIR must hold include/cutlass/cutlass.h, got {str(tmp_path)!r}"
    )


@pytest.mark.parametrize("built", [False, True])
def test_build_info_says_whether_it_is_built(monkeypatch, built):
    class Module:
        compiled_archs = staticmethod(lambda: "80-real")
        device_count = staticmethod(lambda: 0)
        kernels = staticmethod(lambda: {"norm": {}, **({"cutlass/grouped_gemm": {}} if built else {})})

    monkeypatch.setattr(_native, "cuda_module", Module)
    said = _native.build_info()["_cuda"]
    assert ("no CUTLASS (HEBATRON_CUTLASS_DIR)" in said) is not built
    assert ("with CUTLASS" in said) is built

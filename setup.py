"""Builds the native modules with CMake and places them in hebatron_kernels/. Never imports torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_wanted() -> bool:
    """HEBATRON_CUDA=auto|on|off; auto builds when both nvcc and a driver are there."""
    mode = os.environ.get("HEBATRON_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        sys.exit(f"hebatron: HEBATRON_CUDA must be auto, on or off, got {mode!r}")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if mode == "on" and nvcc is None:
        sys.exit(
            "hebatron: HEBATRON_CUDA=on needs nvcc on PATH; install the CUDA toolkit (>= 12.4) or unset it"
        )
    driver = any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg"))
    return mode == "on" or (mode == "auto" and nvcc is not None and driver)


class CMakeBuild(build_ext):
    def run(self) -> None:
        if not any(map(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]))):
            sys.exit("hebatron: no C++ compiler found; install g++ or clang++ (C++17), or set CXX")
        cuda = cuda_wanted()
        tag = f"{sys.implementation.cache_tag}-{'cuda' if cuda else 'cpu'}"
        build, out = (
            ROOT / "build" / tag,
            Path(self.get_ext_fullpath("hebatron_kernels._cpu")).resolve().parent,
        )
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DHEBATRON_CUDA={'ON' if cuda else 'OFF'}",
            f"-DHEBATRON_CUDA_ARCHS={os.environ.get('HEBATRON_CUDA_ARCHS', '')}",
        ]
        stamp = build / "options.txt"
        if build.exists() and (not stamp.exists() or stamp.read_text() != "\n".join(options)):
            shutil.rmtree(build)
        # pybind11 may live in a build environment that pip deletes: keep its headers, so that `ninja -C` works later.
        shutil.copytree(pybind11.get_include(), build / "include", dirs_exist_ok=True)
        ninja = f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", ninja, *options], check=True)
        stamp.write_text("\n".join(options))
        subprocess.run(["cmake", "--build", build], check=True)
        out.mkdir(parents=True, exist_ok=True)
        for module in build.glob("_*.so"):
            shutil.copy2(module, out / module.name)


modules = ["_cpu"]
setup(
    ext_modules=[Extension(f"hebatron_kernels.{m}", []) for m in modules], cmdclass={"build_ext": CMakeBuild}
)

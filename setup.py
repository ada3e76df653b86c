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
        sys.exit("hebatron: HEBATRON_CUDA=on needs nvcc on PATH; install CUDA (>= 12.4) or unset it")
    driver = any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg"))
    return mode == "on" or (mode == "auto" and nvcc is not None and driver)


def cutlass_dir() -> str:
    """HEBATRON_CUTLASS_DIR, made by bench/fetch_cutlass.sh; without it CUTLASS's baseline is not built."""
    folder = os.environ.get("HEBATRON_CUTLASS_DIR", "")
    if folder and not Path(folder, "include/cutlass/cutlass.h").is_file():
        sys.exit(f"hebatron: HEBATRON_CUTLASS_DIR must hold include/cutlass/cutlass.h, got {folder!r}")
    return folder and str(Path(folder).resolve())


def run(command: list, failure: str) -> None:
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"hebatron: {failure}; the reason stands above")


class CMakeBuild(build_ext):
    def run(self) -> None:
        chosen = os.environ.get("CXX")
        if not any(map(shutil.which, [chosen] if chosen else ["c++", "g++", "clang++"])):
            sys.exit(f"hebatron: no C++ compiler found ({chosen or 'c++, g++, clang++'}); get one or set CXX")
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(f"hebatron: {tool} is not on PATH; pip install {tool}, or use build isolation")
        cuda = cuda_wanted()
        tag = f"{sys.implementation.cache_tag}-{'cuda' if cuda else 'cpu'}"
        build = ROOT / "build" / tag
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DHEBATRON_CUDA={'ON' if cuda else 'OFF'}",
            f"-DHEBATRON_CUDA_ARCHS={os.environ.get('HEBATRON_CUDA_ARCHS', '')}",
            f"-DHEBATRON_CUTLASS_DIR={cutlass_dir()}",
            *([f"-DCMAKE_CXX_COMPILER={chosen}"] if chosen else []),
        ]
        wanted = "\n".join([str(ROOT), *options])
        stamp = build / "options.txt"
        if build.exists() and (not stamp.exists() or stamp.read_text() != wanted):
            shutil.rmtree(build)
        # pybind11 may live in a build environment that pip deletes: keep its headers, so that `ninja -C` works later.
        shutil.copytree(pybind11.get_include(), build / "include", dirs_exist_ok=True)
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
        ninja = f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"
        run([*configure, ninja, *options], "CMake could not configure the build")
        stamp.write_text(wanted)
        run(["cmake", "--build", build], "the build failed")
        cpu = Path(self.get_ext_fullpath("hebatron_kernels._cpu")).resolve()
        cpu.parent.mkdir(parents=True, exist_ok=True)
        for name in ("_cpu", "_cuda"):  # a module of an earlier build must not outlive it
            module = cpu.name.replace("_cpu", name, 1)
            cpu.with_name(module).unlink(missing_ok=True)
            if (build / module).exists():
                shutil.copy2(build / module, cpu.with_name(module))


setup(ext_modules=[Extension("hebatron_kernels._cpu", [])], cmdclass={"build_ext": CMakeBuild})

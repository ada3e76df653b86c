#!/usr/bin/env bash
# bench/gpu_check.sh: everything this library asks of a GPU, in one command, under 10 minutes, without a network.
# Build, primitives against the emulator, tests, compute-sanitizer, timing table, record. bench/gpu_check.py does the work:
#   bench/gpu_check.sh [--keep DIR] [--only STEP,...] [--seconds N] [--commit HASH]
#   bench/gpu_check.sh --dry-run      what of it needs no GPU; writes nothing into the tree
# Needs a Python >= 3.11 with torch, pytest, pybind11, setuptools, cmake, ninja; nvcc >= 12.4; g++.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
# Tools of the toolkit and of the Python at hand are often not on PATH.
export PATH="$PATH:/usr/local/cuda/bin:$(dirname "$("$python" -c 'import sys; print(sys.executable)')")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" bench/gpu_check.py "$@"

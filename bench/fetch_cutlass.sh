#!/usr/bin/env bash
# bench/fetch_cutlass.sh [FOLDER]: CUTLASS's headers (27 MB) into FOLDER, third_party/cutlass by default, which git ignores.
# With HEBATRON_CUTLASS_DIR naming it, the build adds grouped_gemm's baseline, implementation="cutlass".
set -euo pipefail
version=4.2.0.0
wheel=sha256:f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6

fail() {
  echo "fetch_cutlass: $*" >&2
  exit 1
}

[ $# -le 1 ] || fail "takes at most one folder, got $# arguments"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath -m "${1:-third_party/cutlass}")
if [ -e "$folder" ]; then
  [ "$(cat "$folder/VERSION" 2>/dev/null)" = "$version" ] || fail "FOLDER must not exist or hold CUTLASS $version, got $folder"
else
  python3 -m pip --version >/dev/null 2>&1 || fail "python3 must have pip, got $(command -v python3 || echo no python3)"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  echo "nvidia-cutlass==$version --hash=$wheel" >"$work/requirements.txt"
  # The wheel's own dependencies are for its Python part, which stays behind.
  python3 -m pip download --quiet --no-deps --require-hashes --dest "$work" --requirement "$work/requirements.txt" ||
    fail "pip could not download nvidia-cutlass $version; the reason stands above"
  python3 - "$work"/*.whl "$work/unpacked" <<'PYTHON'
import sys, zipfile

wheel = zipfile.ZipFile(sys.argv[1])
headers = "cutlass_library/source/include/"
wheel.extractall(sys.argv[2], [n for n in wheel.namelist() if n.startswith(headers) or n.endswith("LICENSE.txt")])
PYTHON
  mkdir -p "$(dirname "$folder")" "$work/cutlass"
  mv "$work"/unpacked/cutlass_library/source/include "$work"/unpacked/*.dist-info/licenses/LICENSE.txt "$work/cutlass"
  echo "$version" >"$work/cutlass/VERSION"
  mv "$work/cutlass" "$folder"
fi
echo "HEBATRON_CUTLASS_DIR=$folder"

#!/usr/bin/env bash
# bench/fetch_peers.sh [llama.cpp] [zentorch]: the peers that the CPU benchmarks are measured against, both by default, into
# third_party/peers, which git ignores. What is there already stays. A peer that is absent is reported as absent by the
# benchmarks. llama.cpp is built from the source within llama-cpp-python, for this machine's instructions, with
# JOBS compilers at a time (1 by default: about 15 minutes on one core), together with bench/llama_rival.cpp, which drives it;
# its ggml, with bench/ggml_rival.cpp, is ready after the first two.
set -euo pipefail
llama_version=0.3.36
llama_hash=sha256:832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
zentorch="zentorch==2.13.0.2"

fail() {
  echo "fetch_peers: $*" >&2
  exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
peers=$PWD/third_party/peers
mkdir -p "$peers"

fetch_llama() {
  local source=$peers/llama-source/vendor/llama.cpp build=$peers/llama-build
  if [ ! -d "$peers/llama-source" ]; then
    local work
    work=$(mktemp -d)
    echo "llama-cpp-python==$llama_version --hash=$llama_hash" >"$work/requirements.txt"
    python3 -m pip download --quiet --no-deps --require-hashes --no-binary llama-cpp-python --dest "$work" \
      --requirement "$work/requirements.txt" || fail "pip could not download llama-cpp-python $llama_version"
    tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
    mv "$work/llama_cpp_python-$llama_version" "$peers/llama-source"
    rm -rf "$work"
  fi
  local off=()
  for part in COMMON TESTS TOOLS EXAMPLES SERVER APP UI MTMD; do off+=("-DLLAMA_BUILD_$part=OFF"); done
  cmake -S "$source" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DCMAKE_POSITION_INDEPENDENT_CODE=ON "${off[@]}"
  ninja -C "$build" -j "${JOBS:-1}" ggml
  ${CXX:-c++} -O2 -std=c++17 -shared -fPIC bench/ggml_rival.cpp -I"$source/ggml/include" -o "$peers/ggml_rival.so" \
    "$build/ggml/src/libggml-cpu.a" "$build/ggml/src/libggml-base.a" \
    -Wl,--exclude-libs,ALL -Wl,--no-undefined -fopenmp -lpthread -ldl -lm
  echo "ggml: $peers/ggml_rival.so"
  ninja -C "$build" -j "${JOBS:-1}" llama
  ${CXX:-c++} -O2 -std=c++17 bench/llama_rival.cpp -I"$source/include" -I"$source/ggml/include" -o "$peers/llama_rival" \
    "$build/src/libllama.a" "$build/ggml/src/libggml.a" "$build/ggml/src/libggml-cpu.a" "$build/ggml/src/libggml-base.a" \
    -fopenmp -lpthread -ldl
  echo "llama.cpp: $peers/llama_rival"
}

fetch_zentorch() {
  # --no-deps: it would bring its own torch; its Python part needs these two
  python3 -m pip install --quiet --no-deps --upgrade --target "$peers/zentorch" "$zentorch" deprecated wrapt ||
    fail "pip could not install $zentorch, which exists for the torch release of its own number"
  echo "zentorch: $peers/zentorch"
}

for name in "${@:-llama.cpp zentorch}"; do
  for peer in $name; do
    case $peer in
      llama.cpp) fetch_llama ;;
      zentorch) fetch_zentorch ;;
      *) fail "a peer must be llama.cpp or zentorch, got $peer" ;;
    esac
  done
done

#!/usr/bin/env bash
# The kernel tests with the kernels built under the address and undefined-behaviour sanitizers.
#
#   tests/sanitize.sh              every test of the kernels
#   tests/sanitize.sh -k attention   what pytest is told to pick
#
# Builds a copy of the tree in a temporary folder, so that the kernels in use stay as they are. Needs the
# environment that the tests run in (python on PATH, with cmake and ninja), GCC, and its libasan.
set -euo pipefail
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$tree"/{src,tests,CMakeLists.txt,pyproject.toml} "$copy"
rm -f "$copy"/src/tiny_llm_kernels/*.so

# Following variables through the unrolled kernels takes GCC a quarter of an hour for one file: line numbers do.
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -fno-var-tracking"
cmake -S "$copy" -B "$copy/build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" \
  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_MODULE_LINKER_FLAGS="-fsanitize=address,undefined" >/dev/null
cmake --build "$copy/build" -j 2

# Python itself knows nothing of the sanitizers and leaks at its end; the rest is ours to answer for.
cd "$copy"
LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=src \
  python -m pytest tests/test_kernels*.py tests/test_fused_block.py -p no:cacheprovider "$@"

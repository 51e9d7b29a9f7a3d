#!/usr/bin/env bash
# Runs the kernel tests on kernels that are built with the address and undefined-behaviour sanitizers.
#
#   tests/sanitize.sh                all tests of the kernels
#   tests/sanitize.sh -k attention   arguments go to pytest
#
# It builds a copy of the tree in a temporary folder, so the installed kernels stay as they are. Needs the tests'
# environment (python on PATH, with cmake and ninja), GCC, and its libasan.
set -euo pipefail
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$tree"/{src,tests,CMakeLists.txt,pyproject.toml} "$copy"
rm -f "$copy"/src/tiny_llm_kernels/*.so

# Line numbers are enough: variable tracking in the unrolled kernels takes GCC a quarter of an hour for one file.
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -fno-var-tracking"
cmake -S "$copy" -B "$copy/build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" \
  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_MODULE_LINKER_FLAGS="-fsanitize=address,undefined" >/dev/null
cmake --build "$copy/build" -j 2

# Leak detection is off because Python itself leaks at exit.
cd "$copy"
LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=src \
  python -m pytest tests/test_kernels*.py tests/test_fused_block.py -p no:cacheprovider "$@"

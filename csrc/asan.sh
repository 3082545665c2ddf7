#!/bin/bash
# Runs the tests of the C++ kernels, and of the CUDA kernels in the emulator, under AddressSanitizer and
# UndefinedBehaviorSanitizer, in a copy of the tree so that the normal build stays.
# Usage: csrc/asan.sh [python] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac  # the tests run in another folder
shift || true
copy=build/asan
mkdir -p "$copy"
cp -r setup.py pyproject.toml csrc tests benchmarks depict_kernels "$copy"
for file in README.md LICENSE; do if [ -e "$file" ]; then cp "$file" "$copy"; fi; done
cd "$copy"
rm -f depict_kernels/*.so
DEPICT_KERNELS_SANITIZE=1 DEPICT_KERNELS_EMULATE_CUDA=1 DEPICT_KERNELS_NO_CUDA=1 "$python" setup.py -q build_ext --inplace
compiler=${CXX:-c++}
runtime="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so)"
# Python and torch never free everything, and memory use is not what it is without the sanitizer. What starts nvcc and looks
# at its code (cuda_ptx, cuda_report) has nothing for the sanitizer.
LD_PRELOAD="$runtime" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  "$python" -m pytest -q -p no:cacheprovider tests/test_upsample*.py tests/test_attention_cpp.py tests/test_mask_head_cpp.py \
  tests/test_extension.py tests/test_tiled_upsample.py tests/test_cuda_*.py \
  -k "not triton and not memory and not opcheck and not compile and not stable_interface and not cuda_ptx and not cuda_report" "$@"

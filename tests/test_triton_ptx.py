"""A few tests of every Triton kernel on what users run: PTX compiled for sm_80 and sm_90, executed by tests/ptx.

Each architecture has a process of its own, as in this one Triton's interpreter may have replaced the compiler. Which
tests: those whose kernels compile and run fast enough to take part in every run of the suite (CONTRIBUTING.md has how
to run all others like this). bfloat16, which the interpreter cannot multiply, and float32.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]

TESTS = [
    "test_attention_kernels.py::test_against_float64[triton-cpu-bfloat16-2x7x5x2x100]",
    "test_attention_kernels.py::test_against_float64[triton-cpu-bfloat16-1x128x5x1x100]",
    "test_attention_kernels.py::test_against_float64[triton-cpu-bfloat16-1x130x19x1x50]",
    "test_attention_kernels.py::test_against_float64[triton-cpu-float32-2x9x3x3x5]",
    "test_attention_kernels.py::test_tf32[triton-cpu-float32]",
    "test_triton_mask_head.py::test_against_float64[cpu-bfloat16-(1, 20, (9, 9), 272)]",
    "test_mask_head.py::test_upstream_gradients_of_any_size_in_float16[triton-cpu-float32-19-patches-512]",
    "test_triton_mask_head.py::test_repeats_are_bitwise_equal[cpu-float32]",
    "test_triton_upsample.py::test_loss_and_gradient_against_float64[cpu-float32-150 classes, sum]",
    "test_triton_upsample.py::test_careful_tiles[cpu-float32-small sums-mean]",
    "test_triton_upsample.py::test_series_and_careful_tiles_side_by_side[cpu-bfloat16]",
    "test_triton_upsample.py::test_bad_labels_are_reported_and_ignored_by_the_loss[cpu-bfloat16]",
    "test_triton_upsample.py::test_confusion_counts_and_accumulates[cpu-bfloat16-few]",
    "test_triton_upsample.py::test_argmax_is_the_argmax[cpu-float32-(2, 5, (2, 3), (9, 13))-noise]",
]

_BOTH = ("attention_forward", "attention_delta", "attention_backward", "mask_forward", "mask_backward")
_BOTH += ("mask_product", "pack_logits")
_FLOAT32 = ("loss_series", "gradient_series", "loss_careful", "gather_gradient", "label_tiles")
# kernel -> dtypes of its first argument
KERNELS = {name: {"bf16", "fp32"} for name in _BOTH} | {name: {"fp32"} for name in _FLOAT32}
for name in ("mask_forward", "mask_product"):
    KERNELS[name].add("fp16")
KERNELS["mask_peak"] = {"fp32"}  # of float16 patches' gradient
KERNELS["finish_loss"] = {"fp64", "constexpr"}  # sums of float64; none where only bad labels are reported


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_kernel(architecture):
    environment = {**os.environ, "DEPICT_TEST_PTX": architecture, "DEPICT_TEST_PTX_RACES": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        *(f"tests/{t}" for t in TESTS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(rf"\b{len(TESTS)} passed\b", done.stdout), done.stdout[-2000:]
    executed = re.search(rf"executed for {architecture}: (.*)", done.stdout)[1]
    found = {}
    for kernel, dtype in re.findall(r"(\w+) (\w+) x \d+", executed):
        found.setdefault(kernel, set()).add(dtype)
    assert found == KERNELS

"""A few tests of every CUDA kernel on what users run: PTX that nvcc compiles, executed by tests/ptx.

In a process per architecture, beside which the emulator serves all other tests (CONTRIBUTING.md has how to run the rest
like this). sm_90 has the kernels on warpgroup products; all others are the same there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ptx import cuda_runs

ROOT = Path(__file__).resolve().parents[1]

TESTS = {
    "sm_80": [
        "test_attention_kernels.py::test_against_float64[cuda-cpu-bfloat16-1x130x19x1x50]",
        "test_attention_kernels.py::test_against_float64[cuda-cpu-float16-2x7x5x2x100]",
        "test_attention_kernels.py::test_against_float64[cuda-cpu-bfloat16-1x33x1x2x128]",
        "test_attention_kernels.py::test_against_float64[cuda-cpu-float32-2x9x3x3x5]",
        "test_cuda_mask_head.py::test_values_and_gradients[cpu-(1, 150, (10, 13), 192)-torch.bfloat16]",
        "test_cuda_mask_head.py::test_values_and_gradients[cpu-(2, 19, (3, 5), 48)-torch.float16]",
        "test_cuda_mask_head.py::test_values_and_gradients[cpu-(1, 33, (13, 5), 3)-torch.float32]",
        "test_cuda_upsample.py::test_loss_and_gradient_against_float64[cpu-scale 16]",
        "test_cuda_upsample.py::test_loss_and_gradient_against_float64[cpu-sharp regions]",
        "test_cuda_upsample.py::test_loss_and_gradient_against_float64[cpu-scale 4]",
        "test_cuda_upsample.py::test_half_precision_computes_in_float32[cpu-none-torch.bfloat16]",
        "test_cuda_upsample.py::test_bad_labels_are_reported_and_count_as_ignored[cpu-4294967297]",
        "test_cuda_upsample_labels.py::test_label_map_and_confusion[cpu-(2, 5, (2, 3), (29, 43))-noise-1.0]",
    ],
    "sm_90": [
        "test_cuda_attention_sm90.py::test_self_attention[cpu-100-130-torch.bfloat16]",
        "test_cuda_attention_sm90.py::test_cross_attention[cpu-5-130-1-torch.float16]",
    ],
}
KERNELS = {
    "sm_80": {
        *("forward_kernel", "delta_kernel", "backward_kernel"),
        *("mask_forward", "mask_peak", "mask_backward", "mask_products", "mask_finish"),
        *("pack_kernel", "loss_kernel", "finish_kernel", "gather_kernel", "label_kernel"),
    },
    "sm_90": {"forward_wgmma_kernel", "self_backward_wgmma_kernel", "delta_kernel"},
}


@pytest.mark.parametrize("architecture", list(TESTS))
def test_every_kernel(architecture):
    if reason := cuda_runs.why_not():
        pytest.skip(reason)
    environment = {**os.environ, "DEPICT_TEST_PTX": architecture, "DEPICT_TEST_PTX_RACES": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in TESTS[architecture]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(rf"\b{len(TESTS[architecture])} passed\b", done.stdout), done.stdout[-2000:]
    executed = re.search(rf"CUDA kernels executed for {architecture}: (.*)", done.stdout)[1]
    found = {name for name, _ in re.findall(r"(\w+)(<[^>]*>)? x \d+", executed)}
    assert found >= KERNELS[architecture], executed

"""Triton attention beyond what every kernel backend is tested for (tests/test_attention_kernels.py)."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from depict_kernels import backends, ops
from depict_kernels.testing import value_and_gradients

pytest.importorskip("triton")

from depict_kernels.ops.triton_kernels import tuning


def test_what_it_does_not_take(triton_device, triton_interpreted):
    w = torch.randn(1, 3, 1, 4, device=triton_device)
    with pytest.raises(backends.BackendUnavailable, match="float64 is not supported"):
        ops.subspace_self_attention(w.double(), backend="triton")
    with pytest.raises(ValueError, match="head_dim up to 256, got 257"):
        ops.subspace_self_attention(torch.randn(1, 2, 1, 257, device=triton_device), backend="triton")
    if triton_interpreted:
        with pytest.raises(backends.BackendUnavailable, match="interpreter gets bfloat16"):
            ops.subspace_self_attention(w.bfloat16(), backend="triton")


def test_several_threads(triton_device):
    """A kernel's first launch, by all of them at once: none may take it half loaded, or share the interpreter."""
    w = torch.randn(1, 40, 1, 23, device=triton_device)
    with ThreadPoolExecutor(6) as pool:
        outs = list(pool.map(lambda _: ops.subspace_self_attention(w, backend="triton"), range(6)))
    for out in outs:
        assert torch.equal(out, outs[0])
    torch.testing.assert_close(outs[0], ops.subspace_self_attention(w, backend="reference"))


def test_float32_products_follow_torchs_setting(monkeypatch):
    from depict_kernels.ops.triton_kernels import launch

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, precision in [("ieee", "ieee"), ("tf32", "tf32")]:
            torch.backends.cuda.matmul.fp32_precision = setting
            for architecture, expected in [("sm_90", precision), ("gfx942", precision), ("gfx90a", "ieee")]:
                with launch.recording(architecture):
                    assert launch.dot_precision(torch.float32, torch.device("meta")) == expected
                    assert launch.dot_precision(torch.float16, torch.device("meta")) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_library_and_status_page_work_without_triton():
    """As where no wheel exists: importing triton fails, the backend says so, everything else works."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, depict_kernels\n"
        "from depict_kernels import backends, ops\n"
        "ops.subspace_self_attention(torch.randn(1, 3, 1, 2))\n"
        "print(backends.why_unavailable('triton', 'subspace_self_attention', 'cuda', torch.float32))\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


def test_backward_with_masks_in_every_block(triton_device, monkeypatch):
    """The way of architectures with fewer registers to spare gives the same gradients."""
    w = torch.randn(1, 70, 1, 20, device=triton_device)
    run = lambda w: ops.subspace_self_attention(w, backend="triton")
    _, (apart,) = value_and_gradients(run, [w])
    monkeypatch.setattr(tuning, "attention_masks_apart", lambda *_: False)
    _, (masked,) = value_and_gradients(run, [w])
    # The partial block is added last instead of first.
    torch.testing.assert_close(masked, apart, rtol=1e-5, atol=1e-5)
    assert not torch.equal(masked, apart)

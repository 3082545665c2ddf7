"""Triton attention: in the interpreter on the CPU, compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depict_kernels import backends, ops
from depict_kernels.testing import check_against_float64, value_and_gradients

pytest.importorskip("triton")

# (B, N, M, H, d): one token, odd sizes, the paper's head widths, one chunk, several, head_dim no multiple of 2
SHAPES = [
    (2, 7, 5, 2, 100),
    (1, 130, 19, 1, 50),
    (1, 1, 1, 1, 16),
    (1, 65, 66, 1, 64),
    (1, 33, 1, 2, 128),
    (1, 20, 40, 1, 249),
    (2, 9, 3, 3, 5),
]


def ids(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def tensors(shape, dtype, device):
    torch.manual_seed(0)
    batch, n, m, heads, dim = shape
    return torch.randn(batch, m, heads, dim).to(device, dtype), torch.randn(batch, n, heads, dim).to(
        device, dtype
    )


def factor_of(dtype):
    """float32: two summation orders, neither the better one."""
    return 4 if dtype == torch.float32 else 2


def check_cross(q, w, scale=None):
    check_against_float64(
        lambda q, w: ops.subspace_cross_attention(q, w, scale, backend="triton"),
        lambda q, w: ops.subspace_cross_attention(q, w, scale, backend="torch"),
        [q, w],
        factor=factor_of(w.dtype),
    )


def check_self(w, scale=None):
    check_against_float64(
        lambda w: ops.subspace_self_attention(w, scale, backend="triton"),
        lambda w: ops.subspace_self_attention(w, scale, backend="torch"),
        [w],
        factor=factor_of(w.dtype),
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_against_float64(shape, triton_device, triton_dtype):
    q, w = tensors(shape, triton_dtype, triton_device)
    check_self(w)
    check_cross(q, w)


@pytest.mark.parametrize("shape", [(1, 70, 9, 1, 100), (1, 33, 40, 2, 50)], ids=ids)
def test_float16_in_the_interpreter(shape, triton_device):
    """Casts between the products, which float32 does not have."""
    q, w = tensors(shape, torch.float16, triton_device)
    check_self(w)
    check_cross(q, w)


@pytest.mark.parametrize("dim", [100, 50])
def test_tokens_of_the_decoder(dim, triton_device, triton_dtype, monkeypatch):
    """N = 1024 + 150 tokens, as at 512 x 512 pixels; large blocks where the interpreter would be slow."""
    if triton_device == "cpu":
        from depict_kernels.ops.triton_kernels import tuning

        monkeypatch.setattr(tuning, "attention", lambda *_: tuning.Config(256, 256, 4, 1))
    _, w = tensors((1, 1174, 1, 1, dim), triton_dtype, triton_device)
    check_self(w)


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_any_scale(scale, triton_device, triton_dtype):
    q, w = tensors((1, 37, 6, 2, 12), triton_dtype, triton_device)
    check_cross(q, w, scale)
    check_self(w, scale)


def test_tf32(triton_device):
    """As torch's setting says; the peer's own products follow it too. (The interpreter computes in float32.)"""
    q, w = tensors((1, 130, 19, 2, 100), torch.float32, triton_device)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check_against_float64(
            lambda q, w: ops.subspace_cross_attention(q, w, backend="triton"),
            lambda q, w: ops.subspace_cross_attention(q, w, backend="reference"),
            [q, w],
            factor=4,
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_far_apart_scores(triton_device, triton_dtype):
    """Scores of thousands, of both signs: the online softmax's running maximum has to move."""
    q, w = tensors((1, 70, 33, 1, 16), torch.float32, triton_device)
    w = w * torch.linspace(1, 60, 70, device=triton_device)[None, :, None, None]
    check_cross((20 * q).to(triton_dtype), w.to(triton_dtype))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "column", "offset"])
def test_strides(layout, triton_device, triton_dtype):
    base = torch.randn(2, 3, 20, 16, device=triton_device).to(triton_dtype)
    w = {
        "transposed": base.transpose(1, 2),  # (2, 20, 3, 16), heads outermost
        "expanded": base[:1].transpose(1, 2).expand(2, -1, -1, -1),
        "column": base.transpose(1, 2)[..., ::2],  # last dimension strided
        "offset": base.flatten()[3:-13]
        .view(2, -1)[:, :472]
        .unflatten(1, (8, 59))[..., :48]
        .unflatten(2, (3, 16)),
    }[layout]
    grad = (
        torch.randn(w.shape, device=triton_device)
        .to(triton_dtype)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
    )
    run = lambda w: ops.subspace_self_attention(w, backend="triton")
    expected = value_and_gradients(run, [w.contiguous()], grad.contiguous())
    w = w.detach().requires_grad_()
    out = run(w)
    actual = (out.detach(), torch.autograd.grad(out, w, grad))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_repeats_are_bitwise_equal(triton_device, triton_dtype):
    q, w = tensors((1, 70, 33, 1, 24), triton_dtype, triton_device)
    run = lambda q, w: ops.subspace_cross_attention(q, w, backend="triton")
    torch.testing.assert_close(
        value_and_gradients(run, [q, w]), value_and_gradients(run, [q, w]), rtol=0, atol=0
    )


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_to_do(triton_device):
    run = lambda q, w: ops.subspace_cross_attention(q, w, backend="triton")
    q, w = torch.randn(2, 0, 3, 4, device=triton_device), torch.randn(2, 5, 3, 4, device=triton_device)
    out, (grad_q, grad_w) = value_and_gradients(run, [q, w])
    assert out.shape == grad_q.shape == q.shape
    assert grad_w.eq(0).all()
    for shape in [(0, 5, 3, 4), (2, 0, 3, 4)]:
        w = torch.randn(shape, device=triton_device)
        out, (grad,) = value_and_gradients(lambda w: ops.subspace_self_attention(w, backend="triton"), [w])
        assert out.shape == grad.shape == w.shape


def test_kernels_are_launched(triton_launches, triton_device):
    """An alias of the reference would pass every other test."""
    q, w = tensors((1, 9, 5, 1, 16), torch.float32, triton_device)
    value_and_gradients(lambda w: ops.subspace_self_attention(w, backend="triton"), [w])
    assert triton_launches == ["attention_forward", "attention_delta", "attention_backward"]
    triton_launches.clear()
    value_and_gradients(lambda q, w: ops.subspace_cross_attention(q, w, backend="triton"), [q, w])
    assert triton_launches == ["attention_forward", "attention_delta", *2 * ["attention_backward"]]


def test_backward_saves_only_input_output_and_lse(triton_device):
    _, w = tensors((1, 9, 1, 1, 16), torch.float32, triton_device)
    w.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.subspace_self_attention(w, backend="triton")
    assert sorted(tuple(t.shape) for t in saved) == [(1, 1, 9), (1, 9, 1, 16), (1, 9, 1, 16)]


def test_opcheck(triton_device, triton_dtype):
    q, w = (t.requires_grad_() for t in tensors((2, 5, 3, 2, 4), triton_dtype, triton_device))
    library = torch.ops.depict_kernels
    torch.library.opcheck(library.subspace_self_attention.default, (w, 0.5, "triton"))
    torch.library.opcheck(library.subspace_cross_attention.default, (q, w, 0.5, "triton"))


def test_compile_fullgraph(triton_device, triton_dtype):
    def f(q, w):
        return ops.subspace_self_attention(
            ops.subspace_cross_attention(q, w, backend="triton"), backend="triton"
        )

    q, w = tensors((2, 6, 4, 2, 8), triton_dtype, triton_device)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, [q, w]), value_and_gradients(f, [q, w]))


def test_what_it_does_not_take(triton_device):
    w = torch.randn(1, 3, 1, 4, device=triton_device)
    with pytest.raises(backends.BackendUnavailable, match="float64 is not supported"):
        ops.subspace_self_attention(w.double(), backend="triton")
    with pytest.raises(ValueError, match="head_dim up to 256, got 257"):
        ops.subspace_self_attention(torch.randn(1, 2, 1, 257, device=triton_device), backend="triton")
    if triton_device == "cpu":
        with pytest.raises(backends.BackendUnavailable, match="interpreter gets bfloat16"):
            ops.subspace_self_attention(w.bfloat16(), backend="triton")


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

"""CUDA attention beyond what every kernel backend is tested for; in the emulator where there is no GPU."""

import pytest
import torch
from attention_checks import check_alignment, run_cross, run_self

from depict_kernels import backends, ops
from depict_kernels.ops.cuda_kernels import _library, attention
from depict_kernels.testing import check_against_float64, value_and_gradients


# Around every size for which there is a kernel (56, 104, 128), and every width of copy: 2, 4, 8 and 16 bytes.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dim", [1, 7, 10, 56, 57, 100, 104, 105, 127, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_head_dim(dim, dtype, cuda_device):
    torch.manual_seed(dim)
    q, w = torch.randn(1, 3, 1, dim), torch.randn(1, 50, 1, dim)
    check_against_float64(
        run_cross,
        lambda q, w: ops.subspace_cross_attention(q, w, backend="torch"),
        [t.to(cuda_device, dtype) for t in (q, w)],
        factor=4 if dtype == torch.float32 else 2,
    )


@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_auto_takes_torch_beyond_the_largest_head_dim(run, cuda_device, monkeypatch):
    monkeypatch.setattr(backends, "_candidates", lambda *_: (("cuda",), False))
    torch.compiler.reset()
    sizes = lambda w: {"tokens": w.shape[1], "head_dim": w.shape[3]}
    chosen = lambda w: backends.choose("auto", "subspace_self_attention", w, **sizes(w)) == "cuda"
    attend = lambda w: (ops.subspace_self_attention(w), ops.subspace_cross_attention(w, w), chosen(w))
    if run == "compiled":
        attend = torch.compile(attend, fullgraph=True, backend="eager", dynamic=True)
    for dim, kernel in ((128, True), (129, False)):
        w = torch.randn(1, 5, 2, dim, device=cuda_device)
        expected = ops.subspace_self_attention(w, backend="torch")
        own, cross, took_kernel = attend(w)
        torch.testing.assert_close(own, expected)
        torch.testing.assert_close(cross, expected)
        assert took_kernel == kernel
    torch.compiler.reset()


@pytest.mark.parametrize("shape", [(0, 9, 3, 8), (2, 0, 3, 8), (2, 9, 0, 8)])
def test_nothing_has_a_gradient_of_nothing(shape, cuda_device):
    q, w = (torch.zeros(shape, device=cuda_device, requires_grad=True) for _ in range(2))
    run_self(w).sum().backward()
    assert w.grad.shape == shape
    if shape[1]:
        run_cross(q, w).sum().backward()
        assert q.grad.shape == shape


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_alignment_of_rows(offset, cuda_device):
    check_alignment(offset, torch.float16, cuda_device)


def test_a_single_row_may_have_any_stride(cuda_device):
    """Copies of rows that do not exist read nothing, but the address they name must be aligned all the same."""
    w = torch.randn(1, 9, 2, 16, device=cuda_device).half()
    expected = run_cross(w[:, :1].contiguous(), w)
    memory = torch.empty(66, dtype=w.dtype, device=cuda_device)
    q = memory.as_strided((1, 1, 2, 16), (66, 33, 16, 1)).copy_(w[:, :1])
    assert q.stride(1) == 33
    assert torch.equal(run_cross(q, w), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_order_of_threads_does_not_matter(dtype, monkeypatch, cuda_device):
    """A missing barrier would show: the emulator runs the threads in another order for every seed."""
    if cuda_device != "cpu":
        pytest.skip("the GPU chooses its own order")
    q, w = torch.randn(1, 20, 2, 50).to(dtype), torch.randn(1, 140, 2, 50).to(dtype)
    results = []
    for seed in ("0", "1", "2", "7"):
        monkeypatch.setenv("DEPICT_EMULATE_SEED", seed)
        results.append((value_and_gradients(run_self, [w]), value_and_gradients(run_cross, [q, w])))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_nan_reaches_what_depends_on_it(cuda_device):
    w = torch.randn(2, 40, 2, 16, device=cuda_device)
    w[0, 5, 1, 3] = torch.nan
    out = run_self(w)
    assert out[0, :, 1].isnan().all()
    assert not out[1].isnan().any() and not out[0, :, 0].isnan().any()


def test_float32_products_follow_torchs_setting(cuda_device):
    q, w = (torch.randn(1, n, 1, 100, device=cuda_device) for n in (16, 64))
    truth = ops.subspace_cross_attention(q.double(), w.double(), backend="torch")
    errors = {}
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = setting
            errors[setting] = (run_cross(q, w) - truth).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 5e-6  # float32, over 100 terms
    assert 1e-4 < errors["tf32"] < 1e-1  # 10 bits


def test_what_it_does_not_take(cuda_device):
    w = torch.randn(1, 3, 1, 129, device=cuda_device)
    with pytest.raises(ValueError, match=r"head_dim up to 128, got 129; use backend='triton' or 'torch'"):
        run_self(w)
    with pytest.raises(backends.BackendUnavailable, match="float64 is not supported"):
        run_self(w.double())


def test_private_operators_check_what_memory_safety_needs(cuda_device):
    w = torch.zeros(2, 5, 3, 8, device=cuda_device)
    out, lse = torch.empty_like(w), torch.empty(2, 3, 5, device=cuda_device)
    good = [w, w, out, lse, 1.0, False, attention.MMA]
    for position, value in [
        (0, w[0]),
        (0, w.double()),
        (1, w[:1]),
        (1, w[..., :7]),
        (1, w.half()),
        (0, w.transpose(1, 3)),
        (2, out[:, :4]),
        (2, out.half()),
        (2, torch.empty(2, 5, 8, 3, device=cuda_device).transpose(2, 3)),
        (3, lse[:, :2]),
        (3, lse.double()),
    ]:
        wrong = list(good)
        wrong[position] = value
        with pytest.raises(RuntimeError):
            _library.call("attention_forward", *wrong, device=w.device)
    _library.call("attention_forward", *good, device=w.device)


def test_without_the_emulator_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setenv("DEPICT_KERNELS_EMULATE_CUDA", "0")
    with pytest.raises(backends.BackendUnavailable, match="runs on GPU tensors and these are on cpu"):
        run_self(torch.randn(1, 2, 1, 4))

"""Attention of every kernel backend: on the CPU in an interpreter or emulator, compiled on a GPU."""

import contextlib

import pytest
import torch
from attention_checks import check_large_scores
from torch.utils._python_dispatch import TorchDispatchMode

from depict_kernels import ops
from depict_kernels.testing import check_against_float64, value_and_gradients

# (B, N, M, H, d): one token, odd sizes, the paper's head widths, one chunk, several, head_dim no multiple of 2
SHAPES = [
    (2, 7, 5, 2, 100),
    (1, 130, 19, 1, 50),
    (1, 1, 1, 1, 16),
    (1, 65, 66, 1, 64),
    (1, 128, 5, 1, 100),  # whole blocks of keys alone
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


def check_cross(kernels, q, w, scale=None):
    check_against_float64(
        lambda q, w: ops.subspace_cross_attention(q, w, scale, backend=kernels.backend),
        lambda q, w: ops.subspace_cross_attention(q, w, scale, backend="torch"),
        [q, w],
        factor=factor_of(w.dtype),
    )


def check_self(kernels, w, scale=None):
    check_against_float64(
        lambda w: ops.subspace_self_attention(w, scale, backend=kernels.backend),
        lambda w: ops.subspace_self_attention(w, scale, backend="torch"),
        [w],
        factor=factor_of(w.dtype),
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_against_float64(shape, kernels):
    if kernels.backend == "cuda" and shape[-1] > 128:
        pytest.skip("the CUDA kernels take head_dim up to 128")
    q, w = tensors(shape, kernels.dtype, kernels.device)
    check_self(kernels, w)
    check_cross(kernels, q, w)


@pytest.mark.parametrize("shape", [(1, 70, 9, 1, 100), (1, 33, 40, 2, 50)], ids=ids)
def test_float16_in_the_interpreter(shape, kernels32):
    """Casts between the products, which float32 does not have."""
    q, w = tensors(shape, torch.float16, kernels32.device)
    check_self(kernels32, w)
    check_cross(kernels32, q, w)


@pytest.mark.parametrize("dim", [100, 50])
def test_tokens_of_the_decoder(dim, kernels, monkeypatch):
    """N = 1024 + 150 tokens, as at 512 x 512 pixels; large blocks where the interpreter would be slow."""
    if kernels.interpreted:
        from depict_kernels.ops.triton_kernels import tuning

        monkeypatch.setattr(tuning, "attention", lambda *_: tuning.Config(256, 256, 4, 1))
    # The emulator is slow: float32 takes three products of TF32 for each, bfloat16 is float16 to it but for rounding.
    tokens = 400 if kernels[:2] == ("cuda", "cpu") and kernels.dtype != torch.float16 else 1174
    _, w = tensors((1, tokens, 1, 1, dim), kernels.dtype, kernels.device)
    check_self(kernels, w)


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_any_scale(scale, kernels):
    q, w = tensors((1, 37, 6, 2, 12), kernels.dtype, kernels.device)
    check_cross(kernels, q, w, scale)
    check_self(kernels, w, scale)


def plain(q, w):
    """In plain torch, whose products a dispatch mode sees."""
    q, w = q.transpose(1, 2), w.transpose(1, 2)
    return ((q @ w.mT * q.shape[-1] ** -0.5).softmax(-1) @ w).transpose(1, 2)


class RoundedToTF32(TorchDispatchMode):
    """Products on the CPU with operands as a GPU's library rounds them: to 10 bits, to the nearest."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.PRODUCTS:
            args = [self.rounded(a) if i >= len(args) - 2 else a for i, a in enumerate(args)]
        return function(*args, **(kwargs or {}))

    def rounded(self, t):
        if t.dtype != torch.float32:
            return t
        return (t.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def test_tf32(kernels32):
    """As torch's setting says; the peer's own products follow it too. (Triton's interpreter computes in float32.)"""
    q, w = tensors((1, 130, 19, 2, 100), torch.float32, kernels32.device)
    # Triton's products cut operands to TF32 on the GPU, where the peer's may round them: twice the largest error, all
    # of one sign. With both emulated on this test's inputs the errors' ratio is 2.3 to 4.1.
    cut = kernels32.backend == "triton" and kernels32.as_on_a_gpu
    peer = contextlib.nullcontext()
    if kernels32.device == "cpu" and not kernels32.interpreted:
        peer = RoundedToTF32()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with peer:
            check_against_float64(
                lambda q, w: ops.subspace_cross_attention(q, w, backend=kernels32.backend),
                plain,
                [q, w],
                factor=8 if cut else 4,
            )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_far_apart_scores(kernels):
    """Scores of thousands, of both signs: the online softmax's running maximum has to move."""
    q, w = tensors((1, 70, 33, 1, 16), torch.float32, kernels.device)
    w = w * torch.linspace(1, 60, 70, device=kernels.device)[None, :, None, None]
    check_cross(kernels, (20 * q).to(kernels.dtype), w.to(kernels.dtype))


@pytest.mark.parametrize("size", [1e6, 1e8, 1e10, 1e20])
def test_large_scores(size, kernels):
    """As large as float32 holds them; in Triton's multiply-add, which its interpreter has not, up to 1e8."""
    if kernels.backend == "triton" and kernels.as_on_a_gpu and size > 1e6:
        pytest.skip("a documented limit")
    check_large_scores(size, kernels.dtype, kernels.device, kernels.backend)


def test_gradients_of_large_scores(kernels32):
    """The documented limit: a weight formed again from its log-sum-exp is off by about 1e-7 times its score."""
    q, w = tensors((1, 70, 9, 2, 16), torch.float32, kernels32.device)
    run = lambda backend: lambda q, w: ops.subspace_cross_attention(q, w, 1e4, backend=backend)
    _, (_, truth) = value_and_gradients(run("torch"), [q.double(), w.double()])
    _, (_, grad) = value_and_gradients(run(kernels32.backend), [q, w])
    largest = 1e4 * torch.einsum("bmhd,bnhd->bhmn", q, w).abs().max()
    # The scores and the sums of their gradients are rounded too, each by as much.
    assert (grad - truth).abs().max() < 4e-7 * largest * truth.abs().max()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "column", "offset"])
def test_strides(layout, kernels):
    base = torch.randn(2, 3, 20, 16, device=kernels.device).to(kernels.dtype)
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
        torch.randn(w.shape, device=kernels.device)
        .to(kernels.dtype)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
    )
    run = lambda w: ops.subspace_self_attention(w, backend=kernels.backend)
    expected = value_and_gradients(run, [w.contiguous()], grad.contiguous())
    w = w.detach().requires_grad_()
    out = run(w)
    actual = (out.detach(), torch.autograd.grad(out, w, grad))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_repeats_are_bitwise_equal(kernels):
    q, w = tensors((1, 70, 33, 1, 24), kernels.dtype, kernels.device)
    run = lambda q, w: ops.subspace_cross_attention(q, w, backend=kernels.backend)
    torch.testing.assert_close(
        value_and_gradients(run, [q, w]), value_and_gradients(run, [q, w]), rtol=0, atol=0
    )


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_to_do(kernels32):
    run = lambda q, w: ops.subspace_cross_attention(q, w, backend=kernels32.backend)
    q, w = torch.randn(2, 0, 3, 4, device=kernels32.device), torch.randn(2, 5, 3, 4, device=kernels32.device)
    out, (grad_q, grad_w) = value_and_gradients(run, [q, w])
    assert out.shape == grad_q.shape == q.shape
    assert grad_w.eq(0).all()
    for shape in [(0, 5, 3, 4), (2, 0, 3, 4)]:
        w = torch.randn(shape, device=kernels32.device)
        out, (grad,) = value_and_gradients(
            lambda w: ops.subspace_self_attention(w, backend=kernels32.backend), [w]
        )
        assert out.shape == grad.shape == w.shape


def test_kernels_are_launched(launches, kernels32):
    """An alias of the reference would pass every other test."""
    q, w = tensors((1, 9, 5, 1, 16), torch.float32, kernels32.device)
    value_and_gradients(lambda w: ops.subspace_self_attention(w, backend=kernels32.backend), [w])
    assert launches == ["attention_forward", "attention_delta", "attention_backward"]
    launches.clear()
    value_and_gradients(lambda q, w: ops.subspace_cross_attention(q, w, backend=kernels32.backend), [q, w])
    assert launches == ["attention_forward", "attention_delta", *2 * ["attention_backward"]]


def test_backward_saves_only_input_output_and_lse(kernels32):
    _, w = tensors((1, 9, 1, 1, 16), torch.float32, kernels32.device)
    w.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.subspace_self_attention(w, backend=kernels32.backend)
    assert sorted(tuple(t.shape) for t in saved) == [(1, 1, 9), (1, 9, 1, 16), (1, 9, 1, 16)]


def test_opcheck(kernels):
    q, w = (t.requires_grad_() for t in tensors((2, 5, 3, 2, 4), kernels.dtype, kernels.device))
    library = torch.ops.depict_kernels
    torch.library.opcheck(library.subspace_self_attention.default, (w, 0.5, kernels.backend))
    torch.library.opcheck(library.subspace_cross_attention.default, (q, w, 0.5, kernels.backend))


def test_compile_fullgraph(kernels):
    def f(q, w):
        return ops.subspace_self_attention(
            ops.subspace_cross_attention(q, w, backend=kernels.backend), backend=kernels.backend
        )

    q, w = tensors((2, 6, 4, 2, 8), kernels.dtype, kernels.device)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, [q, w]), value_and_gradients(f, [q, w]))

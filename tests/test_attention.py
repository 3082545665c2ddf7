"""Subspace attention: values and gradients of every backend, shapes, strides, compile, errors."""

import pytest
import torch

from depict_kernels import backends, ops
from depict_kernels.testing import check_against_float64, value_and_gradients

BACKENDS = ["reference", "torch"]
if backends.why_unavailable("cpp", "subspace_self_attention", "cpu", torch.float32) is None:
    BACKENDS.append("cpp")
# (B, N, H, d): the paper's head widths, odd sizes, one token, one head
SHAPES = [(2, 7, 3, 100), (1, 130, 2, 50), (2, 33, 1, 16), (1, 1, 3, 5), (3, 20, 2, 128)]


def ids(shape):
    return "x".join(map(str, shape))


def naive(q, w, scale):
    """Independent of the library: one query and one head at a time."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for m in range(q.shape[1]):
                p = (scale * w[b, :, h] @ q[b, m, h]).softmax(0)
                out[b, m, h] = p @ w[b, :, h]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_formula(backend):
    q, w = torch.randn(2, 4, 3, 6).double(), torch.randn(2, 5, 3, 6).double()
    torch.testing.assert_close(ops.subspace_cross_attention(q, w, backend=backend), naive(q, w, 6**-0.5))
    torch.testing.assert_close(ops.subspace_self_attention(w, 0.3, backend=backend), naive(w, w, 0.3))


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_reference_within_budget_of_stock(shape, device):
    torch.manual_seed(0)
    batch, n, heads, dim = shape
    w = torch.randn(shape, device=device)
    q = torch.randn(batch, 1 + n // 2, heads, dim, device=device)
    check_against_float64(
        lambda w: ops.subspace_self_attention(w, backend="reference"),
        lambda w: ops.subspace_self_attention(w, backend="torch"),
        [w],
        factor=4,  # two summation orders in float32, neither the better one
    )
    check_against_float64(
        lambda q, w: ops.subspace_cross_attention(q, w, backend="reference"),
        lambda q, w: ops.subspace_cross_attention(q, w, backend="torch"),
        [q, w],
        factor=4,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    w = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: ops.subspace_self_attention(w, backend=backend), (w,))
    assert torch.autograd.gradcheck(lambda q, w: ops.subspace_cross_attention(q, w, backend=backend), (q, w))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_stock(backend, dtype):
    torch.manual_seed(0)
    check_against_float64(
        lambda q, w: ops.subspace_cross_attention(q, w, backend=backend),
        lambda q, w: ops.subspace_cross_attention(q, w, backend="torch"),
        [torch.randn(1, 9, 3, 50).to(dtype), torch.randn(1, 65, 3, 50).to(dtype)],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    base = torch.randn(2, 3, 20, 2 * 8)
    w = base[..., ::2].transpose(1, 2)  # (2, 20, 3, 8), no dimension contiguous
    q = torch.randn(1, 5, 3, 8).expand(2, -1, -1, -1)
    run = lambda *t: ops.subspace_cross_attention(*t, backend=backend)
    expected = value_and_gradients(run, [q.contiguous(), w.contiguous()])
    q, w = q.requires_grad_(), w.requires_grad_()
    out = run(q, w)
    grads = torch.autograd.grad(out.sum(), (q, w))
    torch.testing.assert_close((out.detach(), grads), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_and_no_queries(backend):
    w = torch.randn(0, 5, 3, 4, requires_grad=True)
    out = ops.subspace_self_attention(w, backend=backend)
    out.sum().backward()
    assert out.shape == w.shape and w.grad.shape == w.shape
    q = torch.randn(2, 0, 3, 4, requires_grad=True)
    w = torch.randn(2, 5, 3, 4, requires_grad=True)
    ops.subspace_cross_attention(q, w, backend=backend).sum().backward()
    assert w.grad.eq(0).all()


def test_rotating_a_head_rotates_its_output():
    """softmax(w w^T) w with w R: scores unchanged, output rotated. The property behind the decoder's test."""
    w = torch.randn(1, 11, 2, 6, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))
    turn = lambda t: torch.einsum("bnhd,hde->bnhe", t, rotation)
    torch.testing.assert_close(ops.subspace_self_attention(turn(w)), turn(ops.subspace_self_attention(w)))


def test_large_scores_do_not_overflow():
    w = 200 * torch.randn(1, 9, 1, 8)
    for backend in BACKENDS:
        out, (grad,) = value_and_gradients(lambda w: ops.subspace_self_attention(w, backend=backend), [w])
        assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    torch.manual_seed(0)
    w = torch.randn(2, 5, 2, 4, dtype=dtype, requires_grad=True)
    q = torch.randn(2, 3, 2, 4, dtype=dtype, requires_grad=True)
    library = torch.ops.depict_kernels
    torch.library.opcheck(library.subspace_self_attention.default, (w, 0.5, "reference"))
    torch.library.opcheck(library.subspace_cross_attention.default, (q, w, 0.5, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph_and_dynamic_batch(backend):
    def f(q, w):
        out = ops.subspace_cross_attention(q, w, backend=backend)
        return ops.subspace_self_attention(out, backend=backend)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        inputs = [torch.randn(batch, 4, 2, 8), torch.randn(batch, 6, 2, 8)]
        torch.testing.assert_close(value_and_gradients(compiled, inputs), value_and_gradients(f, inputs))


def test_export():
    class Core(torch.nn.Module):
        def forward(self, w):
            return ops.subspace_self_attention(w, backend="reference")

    w = torch.randn(2, 5, 2, 4)
    program = torch.export.export(Core(), (w,))
    torch.testing.assert_close(program.module()(w), ops.subspace_self_attention(w))


def test_second_derivative_of_a_kernel_is_refused_not_wrong():
    w = torch.randn(1, 3, 1, 2, requires_grad=True)
    out = ops.subspace_self_attention(w, backend="reference")
    (grad,) = torch.autograd.grad(out.sum(), w, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"backend='torch' within .*sdpa_kernel\(SDPBackend.MATH\)"):
        grad.sum().backward()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # which is true
        stock = lambda w: ops.subspace_self_attention(w, backend="torch")
        assert torch.autograd.gradgradcheck(stock, w.detach().double().requires_grad_())


def test_transforms_go_through_stock_attention():
    """Forward mode and the Hessian, which torch's fused attention refuses on the CPU."""
    q, w = torch.randn(1, 3, 2, 4, dtype=torch.float64), torch.randn(1, 5, 2, 4, dtype=torch.float64)
    direction = torch.randn_like(w)

    def plain(w):
        scores = torch.einsum("bmhd,bnhd->bhmn", q, w) / 2
        return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), w).sin().sum()

    def ours(w):
        return ops.subspace_cross_attention(q, w).sin().sum()

    def both(f):
        return f(ours), f(plain)

    torch.testing.assert_close(*both(lambda f: torch.func.jvp(f, (w,), (direction,))))
    torch.testing.assert_close(*both(lambda f: torch.func.hessian(f)(w)))
    compiled = torch.compile(lambda w: torch.func.jvp(ours, (w,), (direction,))[1], backend="aot_eager")
    torch.testing.assert_close(compiled(w), torch.func.jvp(plain, (w,), (direction,))[1])


def test_autocast_casts_as_stock_products_do():
    w = torch.randn(1, 5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in BACKENDS:
            assert ops.subspace_self_attention(w, backend=backend).dtype == torch.bfloat16


def test_flop_counter_sees_kernels():
    from torch.utils.flop_counter import FlopCounterMode

    q, w = torch.randn(2, 4, 3, 8, requires_grad=True), torch.randn(2, 6, 3, 8, requires_grad=True)
    product = 2 * (2 * 3 * 4 * 6 * 8)
    with FlopCounterMode(display=False) as counter:
        out = ops.subspace_cross_attention(q, w, backend="reference")
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(2, 3, 4),), ValueError, "batch, tokens, heads, head_dim"),
        ((torch.zeros(2, 3, 4, 5, dtype=torch.int64),), TypeError, "must be a float16"),
        ((torch.zeros(2, 3, 4, 5).to(torch.float8_e4m3fn),), TypeError, "got torch.float8"),
        ((torch.zeros(2, 3, 4, 0),), ValueError, "head_dim"),
        ((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)), ValueError, "differ"),
        ((torch.zeros(1, 2, 3, 4), torch.zeros(1, 0, 3, 4)), ValueError, "at least one key"),
        ((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4).double()), TypeError, "one dtype"),
    ],
)
def test_bad_input(arguments, error, words):
    call = ops.subspace_self_attention if len(arguments) == 1 else ops.subspace_cross_attention
    with pytest.raises(error, match=words):
        call(*arguments)


def test_backend_choice():
    w = torch.randn(1, 3, 1, 2)
    with pytest.raises(ValueError, match="choose from auto, reference, torch, cpp, triton, cuda"):
        ops.subspace_self_attention(w, backend="fast")
    head = (torch.ones(1, 4, 2), torch.ones(1, 3, 2), torch.ones(3), torch.zeros(3), (2, 2))
    elsewhere = [t.to("meta") for t in head[:-1]]
    with pytest.raises(backends.BackendUnavailable, match="cpp.*mask_logits.*Available: auto, reference"):
        ops.mask_logits(*elsewhere, head[-1], backend="cpp")
    with backends.use_backend("cpp"), pytest.raises(backends.BackendUnavailable):
        ops.mask_logits(*elsewhere, head[-1])
    with backends.use_backend("cpp"):  # an explicit argument wins over the context
        ops.mask_logits(*elsewhere, head[-1], backend="torch")
    ops.mask_logits(*head)  # and the context is gone


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradients_have_the_strides_that_the_fake_kernels_name(backend):
    """Code that inductor made stops where they were wrong."""
    w, q = torch.randn(2, 5, 3, 20), torch.randn(2, 4, 3, 20)
    ours = lambda w: ops.subspace_self_attention(2 * w, backend=backend).square()
    crossed = lambda q, w: ops.subspace_cross_attention(2 * q, 2 * w, backend=backend).square()
    for f, inputs in ((ours, [w]), (crossed, [q, w])):
        compiled = torch.compile(f, fullgraph=True)
        torch.testing.assert_close(value_and_gradients(compiled, inputs), value_and_gradients(f, inputs))


def test_use_backend_is_seen_by_compiled_code():
    w = torch.randn(1, 3, 1, 2, requires_grad=True)
    compiled = torch.compile(lambda w: ops.subspace_self_attention(w), fullgraph=True, backend="eager")
    assert "depict_kernels" not in type(compiled(w).grad_fn).__name__
    with backends.use_backend("reference"):
        assert "depict_kernels" in type(compiled(w).grad_fn).__name__


def test_what_is_no_tensor_is_named():
    w = torch.zeros(1, 2, 1, 4)
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        ops.subspace_cross_attention(w.tolist(), w)
    with pytest.raises(TypeError, match="weight must be a tensor, got float"):
        ops.mask_logits(w[:, :, 0], w[:, :, 0], 1.0, torch.zeros(2), (1, 2))

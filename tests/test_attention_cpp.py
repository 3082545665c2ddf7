"""The C++ attention kernels against float64, on every instruction set."""

import pytest
import torch
from attention_checks import check_large_scores
from cpp_problems import needs_extension

from depict_kernels import backends, ops
from depict_kernels.ops.compiled import attention as kernels
from depict_kernels.testing import check_against_float64, value_and_gradients

pytestmark = [needs_extension, pytest.mark.usefixtures("poisoned_memory")]

# (B, N, M, H, d): one token, one more and one less than a block, several blocks, odd and the paper's widths
SHAPES = [
    (2, 7, 5, 2, 100),
    (1, 1, 1, 1, 16),
    (1, 65, 63, 1, 50),
    (2, 130, 19, 3, 5),
    (1, 128, 64, 1, 128),
    (1, 20, 150, 1, 249),
    (1, 346, 96, 2, 33),
]


def ids(shape):
    return "x".join(map(str, shape))


def tensors(shape, dtype=torch.float32):
    torch.manual_seed(0)
    batch, n, m, heads, dim = shape
    return torch.randn(batch, m, heads, dim, dtype=dtype), torch.randn(batch, n, heads, dim, dtype=dtype)


def run_self(w, scale=None, backend="cpp"):
    return ops.subspace_self_attention(w, scale, backend=backend)


def run_cross(q, w, scale=None, backend="cpp"):
    return ops.subspace_cross_attention(q, w, scale, backend=backend)


def check_self(w, scale=None, factor=2):
    check_against_float64(
        lambda w: run_self(w, scale), lambda w: run_self(w, scale, "torch"), [w], factor=factor
    )


def check_cross(q, w, scale=None, factor=2):
    check_against_float64(
        lambda q, w: run_cross(q, w, scale),
        lambda q, w: run_cross(q, w, scale, "torch"),
        [q, w],
        factor=factor,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_against_float64(shape, instruction_set):
    q, w = tensors(shape)
    check_self(w)
    check_cross(q, w)


@pytest.mark.parametrize("shape", [(2, 7, 5, 2, 100), (1, 130, 65, 2, 9)], ids=ids)
def test_float64(shape, instruction_set):
    q, w = tensors(shape, torch.float64)
    w = w * torch.linspace(0.2, 2, w.shape[1])[None, :, None, None]
    for run, inputs in ((run_self, [w]), (run_cross, [q, w])):
        expected = value_and_gradients(lambda *t: run(*t, backend="reference"), inputs)
        torch.testing.assert_close(value_and_gradients(run, inputs), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dim", [100, 50])
def test_tokens_of_the_decoder(dim, instruction_set):
    """N = 1024 + 150 tokens, as at 512 x 512 pixels."""
    q, w = tensors((1, 1174, 150, 2, dim))
    check_self(w)
    check_cross(q, w)


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_any_scale(scale, instruction_set):
    q, w = tensors((1, 137, 6, 2, 12))
    check_self(w, scale)
    check_cross(q, w, scale)


def with_halves(halves, dim, scale):
    """Tokens with scale |w|^2 / 2 as given, in random directions."""
    w = torch.nn.functional.normalize(torch.randn(1, len(halves), 1, dim, dtype=torch.float64), dim=-1)
    return (w * (2 * halves / abs(scale)).sqrt()[:, None, None]).float()


# The 24 that pairs of tokens may lie apart, and beyond.
@pytest.mark.parametrize("spread", [10, 23, 25, 60, 150, 400])
@pytest.mark.parametrize("least", [0.0, 50.0, 9e4])
def test_norms_that_lie_apart(spread, least, instruction_set):
    """In one of three heads, whose rows are computed one by one then; the other heads do not know."""
    torch.manual_seed(0)
    w = 0.5 * torch.randn(1, 130, 3, 20)
    w[:, :, 1:2] = with_halves(least + spread * torch.rand(130, dtype=torch.float64), 20, 1.0)
    truth = run_self(w.double(), 1.0, "torch")
    # the scores' rounding, whose error is a weight's relative one, times what the weight multiplies
    budget = 4e-7 * (least + spread + 10) * w.norm(dim=-1).amax((0, 1))
    assert ((run_self(w, 1.0) - truth).abs().amax((0, 1, 3)) < budget).all()
    others = w[:, :, ::2].contiguous()
    torch.testing.assert_close(run_self(w, 1.0)[:, :, ::2], run_self(others, 1.0), rtol=0, atol=0)
    if least + spread < 300:
        check_self(w, 1.0, factor=4)  # scores of hundreds, summed in two orders


@pytest.mark.parametrize("half", [40.0, 1e3, 1e6, 1e10])
@pytest.mark.parametrize("sign", [1, -1])
def test_norms_that_are_equal(half, sign, instruction_set):
    """Long tokens in random directions."""
    torch.manual_seed(0)
    w = with_halves(torch.full((70,), half, dtype=torch.float64), 16, 1.0)
    truth = run_self(w.double(), sign, "torch")
    out, (grad,) = value_and_gradients(lambda w: run_self(w, float(sign)), [w])
    assert ((out - truth).abs() < 1e-6 * min(half, 1e6) * w.abs().max()).all()
    assert grad.isfinite().all() or half > 1e8  # as documented


def test_token_of_zeros_beside_a_long_one(instruction_set):
    w = torch.zeros(1, 70, 1, 8)
    w[0, 3] = 100.0
    check_self(w)
    assert run_self(w)[0, 0].isclose(torch.tensor(100 / 70)).all()


def test_far_apart_scores(instruction_set):
    """Scores of thousands, of both signs: the online softmax's running maximum has to move."""
    q, w = tensors((1, 170, 33, 1, 16))
    check_cross(20 * q, w * torch.linspace(1, 60, 170)[None, :, None, None], factor=4)


@pytest.mark.parametrize("size", [1e6, 1e8, 1e10, 1e20])
def test_large_scores(size, instruction_set):
    check_large_scores(size, torch.float32, "cpu", "cpp")
    _, w = tensors((1, 70, 1, 2, 16))
    assert run_self(w, size).isfinite().all() and run_self(w, -size).isfinite().all()
    # every token attends to the one that is longest along it, mostly itself
    truth = run_self(w.double(), size, "torch")
    assert (run_self(w, size) - truth).abs().max() < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_head(value, instruction_set):
    q, w = tensors((2, 70, 9, 2, 16))
    for run, inputs in ((run_self, [w]), (run_cross, [q, w])):
        clean = value_and_gradients(run, inputs)
        damaged = w.clone()
        damaged[1, 69, 1, 3] = value
        out, grads = value_and_gradients(run, [*inputs[:-1], damaged])
        for actual, before in zip((out, *grads), (clean[0], *clean[1])):
            assert actual[1, :, 1].isnan().any()
            actual, before = actual.clone(), before.clone()
            actual[1, :, 1] = before[1, :, 1] = 0
            torch.testing.assert_close(actual, before, rtol=0, atol=0)


def test_one_weight_of_one(instruction_set):
    """Where a token attends to one other alone the output is that one and the scores have no gradient, exactly."""
    q, w = tensors((1, 1, 9, 2, 16))
    grad = torch.randn_like(q)
    out, (grad_q, grad_w) = value_and_gradients(lambda q, w: run_cross(q, w, 10.0), [q, w], grad)
    torch.testing.assert_close(out, w.expand_as(q), rtol=0, atol=0)
    assert grad_q.eq(0).all()
    torch.testing.assert_close(grad_w, grad.sum(1, keepdim=True))
    out, (grad_w,) = value_and_gradients(lambda w: run_self(w, 10.0), [w], grad[:, :1])
    torch.testing.assert_close((out, grad_w), (w, grad[:, :1]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_stock(dtype):
    q, w = tensors((1, 65, 9, 3, 50))
    check_self(w.to(dtype))
    check_cross(q.to(dtype), w.to(dtype))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "column", "offset"])
def test_strides(layout):
    base = torch.randn(2, 3, 80, 16)
    w = {
        "transposed": base.transpose(1, 2),  # (2, 80, 3, 16), heads outermost
        "expanded": base[:1].transpose(1, 2).expand(2, -1, -1, -1),
        "column": base.transpose(1, 2)[..., ::2],  # last dimension strided
        "offset": torch.randn(2, 80, 3, 19)[..., 3:],
    }[layout]
    grad = (
        torch.randn_like(w, memory_format=torch.contiguous_format)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
    )
    for run, inputs in ((run_self, [w]), (run_cross, [w[:, 5:9], w])):
        upstream = grad if len(inputs) == 1 else grad[:, :4]
        expected = value_and_gradients(run, [t.contiguous() for t in inputs], upstream.contiguous())
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = run(*leaves)
        actual = (out.detach(), torch.autograd.grad(out, leaves, upstream))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 300, 90, 3, 20), (40, 130, 70, 1, 128)], ids=ids)
def test_bitwise_the_same_for_any_number_of_threads(shape, threads):
    """And for any batch, also where 40 heads are more than a group of 16 MiB holds."""
    q, w = tensors(shape)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append([value_and_gradients(run_self, [w]), value_and_gradients(run_cross, [q, w])])
    torch.testing.assert_close(results[1:], results[:-1], rtol=0, atol=0)
    torch.testing.assert_close(run_self(w[-1:]), results[0][0][0][-1:], rtol=0, atol=0)


def test_nothing_to_do():
    for shape in [(0, 5, 3, 4), (2, 0, 3, 4)]:
        out, (grad,) = value_and_gradients(run_self, [torch.randn(shape)])
        assert out.shape == grad.shape == shape
    out, (grad_q, grad_w) = value_and_gradients(run_cross, [torch.randn(2, 0, 3, 4), torch.randn(2, 5, 3, 4)])
    assert out.shape == grad_q.shape and grad_w.eq(0).all()
    out, (grad_q, grad_w) = value_and_gradients(run_cross, [torch.randn(0, 2, 3, 4), torch.randn(0, 5, 3, 4)])
    assert grad_w.shape == (0, 5, 3, 4)


def test_backward_saves_only_input_output_and_lse():
    _, w = tensors((1, 9, 1, 1, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run_self(w.requires_grad_())
    assert sorted(tuple(t.shape) for t in saved) == [(1, 1, 9), (1, 9, 1, 16), (1, 9, 1, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    q, w = (t.to(dtype).requires_grad_() for t in tensors((2, 5, 3, 2, 4)))
    library = torch.ops.depict_kernels
    torch.library.opcheck(library.subspace_self_attention.default, (w, 0.5, "cpp"))
    torch.library.opcheck(library.subspace_cross_attention.default, (q, w, 0.5, "cpp"))


def test_auto_takes_it_for_many_tokens_in_float32(monkeypatch):
    calls = []
    forward = kernels.self_attention_forward
    monkeypatch.setattr(kernels, "self_attention_forward", lambda *a: calls.append(a) or forward(*a))
    for tokens, dim, dtype, expected in (
        (513, 100, torch.float32, 1),
        (513, 50, torch.float32, 0),
        (512, 100, torch.float32, 0),
        (513, 64, torch.float32, 0),
        (513, 100, torch.float64, 0),
        (513, 100, torch.bfloat16, 0),
    ):
        calls.clear()
        ops.subspace_self_attention(torch.randn(1, tokens, 1, dim, dtype=dtype))
        assert len(calls) == expected, (tokens, dim, dtype)


def test_a_new_number_of_tokens_compiles_nothing_anew():
    compiled = torch.compile(ops.subspace_self_attention, fullgraph=True, backend="eager", dynamic=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for tokens in (600, 700, 800):
        w = torch.randn(1, tokens, 1, 100)
        torch.testing.assert_close(compiled(w), ops.subspace_self_attention(w), rtol=0, atol=0)
    assert counter["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_stock_attention(strict):
    class Core(torch.nn.Module):
        def forward(self, w):
            return ops.subspace_self_attention(w)

    tokens = torch.export.Dim("n", min=2, max=4096)
    w = torch.randn(1, 600, 1, 100)
    program = torch.export.export(Core(), (w,), dynamic_shapes=({1: tokens},), strict=strict)
    for n in (3, 700):
        other = torch.randn(1, n, 1, 100)
        torch.testing.assert_close(program.module()(other), ops.subspace_self_attention(other))
    # Nor does a program for one size hold what only this package knows.
    program = torch.export.export(Core(), (w,), strict=strict)
    assert not any("depict_kernels" in str(node.target) for node in program.graph.nodes)


def test_bad_arguments_of_the_private_operators():
    library = torch.ops.depict_kernels_cpu
    w = torch.zeros(1, 5, 2, 4)
    lse = torch.zeros(1, 2, 5)
    for out, log, words in (
        (torch.zeros(1, 4, 2, 4), lse, "out must be"),
        (w.double(), lse, "out must be"),
        (w.clone(), torch.zeros(1, 2, 4), "lse must be"),
    ):
        with pytest.raises(RuntimeError, match=words):
            library.attention_forward(None, w, out, log, 1.0)
    with pytest.raises(RuntimeError, match="w must be float32 or float64"):
        library.attention_forward(None, w.half(), w.half(), lse, 1.0)
    with pytest.raises(RuntimeError, match="q must be"):
        library.attention_forward(torch.zeros(1, 5, 3, 4), w, w.clone(), lse, 1.0)


def test_use_backend():
    w = torch.randn(1, 5, 1, 4)
    with backends.use_backend("cpp"):
        torch.testing.assert_close(ops.subspace_self_attention(w), run_self(w), rtol=0, atol=0)

"""The mask head: values and all four gradients, zero vectors, layouts, compile, errors."""

import pytest
import torch

from depict_kernels import backends, ops
from depict_kernels.testing import assert_within_budget, check_against_float64, value_and_gradients

BACKENDS = ["reference", "torch"]
# B, C, grid, D
CASES = [(2, 19, (3, 5), 48), (1, 150, (4, 4), 192), (2, 1, (2, 2), 7), (1, 151, (1, 1), 33)]


def make(batch, classes, grid, dim, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    shapes = [(batch, grid[0] * grid[1], dim), (batch, classes, dim), (classes,), (classes,)]
    return [torch.randn(s).to(dtype).to(device) for s in shapes]


def naive(patches, classes, weight, bias, grid, eps):
    x = patches / patches.norm(dim=-1, keepdim=True)
    q = classes / classes.norm(dim=-1, keepdim=True)
    m = torch.einsum("bnd,bcd->bnc", x, q)
    m = (m - m.mean(-1, keepdim=True)) / (m.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return (m * weight + bias).transpose(1, 2).reshape(patches.shape[0], -1, *grid)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(backend, case, device):
    inputs = make(*case, device=device)
    check_against_float64(
        lambda *t: ops.mask_logits(*t, case[2], backend=backend),
        lambda *t: naive(*t, case[2], 1e-5),
        inputs,
        factor=3,
        ulps=32 if case[1] == 1 else 4,  # one class: the gradient cancels to 0 at a scale of eps ** -0.5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = [t.requires_grad_() for t in make(2, 4, (2, 3), 5, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: ops.mask_logits(*t, (2, 3), backend=backend), inputs)


@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_stock_operators_can_be_differentiated_again(run):
    inputs = [t.requires_grad_() for t in make(1, 3, (1, 2), 4, torch.float64)]
    call = lambda *t: ops.mask_logits(*t, (1, 2), backend="torch")
    if run == "eager":
        assert torch.autograd.gradgradcheck(call, inputs)
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    else:
        compiled = torch.compile(call, fullgraph=True)
        torch.testing.assert_close(value_and_gradients(compiled, inputs), value_and_gradients(call, inputs))


def test_stock_backward_divides_the_patches_no_more_than_once():
    """Dividing patches by their norms took three passes over them more in backward than multiplying does."""
    inputs = [t.requires_grad_() for t in make(1, 5, (4, 4), 64)]
    out = ops.mask_logits(*inputs, (4, 4), backend="torch")
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(out.sum(), inputs)
    shapes = lambda name: [e.input_shapes[0] for e in profile.events() if e.name == name and e.input_shapes]
    # One is in the gradient of vector_norm itself.
    assert shapes("aten::div").count([1, 16, 64]) <= 1 and [1, 16, 64] not in shapes("aten::neg")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_zero_vectors_give_zeros_not_nan(backend, dtype):
    patches, classes, weight, bias = make(1, 4, (1, 3), 8, dtype)
    patches[0, 1] = 0
    out, grads = value_and_gradients(
        lambda *t: ops.mask_logits(*t, (1, 3), backend=backend), [patches, classes, weight, bias]
    )
    torch.testing.assert_close(out[0, :, 0, 1], bias)  # zero cosines: LayerNorm gives its bias
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0, 1].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend, dtype):
    inputs = make(2, 19, (3, 3), 64, dtype)
    check_against_float64(
        lambda *t: ops.mask_logits(*t, (3, 3), backend=backend),
        lambda *t: ops.mask_logits(*t, (3, 3), backend="torch"),
        inputs,
    )


def check_a_single_column(classes, dtype, device, backend):
    """A unit vector is 1 or -1 whatever its length: the gradients of patches and classes cancel to 0."""
    inputs = make(2, classes, (3, 5), 1, dtype, device)
    # What cancels is as large as 1 / |vector|, and rounded as float32 whatever the dtype; a class sums 15 of them.
    shortest = min(t.abs().min().item() for t in inputs[:2])
    scale = 15**0.5 * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps / shortest
    check_against_float64(
        lambda *t: ops.mask_logits(*t, (3, 5), backend=backend),
        lambda *t: ops.mask_logits(*t, (3, 5), backend="torch"),
        inputs,
        factor=3 if dtype == torch.float32 else 2,
        gradient_scale=scale,
    )


@pytest.mark.parametrize("classes", [19, 151, 300])
def test_a_single_column(classes, kernels):
    check_a_single_column(classes, kernels.dtype, kernels.device, kernels.backend)


@pytest.mark.parametrize("classes", [19, 300])
def test_a_single_column_in_float16(classes, kernels32):
    """In Triton's interpreter too, which the other test runs in float32."""
    check_a_single_column(classes, torch.float16, kernels32.device, kernels32.backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_column_without_a_kernel(backend, dtype, device):
    check_a_single_column(19, dtype, device, backend)


@pytest.mark.parametrize(
    ("classes", "side", "other"),
    [
        (19, "patches", 2**9),
        (19, "patches", 2**-14),
        (19, "classes", 2**9),
        (19, "classes", 2**-14),
        (300, "patches", 2**9),
    ],
)
def test_upstream_gradients_of_any_size_in_float16(classes, side, other, kernels32):
    """In every image as exact as the gradient's dtype allows, whatever the upstream gradient's size.

    ``side`` is as short or long as the upstream gradient is small or large, so that its own gradient has a place in
    float16; against the other side's length the gradient of the products, in between, then lies below or above it.
    """
    sizes, dim, device = (1.0, 1e-4, 0.0, 1e-6, 1e-8, 1e4), 48, kernels32.device
    grid = (5, 15) if classes == 19 else (1, 3)  # two blocks of patches; few, as the interpreter is slow
    inputs = make(len(sizes), classes, grid, dim, device=device)
    size = torch.tensor(sizes, device=device)[:, None, None]
    length = size.clamp(2**-14, 2**9)
    lengths = (length, other) if side == "patches" else (other, length)
    inputs[:2] = [(t * length).half() for t, length in zip(inputs, lengths)]
    upstream = torch.randn(len(sizes), classes, *grid).to(device) * size[..., None]
    run = lambda backend, tensors: value_and_gradients(
        lambda *t: ops.mask_logits(*t, grid, backend=backend), tensors, upstream
    )[1]
    truth = run("reference", [t.double() for t in inputs])
    grads = run(kernels32.backend, inputs)
    for name, g, t in zip(("patches", "classes"), grads, truth):
        for image, size in enumerate(sizes):
            rounded = t[image].half()  # no float16 result is better
            if name == side:
                assert rounded.isfinite().all() and (size == 0 or rounded.abs().max() > 2**-14)
            assert_within_budget(g[image], rounded, t[image], what=f"{name}, upstream of {size}")
    peer = run("torch", [t.float() for t in inputs])
    for name, g, p, t in zip(("weight", "bias"), grads[2:], peer[2:], truth[2:]):
        assert_within_budget(g, p, t, factor=3, what=name)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_upstream_gradient_in_float16(bad, kernels32):
    """Its patch and its image's classes are lost, and nothing else."""
    grid, device = (5, 15), kernels32.device
    patches, classes, *affine = make(2, 19, grid, 48, device=device)
    inputs = [patches.half(), classes.half(), *affine]
    upstream = 1e-3 * torch.randn(2, 19, *grid).to(device)
    upstream[0, 3, 4, 2] = bad
    run = lambda backend, tensors: value_and_gradients(
        lambda *t: ops.mask_logits(*t, grid, backend=backend), tensors, upstream
    )[1]
    truth = run("reference", [t.double() for t in inputs])
    grads = run(kernels32.backend, inputs)
    lost = torch.zeros(2, 75, dtype=torch.bool, device=device)
    lost[0, 4 * 15 + 2] = True
    assert torch.equal(grads[0].isfinite(), ~lost[..., None].expand_as(grads[0]))
    assert not grads[1][0].isfinite().any()
    for g, t in ((grads[0][~lost], truth[0][~lost]), (grads[1][1], truth[1][1])):
        assert_within_budget(g, t.to(g.dtype), t)


def test_logits_take_the_parameters_dtype():
    patches, classes, weight, bias = make(1, 4, (1, 2), 8)
    for backend in BACKENDS:
        out = ops.mask_logits(patches.bfloat16(), classes.bfloat16(), weight, bias, (1, 2), backend=backend)
        assert out.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.mask_logits(patches, classes, weight, bias, (1, 2), backend=backend)
        assert out.dtype == torch.float32


@pytest.mark.parametrize("run", ["eager", "compiled"])
@pytest.mark.parametrize("parameters", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_auto_takes_no_kernel_that_refuses_a_dtype(dtype, parameters, run, kernels32, monkeypatch):
    """What stock torch computes, ``auto`` computes, whatever the table prefers."""
    device = kernels32.device
    monkeypatch.setattr(backends, "_candidates", lambda *_: ((kernels32.backend,), False))
    torch.compiler.reset()
    patches, classes, weight, bias = make(1, 4, (1, 3), 8, dtype, device)
    inputs = [patches, classes, weight.to(parameters), bias.to(parameters)]
    call = lambda *t: ops.mask_logits(*t, (1, 3))
    if run == "compiled":
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours = value_and_gradients(call, inputs)
    kernel = torch.float64 not in (dtype, parameters)
    if kernels32.interpreted:  # Triton's interpreter gets bfloat16 products wrong
        kernel = kernel and parameters != torch.bfloat16
    with backends.use_backend("auto" if kernel else "torch"):
        expected = value_and_gradients(lambda *t: ops.mask_logits(*t, (1, 3)), inputs)
    torch.testing.assert_close(ours, expected)
    stock = value_and_gradients(lambda *t: ops.mask_logits(*t, (1, 3), backend="torch"), inputs)
    assert ours[0].dtype == stock[0].dtype == parameters
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)  # a bfloat16 logit's ulp is 2**-8
    sizes = {"classes": 4, "width": 8, "patches": 3}
    chosen = backends.choose("auto", "mask_logits", patches, parameter_dtype=parameters, **sizes)
    assert chosen == (kernels32.backend if kernel else "torch")
    torch.compiler.reset()


def test_strided_slices_of_one_tensor():
    """What DEPICT-SA passes: both arguments are views of the token sequence."""
    tokens = torch.randn(2, 10, 8)
    _, _, weight, bias = make(1, 4, (2, 3), 8)
    for backend in BACKENDS:
        views = ops.mask_logits(tokens[:, :6], tokens[:, 6:], weight, bias, (2, 3), backend=backend)
        copies = ops.mask_logits(
            tokens[:, :6].clone(), tokens[:, 6:].clone(), weight, bias, (2, 3), backend=backend
        )
        torch.testing.assert_close(views, copies)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    inputs = make(0, 3, (2, 2), 4)
    out, grads = value_and_gradients(lambda *t: ops.mask_logits(*t, (2, 2), backend=backend), inputs)
    assert out.shape == (0, 3, 2, 2)
    assert all(g.shape == t.shape and g.eq(0).all() for g, t in zip(grads, inputs))


def test_opcheck():
    inputs = [t.requires_grad_() for t in make(2, 4, (2, 3), 5)]
    torch.library.opcheck(torch.ops.depict_kernels.mask_logits.default, (*inputs, (2, 3), 1e-5, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend):
    f = lambda *t: ops.mask_logits(*t, (2, 3), backend=backend)
    inputs = make(2, 4, (2, 3), 5)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, inputs), value_and_gradients(f, inputs))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(1, 5, 8)}, "grid"),
        ({0: torch.zeros(1, 6, 9)}, "width"),
        ({1: torch.zeros(2, 4, 8)}, "do not fit"),
        ({2: torch.zeros(3)}, r"must be \(4,\)"),
        ({3: torch.zeros(4).double()}, "one dtype"),
        ({1: torch.zeros(1, 4, 8).half()}, "one dtype"),
        ({4: (2.0, 3)}, r"grid\[0\] must be an integer, got 2.0"),
        ({4: (-2, -3)}, r"grid must not be negative, got \(-2, -3\)"),
        ({4: (6,)}, r"grid must be two integers \(height, width\), got \(6,\)"),
    ],
)
def test_bad_input(change, words):
    arguments = [*make(1, 4, (2, 3), 8), (2, 3)]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises((ValueError, TypeError), match=words):
        ops.mask_logits(*arguments)

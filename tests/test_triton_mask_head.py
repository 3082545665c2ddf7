"""The Triton mask head: in the interpreter on the CPU, compiled on a GPU."""

import pytest
import torch

from depict_kernels import backends, ops
from depict_kernels.testing import check_against_float64, value_and_gradients

pytest.importorskip("triton")

# B, C, grid, D: chunks of classes, odd sizes, one class, one patch, two blocks of patches; C > 256 goes in two passes
CASES = [
    (2, 19, (3, 5), 48),
    (1, 150, (5, 9), 96),
    (2, 1, (2, 2), 7),
    (1, 151, (1, 1), 33),
    (1, 256, (2, 3), 16),
    (2, 300, (5, 7), 20),
    (1, 257, (1, 2), 130),
    (1, 20, (9, 9), 272),  # several steps along the width
]


def make(batch, classes, grid, dim, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    shapes = [(batch, grid[0] * grid[1], dim), (batch, classes, dim), (classes,), (classes,)]
    return [torch.randn(s).to(device, dtype) for s in shapes]


def check(inputs, grid, **options):
    check_against_float64(
        lambda *t: ops.mask_logits(*t, grid, backend="triton"),
        lambda *t: ops.mask_logits(*t, grid, backend="torch"),
        inputs,
        **options,
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, triton_device, triton_dtype):
    # one class: the gradient cancels to 0 at a scale of eps ** -0.5
    inputs = make(*case, triton_dtype, triton_device)
    check(inputs, case[2], factor=3 if triton_dtype == torch.float32 else 2, ulps=32 if case[1] == 1 else 4)


@pytest.mark.parametrize("parameters", [torch.float16, torch.float32], ids=str)
def test_float16_in_the_interpreter(parameters, triton_device):
    patches, classes, weight, bias = make(2, 19, (3, 7), 64, torch.float16, triton_device)
    check([patches, classes, weight.to(parameters), bias.to(parameters)], (3, 7))


def test_float32_parameters(triton_device, triton_dtype):
    """As under autocast: patches and classes in 16 bit, LayerNorm's parameters and the logits in float32."""
    patches, classes, weight, bias = make(2, 19, (3, 7), 64, triton_dtype, triton_device)
    check(
        [patches, classes, weight.float(), bias.float()],
        (3, 7),
        factor=3 if triton_dtype == torch.float32 else 2,
    )


@pytest.mark.parametrize("classes", [4, 300])
def test_zero_vectors_give_zeros_not_nan(classes, triton_device, triton_dtype):
    patches, queries, weight, bias = make(1, classes, (1, 3), 8, triton_dtype, triton_device)
    patches[0, 1] = 0
    queries[0, 2] = 0
    out, grads = value_and_gradients(
        lambda *t: ops.mask_logits(*t, (1, 3), backend="triton"), [patches, queries, weight, bias]
    )
    torch.testing.assert_close(out[0, :, 0, 1], bias)  # zero cosines: LayerNorm gives its bias
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0, 1].eq(0).all()
    assert grads[1][0, 2].eq(0).all()


def test_strides(triton_device, triton_dtype):
    """Views of one token sequence, as DEPICT-SA passes them, and what a kernel cannot walk."""
    options = {"device": triton_device, "dtype": triton_dtype}
    tokens = torch.randn(2, 10, 16, **options)
    weight, bias = torch.randn(4, **options), torch.randn(2, 4, **options)[:, 1::2][0]
    bias = torch.cat([bias, bias])[::1]
    weight = torch.stack([weight, weight], 1)[:, 0]
    run = lambda *t: ops.mask_logits(*t, (2, 3), backend="triton")
    for x, q in [(tokens[:, :6], tokens[:, 6:]), (tokens[:, :6, ::2], tokens[:, 6:, ::2])]:
        views = [t.detach().requires_grad_() for t in (x, q, weight, bias)]
        out = run(*views)
        upstream = torch.randn(3, 2, 2, 4, **options).permute(1, 3, 2, 0)  # (2, 4, 2, 3), not contiguous
        grads = torch.autograd.grad(out, views, upstream)
        expected = value_and_gradients(run, [t.contiguous() for t in views], upstream.contiguous())
        torch.testing.assert_close((out.detach(), grads), expected, rtol=0, atol=0)


def test_one_tensor_as_patches_and_classes(triton_device, triton_dtype):
    patches, _, weight, bias = make(2, 6, (2, 3), 20, triton_dtype, triton_device)
    one = patches.clone().requires_grad_()
    out = ops.mask_logits(one, one, weight, bias, (2, 3), backend="triton")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (grad,) = torch.autograd.grad(out, one, upstream)
    expected, grads = value_and_gradients(
        lambda *t: ops.mask_logits(*t, weight, bias, (2, 3), backend="triton"), [patches, patches], upstream
    )
    torch.testing.assert_close((out.detach(), grad), (expected, grads[0] + grads[1]), rtol=0, atol=0)


@pytest.mark.usefixtures("poisoned_memory")
def test_empty_batch(triton_device, triton_dtype):
    inputs = make(0, 3, (2, 2), 4, triton_dtype, triton_device)
    out, grads = value_and_gradients(lambda *t: ops.mask_logits(*t, (2, 2), backend="triton"), inputs)
    assert out.shape == (0, 3, 2, 2)
    assert all(g.shape == t.shape and g.eq(0).all() for g, t in zip(grads, inputs))


def test_repeats_are_bitwise_equal(triton_device, triton_dtype):
    inputs = make(2, 19, (5, 9), 40, triton_dtype, triton_device)
    run = lambda *t: ops.mask_logits(*t, (5, 9), backend="triton")
    torch.testing.assert_close(
        value_and_gradients(run, inputs), value_and_gradients(run, inputs), rtol=0, atol=0
    )


def test_kernels_are_launched(triton_launches, triton_device):
    """An alias of the reference would pass every other test."""
    value_and_gradients(
        lambda *t: ops.mask_logits(*t, (2, 3), backend="triton"), make(1, 4, (2, 3), 8, device=triton_device)
    )
    assert triton_launches == ["mask_forward", "mask_backward", "mask_product", "mask_product"]


def test_opcheck_and_compile(triton_device, triton_dtype):
    inputs = [t.requires_grad_() for t in make(2, 4, (2, 3), 5, triton_dtype, triton_device)]
    torch.library.opcheck(torch.ops.depict_kernels.mask_logits.default, (*inputs, (2, 3), 1e-5, "triton"))
    f = lambda *t: ops.mask_logits(*t, (2, 3), backend="triton")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, inputs), value_and_gradients(f, inputs))


def test_float64_is_refused(triton_device):
    with pytest.raises(backends.BackendUnavailable, match="float64 is not supported"):
        ops.mask_logits(*make(1, 4, (2, 3), 8, torch.float64, triton_device), (2, 3), backend="triton")

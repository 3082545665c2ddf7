"""The CUDA mask head: in the emulator on the CPU, on a GPU where there is one."""

import pytest
import torch

from depict_kernels import backends, ops
from depict_kernels.ops.cuda_kernels import _library, mask_head
from depict_kernels.testing import check_against_float64, value_and_gradients

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# B, C, grid, D: blocks of 64 patches; tiles of 32 classes up to 32, else of 160; copies of 2 to 16 bytes
CASES = [
    (2, 19, (3, 5), 48),
    (1, 1, (1, 7), 1),
    (2, 1, (2, 2), 50),
    (1, 150, (10, 13), 192),
    (1, 150, (1, 1), 384),
    (1, 151, (1, 7), 50),
    (1, 300, (10, 13), 36),
    (1, 33, (13, 5), 3),
]


def make(batch, classes, grid, dim, dtype=F32, device="cpu"):
    torch.manual_seed(0)
    shapes = [(batch, grid[0] * grid[1], dim), (batch, classes, dim), (classes,), (classes,)]
    return [torch.randn(s).to(device, dtype) for s in shapes]


def run(grid):
    return lambda *t: ops.mask_logits(*t, grid, backend="cuda")


def check(inputs, grid, **options):
    stock = lambda *t: ops.mask_logits(*t, grid, backend="torch")
    check_against_float64(run(grid), stock, inputs, **options)


@pytest.fixture
def cuda_calls(monkeypatch, cuda_device) -> list[str]:
    """The compiled operators that were called, in order."""
    library = "depict_kernels_cuda" + ("_emulated" if cuda_device == "cpu" else "")
    names: list[str] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == library:
                names.append(func._opname)
            return func(*args, **(kwargs or {}))

    call = _library.call

    def recorded(*arguments, **options):
        with Recorder():
            call(*arguments, **options)

    monkeypatch.setattr(mask_head, "call", recorded)
    return names


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, cuda_device):
    # One class: the gradient cancels to 0 at a scale of eps ** -0.5. The factor is that of the other backends.
    options = {"ulps": 32 if case[1] == 1 else 4, "factor": 3 if dtype == F32 else 2}
    check(make(*case, dtype, cuda_device), case[2], **options)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_many_patches_are_split(dtype, cuda_device):
    """More than 256 patches: the classes' gradient is a sum of parts."""
    grid, (batch, n, c, dim) = (16, 17), (1, 272, 20, 16)
    assert mask_head._splits(batch, n, c, dim) == 2
    check(make(batch, c, grid, dim, dtype, cuda_device), grid, factor=3 if dtype == F32 else 2)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("parameters", [F32, F16], ids=str)
def test_parameters_of_another_dtype(dtype, parameters, cuda_device):
    patches, classes, weight, bias = make(2, 19, (3, 7), 64, dtype, cuda_device)
    inputs = [patches, classes, weight.to(parameters), bias.to(parameters)]
    assert run((3, 7))(*inputs).dtype == parameters
    check(inputs, (3, 7))


def test_tf32_where_torch_allows_it(cuda_device, monkeypatch):
    """Its error is that of 10 bits of mantissa: above float32's, below bfloat16's."""
    inputs = make(1, 19, (3, 7), 64, device=cuda_device)
    truth = ops.mask_logits(*[t.double() for t in inputs], (3, 7), backend="torch")
    error = lambda: (run((3, 7))(*inputs) - truth).abs().max().item()
    assert error() < 1e-5
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert 1e-5 < error() < 4e-2  # 2^-11 on each factor, times 1 / std of about 8
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_small_float16_gradients_keep_their_digits(cuda_device):
    """The gradient of the dot products is 400 times smaller than that of the cosines: too small for float16."""
    grid, dim = (5, 5), 384
    inputs = make(1, 40, grid, dim, F16, cuda_device)
    inputs[2:] = [t.float() for t in inputs[2:]]
    upstream = 1e-4 * torch.randn(1, 40, *grid, dtype=torch.float64).to(cuda_device)
    stock = lambda *t: ops.mask_logits(*t, grid, backend="torch")
    truth = value_and_gradients(stock, [t.double() for t in inputs], upstream.float().double())[1]
    grads = value_and_gradients(run(grid), inputs, upstream)[1]
    for g, t in zip(grads[:2], truth):
        # Rounded once as the gradient of the products and once as the result, whose own subnormals (2^-25) are a
        # loss scaler's business.
        assert (g.double() - t).abs().max() <= 2 * torch.finfo(F16).eps * t.abs().max() + 2**-25


@pytest.mark.parametrize("classes", [4, 300])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_zero_vectors_give_zeros_not_nan(classes, dtype, cuda_device):
    patches, queries, weight, bias = make(1, classes, (1, 3), 8, dtype, cuda_device)
    patches[0, 1] = 0
    queries[0, 2] = 0
    out, grads = value_and_gradients(run((1, 3)), [patches, queries, weight, bias])
    torch.testing.assert_close(out[0, :, 0, 1], bias)  # zero cosines: LayerNorm gives its bias
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0, 1].eq(0).all()
    assert grads[1][0, 2].eq(0).all()


def test_variance_does_not_cancel(cuda_device):
    """Classes that hardly differ: cosines near 1 with a spread of 1e-3."""
    patches, classes, weight, bias = make(1, 40, (2, 3), 64, device=cuda_device)
    classes = patches[:, :1] + 1e-2 * classes
    patches = patches[:, :1] + 1e-2 * patches
    # LayerNorm's 1 / std of up to 316 magnifies the cosines' own rounding.
    check([patches, classes, weight, bias], (2, 3), factor=3, scale=100, gradient_scale=100)


def test_nan_stays_where_it_is(cuda_device):
    """A NaN in one patch: that patch's logits and gradient, and in backward its image's classes."""
    inputs = make(2, 19, (7, 10), 16, device=cuda_device)
    inputs[0][0, 65, 3] = torch.nan
    out, (patches, classes, *_) = value_and_gradients(run((7, 10)), inputs)
    bad = torch.zeros(2, 70, dtype=torch.bool, device=cuda_device)
    bad[0, 65] = True
    assert torch.equal(out.flatten(2).isnan(), bad[:, None].expand(2, 19, 70))
    assert torch.equal(patches.isnan(), bad[..., None].expand_as(patches))
    assert classes[0].isnan().all() and not classes[1].isnan().any()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_strides(dtype, cuda_device):
    """Views of one token sequence, as DEPICT-SA passes them, and what a kernel cannot walk."""
    tokens = torch.randn(2, 10, 16, device=cuda_device).to(dtype)
    weight = torch.randn(4, 2, device=cuda_device)[:, 0]
    bias = torch.randn(8, device=cuda_device)[::2]
    shifted = torch.randn(2, 11, 17, device=cuda_device).to(dtype)[:, 1:, 1:]  # no two bytes aligned alike
    views = [(tokens[:, :6], tokens[:, 6:]), (tokens[:, :6, ::2], tokens[:, 6:, ::2])]
    views += [(shifted[:, :6], shifted[:, 6:]), (tokens[:1, :6].expand(2, -1, -1), tokens[:, 6:])]
    upstream = torch.randn(3, 2, 2, 4, device=cuda_device).permute(1, 3, 2, 0)  # (2, 4, 2, 3)
    for x, q in views:
        leaves = [t.detach().requires_grad_() for t in (x, q, weight, bias)]
        out = run((2, 3))(*leaves)
        grads = torch.autograd.grad(out, leaves, upstream)
        copies = [t.detach().contiguous() for t in leaves]
        expected = value_and_gradients(run((2, 3)), copies, upstream.contiguous())
        torch.testing.assert_close((out.detach(), grads), expected, rtol=0, atol=0)


@pytest.mark.parametrize("parameters", [F32, F16], ids=str)
def test_upstream_gradient_may_start_anywhere(parameters, cuda_device):
    """A contiguous view into a larger buffer: what a concatenation hands back."""
    inputs = make(1, 4, (2, 4), 16, device=cuda_device)
    inputs[2:] = [t.to(parameters) for t in inputs[2:]]
    upstream = torch.randn(33, device=cuda_device).to(parameters)[1:].view(1, 4, 2, 4)
    leaves = [t.requires_grad_() for t in inputs]
    grads = torch.autograd.grad(run((2, 4))(*leaves), leaves, upstream)
    expected = torch.autograd.grad(run((2, 4))(*leaves), leaves, upstream.clone())
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("batch", "grid", "dim"), [(0, (2, 2), 4), (2, (0, 3), 4), (2, (2, 2), 0)])
def test_empty(batch, grid, dim, cuda_device):
    inputs = make(batch, 3, grid, dim, device=cuda_device)
    out, grads = value_and_gradients(run(grid), inputs)
    expected = value_and_gradients(lambda *t: ops.mask_logits(*t, grid, backend="reference"), inputs)
    torch.testing.assert_close((out, grads), expected)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("case", [(2, 19, (5, 14), 40), (1, 170, (5, 14), 24)], ids=str)
def test_repeats_are_bitwise_equal(case, dtype, cuda_device, monkeypatch):
    """On the CPU in four orders of threads and blocks: a missing barrier would show."""
    inputs = make(*case, dtype, cuda_device)
    first = value_and_gradients(run(case[2]), inputs)
    for seed in ("0", "1", "2", "7"):
        monkeypatch.setenv("DEPICT_EMULATE_SEED", seed)
        torch.testing.assert_close(value_and_gradients(run(case[2]), inputs), first, rtol=0, atol=0)


def test_compiled_operators_are_called(cuda_calls, cuda_device):
    """An alias of the reference would pass every other test."""
    value_and_gradients(run((2, 3)), make(1, 4, (2, 3), 8, device=cuda_device))
    assert cuda_calls == ["mask_head_forward", "mask_head_backward"]


def test_opcheck_and_compile(cuda_device):
    inputs = [t.requires_grad_() for t in make(2, 4, (2, 3), 5, device=cuda_device)]
    torch.library.opcheck(torch.ops.depict_kernels.mask_logits.default, (*inputs, (2, 3), 1e-5, "cuda"))
    compiled = torch.compile(run((2, 3)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradients(compiled, inputs), value_and_gradients(run((2, 3)), inputs)
    )


def test_other_dtypes_are_refused(cuda_device):
    inputs = make(1, 4, (2, 3), 8, torch.float64, cuda_device)
    with pytest.raises(backends.BackendUnavailable, match="float64 is not supported"):
        run((2, 3))(*inputs)
    with pytest.raises(backends.BackendUnavailable, match="weight and bias: .*float64 is not supported"):
        run((2, 3))(*[t.float() for t in inputs[:2]], *inputs[2:])

"""The C++ mask head against float64, on every instruction set."""

import warnings

import pytest
import torch
from cpp_problems import needs_extension

from depict_kernels import ops
from depict_kernels.ops.compiled import mask_head as kernels
from depict_kernels.testing import check_against_float64, value_and_gradients

pytestmark = [needs_extension, pytest.mark.usefixtures("poisoned_memory")]

# (B, C, grid, D): one patch and one class, one more and one less than a block of 64, several blocks, odd widths
SHAPES = [
    (1, 1, (1, 1), 1),
    (2, 19, (3, 5), 48),
    (1, 65, (7, 9), 33),
    (2, 63, (5, 13), 129),
    (1, 151, (8, 16), 192),
    (1, 300, (5, 15), 300),
    (3, 2, (1, 130), 7),
]


def ids(shape):
    return "x".join(map(str, shape)).replace(" ", "")


def tensors(shape, dtype=torch.float32):
    torch.manual_seed(0)
    batch, classes, grid, dim = shape
    sizes = (batch, grid[0] * grid[1], dim), (batch, classes, dim), (classes,), (classes,)
    return [torch.randn(size, dtype=dtype) for size in sizes]


def run(grid, backend="cpp"):
    return lambda *inputs: ops.mask_logits(*inputs, grid, backend=backend)


def check(inputs, grid, factor=2, **options):
    check_against_float64(run(grid), run(grid, "torch"), inputs, factor=factor, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_against_float64(shape, instruction_set):
    if shape[1] == 1:  # stock torch's gradient, which should be 0, is its rounding times eps ** -0.5
        inputs = tensors(shape)
        _, grads = value_and_gradients(run(shape[2]), inputs)
        assert all(g.eq(0).all() for g in grads[:3])
        torch.testing.assert_close(run(shape[2])(*inputs), inputs[3].expand(shape[0], -1)[..., None, None])
    elif (
        shape[1] == 2
    ):  # masks of two classes are plus and minus one: gradients that cancel, as in stock torch
        check(tensors(shape), shape[2], factor=4, ulps=32)
    else:
        check(tensors(shape), shape[2])


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_float64(shape, instruction_set):
    inputs = tensors(shape, torch.float64)
    expected = value_and_gradients(run(shape[2], "reference"), inputs)
    torch.testing.assert_close(value_and_gradients(run(shape[2]), inputs), expected, rtol=1e-10, atol=1e-11)


def parallel(shape, spread):
    """Patches and classes in nearly one direction, as trained ones may be."""
    patches, classes, weight, bias = tensors(shape)
    direction = torch.randn(shape[3])
    return [direction + spread * patches, direction + spread * classes, weight, bias]


@pytest.mark.parametrize("spread", [0.3, 0.03])
@pytest.mark.parametrize("shape", [(1, 150, (8, 9), 192), (2, 19, (5, 13), 768)], ids=ids)
def test_parallel_vectors(shape, spread, instruction_set):
    """Nearly equal cosines: what rounding leaves of the gradient along a patch is large against the rest of it."""
    check(parallel(shape, spread), shape[2])


@pytest.mark.parametrize("dim", [1024, 4096])
def test_positive_vectors(dim, instruction_set):
    """Sums of a thousand numbers of one sign."""
    patches, classes, weight, bias = tensors((1, 19, (5, 13), dim))
    check([patches.abs(), classes.abs(), weight, bias], (5, 13))


@pytest.mark.parametrize("width", [192, 1024])
def test_masks_of_the_decoder(width, instruction_set):
    """150 classes at 512 x 512 pixels."""
    check(tensors((1, 150, (32, 32), width)), (32, 32))


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0])
def test_eps(eps, instruction_set):
    inputs = tensors((2, 5, (3, 4), 16))
    check_against_float64(
        lambda *t: ops.mask_logits(*t, (3, 4), eps, backend="cpp"),
        lambda *t: ops.mask_logits(*t, (3, 4), eps, backend="torch"),
        inputs,
        factor=3,
    )


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-12, 1e12, 1e18, 1e30])
def test_vectors_of_any_length(size, instruction_set):
    """Their squares may overflow or vanish in float: the logits do not see lengths, the gradients their inverse."""
    shape = (2, 19, (5, 14), 24)
    patches, classes, weight, bias = tensors(shape)
    expected = run((5, 14))(patches, classes, weight, bias)
    for side in range(2):
        inputs = [patches, classes]
        inputs[side] = inputs[side].clone()
        inputs[side][0, 3] *= size
        inputs[side][1] *= size
        out, grads = value_and_gradients(run((5, 14)), [*inputs, weight, bias])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        truth = value_and_gradients(run((5, 14), "torch"), [t.double() for t in (*inputs, weight, bias)])[1]
        for g, t in zip(grads, truth):
            scale = t.abs().amax(-1, keepdim=True)  # of every vector its own
            assert ((g - t).abs() <= 2e-5 * scale + 1e-38).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_vectors_have_zero_cosines_and_gradients(dtype, instruction_set):
    patches, classes, weight, bias = tensors((2, 7, (3, 3), 8), dtype)
    patches[0, 4] = 0
    classes[1, 6] = 0
    out, grads = value_and_gradients(run((3, 3)), [patches, classes, weight.float(), bias.float()])
    torch.testing.assert_close(out[0, :, 1, 1], bias.float())
    assert grads[0][0, 4].eq(0).all() and grads[1][1, 6].eq(0).all()
    assert all(g.isfinite().all() for g in (out, *grads))


def test_classes_that_are_equal(instruction_set):
    """All cosines of a patch are one number: eps alone holds the variance."""
    patches, classes, weight, bias = tensors((1, 40, (4, 5), 32))
    classes = classes[:, :1].expand(-1, 40, -1)
    out = run((4, 5))(patches, classes, weight, bias)
    # rounding of 2e-7 at most, times eps ** -0.5
    torch.testing.assert_close(out, bias[None, :, None, None].expand_as(out), rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_they_are(value, instruction_set):
    """A patch's in its mask, a class' in its image."""
    grid = (7, 10)
    inputs = tensors((2, 9, grid, 16))
    clean, clean_grads = value_and_gradients(run(grid), inputs)
    damaged = [t.clone() for t in inputs]
    damaged[0][0, 68, 3] = value
    out, grads = value_and_gradients(run(grid), damaged)
    kept = torch.arange(70) != 68
    assert out[0].flatten(1)[:, 68].isnan().all()
    torch.testing.assert_close(out[0].flatten(1)[:, kept], clean[0].flatten(1)[:, kept], rtol=0, atol=0)
    torch.testing.assert_close(out[1], clean[1], rtol=0, atol=0)
    torch.testing.assert_close(grads[0][0, kept], clean_grads[0][0, kept], rtol=0, atol=0)
    torch.testing.assert_close(grads[1][1], clean_grads[1][1], rtol=0, atol=0)
    damaged = [t.clone() for t in inputs]
    damaged[1][1, 2, 0] = value
    out, grads = value_and_gradients(run(grid), damaged)
    assert out[1].isnan().all() and grads[0][1].isnan().all()
    for actual, before in ((out, clean), (grads[0], clean_grads[0]), (grads[1], clean_grads[1])):
        torch.testing.assert_close(actual[0], before[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_half_precision_is_no_worse_than_stock(dtype, parameters):
    patches, classes, weight, bias = tensors((2, 19, (5, 13), 96))
    inputs = [patches.to(dtype), classes.to(dtype), weight.to(parameters), bias.to(parameters)]
    out, grads = value_and_gradients(run((5, 13)), inputs)
    assert [t.dtype for t in (out, *grads)] == [parameters, dtype, dtype, parameters, parameters]
    if parameters != torch.float64:  # in which stock torch computes then; the kernel stays with float32
        check(inputs, (5, 13))


@pytest.mark.parametrize("layout", ["one sequence", "transposed", "expanded", "column", "offset"])
def test_strides(layout):
    grid, dim = (7, 10), 12
    _, _, weight, bias = tensors((2, 9, grid, dim))
    base = torch.randn(2, 79, 2 * dim + 3)
    patches, classes = {
        "one sequence": lambda: (base[:, :70, :dim], base[:, 70:, :dim]),  # what DEPICT-SA passes
        "transposed": lambda: torch.randn(2, dim, 79).mT.split([70, 9], dim=1),
        "expanded": lambda: (base[:1, :70, :dim].expand(2, -1, -1), base[:1, 70:, :dim].expand(2, -1, -1)),
        "column": lambda: (base[:, :70, : 2 * dim : 2], base[:, 70:, : 2 * dim : 2]),
        "offset": lambda: (base[:, :70, 3 : 3 + dim], base[:, 70:, 3 : 3 + dim]),
    }[layout]()
    weight, bias = torch.stack([weight, bias], -1).unbind(-1)
    upstream = torch.randn(2, *grid, 9).permute(0, 3, 1, 2)
    leaves = [t.detach().requires_grad_() for t in (patches, classes, weight, bias)]
    out = run(grid)(*leaves)
    actual = (out.detach(), torch.autograd.grad(out, leaves, upstream))
    copies = [t.detach().clone(memory_format=torch.contiguous_format) for t in leaves]
    expected = value_and_gradients(run(grid), copies, upstream.contiguous())
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 150, (9, 15), 130), (30, 9, (1, 3), 40)], ids=ids)
def test_bitwise_the_same_for_any_number_of_threads(shape, threads):
    """And for any batch but for what is summed over it: how many images are done together is the threads' affair."""
    inputs = tensors(shape)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(value_and_gradients(run(shape[2]), inputs))
    torch.testing.assert_close(results[1:], results[:-1], rtol=0, atol=0)
    upstream = torch.randn(shape[0], shape[1], *shape[2])
    out, grads = value_and_gradients(run(shape[2]), inputs, upstream)
    last = [t[-1:] for t in inputs[:2]] + inputs[2:]
    alone, alone_grads = value_and_gradients(run(shape[2]), last, upstream[-1:])
    torch.testing.assert_close(
        (out[-1:], grads[0][-1:], grads[1][-1:]), (alone, *alone_grads[:2]), rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", [(0, 3, (2, 2), 4), (2, 3, (0, 5), 4), (2, 0, (2, 2), 4)], ids=ids)
def test_nothing_to_do(shape):
    inputs = tensors(shape)
    out, grads = value_and_gradients(run(shape[2]), inputs)
    assert out.shape == (shape[0], shape[1], *shape[2])
    assert all(g.shape == t.shape and g.eq(0).all() for g, t in zip(grads, inputs))


def test_embeddings_of_no_width():
    inputs = tensors((2, 3, (2, 2), 0))
    for backend in ("cpp", "torch"):
        out, grads = value_and_gradients(run((2, 2), backend), inputs)
        assert torch.equal(out, inputs[3][None, :, None, None].expand(2, 3, 2, 2))
        assert grads[2].eq(0).all() and grads[0].shape == (2, 4, 0)


def test_backward_saves_only_inputs_and_statistics():
    inputs = [t.requires_grad_() for t in tensors((2, 5, (2, 3), 8))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run((2, 3))(*inputs)
    assert sorted(tuple(t.shape) for t in saved) == [
        (2, 5),
        (2, 5, 8),
        (2, 6),
        (2, 6),
        (2, 6),
        (2, 6, 8),
        (5,),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    inputs = [t.requires_grad_() for t in tensors((2, 4, (2, 3), 5), dtype)]
    torch.library.opcheck(torch.ops.depict_kernels.mask_logits.default, (*inputs, (2, 3), 1e-5, "cpp"))


def test_auto_takes_it_for_many_patches_in_float32(monkeypatch):
    calls = []
    forward = kernels.mask_logits_forward
    monkeypatch.setattr(kernels, "mask_logits_forward", lambda *a: calls.append(a) or forward(*a))
    for classes, grid, dtype, expected in (
        (19, (7, 143), torch.float32, 1),
        (150, (7, 143), torch.float32, 1),
        (257, (7, 143), torch.float32, 0),
        (19, (10, 100), torch.float32, 0),
        (19, (7, 143), torch.float64, 0),
        (19, (7, 143), torch.bfloat16, 0),
    ):
        calls.clear()
        ops.mask_logits(*tensors((1, classes, grid, 16), dtype), grid)
        assert len(calls) == expected, (classes, grid, dtype)
    calls.clear()
    patches, classes, weight, bias = tensors((1, 19, (7, 143), 16))
    out = ops.mask_logits(patches, classes, weight.double(), bias.double(), (7, 143))
    assert out.dtype == torch.float64 and not calls


def test_exported_compiled_and_traced_programs_hold_stock_operators():
    class Head(torch.nn.Module):
        def forward(self, *inputs):
            return ops.mask_logits(*inputs, (32, 32))

    inputs = tuple(tensors((1, 5, (32, 32), 16)))
    program = torch.export.export(Head(), inputs)
    assert not any("depict_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), run((32, 32))(*inputs))
    graphs = []
    compiled = torch.compile(Head(), fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    torch.testing.assert_close(compiled(*inputs), run((32, 32))(*inputs))
    assert len(graphs) == 1 and "depict_kernels" not in str(graphs[0].graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(Head(), inputs)
    assert "depict_kernels::" not in str(traced.inlined_graph)


def test_bad_arguments_of_the_private_operators():
    library = torch.ops.depict_kernels_cpu
    patches, classes, weight, bias = tensors((1, 3, (1, 5), 4))
    outputs = lambda **changed: {
        "logits": torch.zeros(1, 3, 5),
        "inv_patches": torch.zeros(1, 5),
        "inv_classes": torch.zeros(1, 3),
        "mean": torch.zeros(1, 5),
        "rstd": torch.zeros(1, 5),
    } | changed  # fmt: skip
    call = lambda p=patches[:, :, None], c=classes[:, :, None], w=weight, **changed: (
        library.mask_head_forward(p, c, w, bias, 1e-5, **outputs(**changed))
    )
    call()
    for changed, words in (
        ({"logits": torch.zeros(1, 3, 4)}, "logits must be"),
        ({"mean": torch.zeros(1, 4)}, "mean must be"),
        ({"inv_classes": torch.zeros(1, 3).double()}, "inv_classes must be"),
        ({"w": torch.zeros(4)}, "weight must be"),
        ({"c": torch.zeros(1, 3, 1, 5)}, "classes must be"),
        ({"c": torch.zeros(2, 3, 1, 4)}, "classes must be"),
        ({"p": patches}, "must be .batch, tokens, 1, dim"),
        ({"p": torch.zeros(1, 0, 1, 4)}, "must not be empty"),
        ({"p": torch.zeros(1, 5, 1, 4).half()}, "must be float32 or float64"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call(**changed)

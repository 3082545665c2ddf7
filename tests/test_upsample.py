"""Loss, label map and confusion matrix of upsampled logits: the contract every backend here keeps."""

import itertools

import pytest
import torch
from upsample_checks import naive, upsample

from depict_kernels import UpsampleCrossEntropyLoss, backends, ops
from depict_kernels.ops.stock import upsample as stock
from depict_kernels.testing import check_against_float64, logits_and_target, value_and_gradients

# "classes": what auto takes without kernels, stock operators a few classes at a time
BACKENDS = ["reference", "torch", "classes", "cpp", "cuda"]
# B, C, low, high: scale 4, non-integer, one class, one pixel, downsampling, a line
CASES = [
    (2, 5, (4, 6), (16, 24)),
    (1, 150, (3, 5), (20, 31)),
    (2, 1, (3, 3), (7, 9)),
    (1, 19, (1, 1), (5, 4)),
    (1, 7, (9, 8), (4, 5)),
    (1, 3, (1, 6), (1, 13)),
]


@pytest.fixture
def a_few_classes(monkeypatch):
    """No kernels, and so little memory that even small cases take their classes in several parts."""
    monkeypatch.setattr(backends, "_AUTO_CPU", ())
    monkeypatch.setattr(stock, "CPU_CHUNK", 2500)


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    if request.param == "classes":
        request.getfixturevalue("a_few_classes")
        return "auto"
    reason = backends.why_unavailable(request.param, "upsample_argmax", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_against_float64(backend, case, reduction):
    logits, target = logits_and_target(*case)
    target[0, 0, 0] = 0  # one valid pixel at least
    weight = torch.rand(case[1], generator=torch.Generator().manual_seed(1)) + 0.5
    # A sample's gradient sums p - 1 over the pixels around it; with one class that cancels to nothing.
    pixels = target[0].numel() / logits[0, 0].numel() if case[1] == 1 else 1.0
    for w, smoothing in itertools.product((None, weight), (0.0, 0.1)):
        check_against_float64(
            lambda x: ops.upsample_cross_entropy(x, target, None, w, smoothing, reduction, backend=backend),
            lambda x: naive(x, target, w, smoothing, reduction),
            [logits],
            scale=logits.abs().max().item(),
            gradient_scale=1.0 if reduction == "mean" else pixels,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend, reduction):
    named = "torch" if backend == "auto" else backend
    reason = backends.why_unavailable(named, "upsample_cross_entropy", "cpu", torch.float64)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    logits, target = logits_and_target(2, 4, (2, 3), (5, 7), dtype=torch.float64)
    weight = torch.rand(4, dtype=torch.float64)
    f = lambda x: ops.upsample_cross_entropy(x, target, None, weight, 0.2, reduction, backend=backend)
    assert torch.autograd.gradcheck(f, (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_in_float32(backend, dtype):
    logits, target = logits_and_target(2, 19, (4, 4), (32, 32), dtype=dtype)
    loss, (grad,) = value_and_gradients(
        lambda x: ops.upsample_cross_entropy(x, target, backend=backend), [logits]
    )
    truth, (truth_grad,) = value_and_gradients(lambda x: naive(x, target), [logits.double()])
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss.double(), truth, rtol=4e-7, atol=0)
    torch.testing.assert_close(grad, truth_grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_scaled_half_gradient_does_not_underflow(backend):
    """A loss scaler multiplies after the gradient was formed: kept in float32 until then, nothing is lost."""
    logits, target = logits_and_target(1, 5, (2, 2), (256, 256), dtype=torch.float16)
    _, (grad,) = value_and_gradients(
        lambda x: ops.upsample_cross_entropy(x, target, backend=backend) * 2.0**14, [logits * 0.01]
    )
    _, (truth,) = value_and_gradients(lambda x: naive(x, target) * 2.0**14, [(logits * 0.01).double()])
    torch.testing.assert_close(grad.double(), truth, rtol=2e-3, atol=1e-3 * truth.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero_with_zero_gradient(backend, reduction):
    logits, target = logits_and_target(2, 4, (2, 2), (6, 6), ignored=2.0)
    assert (target == 255).all()
    loss, (grad,) = value_and_gradients(
        lambda x: ops.upsample_cross_entropy(x, target, reduction=reduction, backend=backend), [logits]
    )
    assert loss.eq(0).all() and grad.eq(0).all()


def test_zero_weight_of_all_present_classes_is_zero(backend):
    logits, target = logits_and_target(1, 3, (2, 2), (4, 4))
    target = torch.zeros_like(target)
    loss, (grad,) = value_and_gradients(
        lambda x: ops.upsample_cross_entropy(x, target, weight=torch.tensor([0.0, 1, 1]), backend=backend),
        [logits],
    )
    assert loss == 0 and grad.eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 0.0, -1.0], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"], indirect=True)
def test_unusual_class_weights_count_where_their_class_occurs(backend, value, reduction):
    """As in stock torch: the weight of a class that no pixel has changes nothing without label smoothing."""
    grid = (1, 2) if backend == "triton" else (2, 3)  # the interpreter takes its time for every cell
    logits, target = logits_and_target(1, 4, grid, (8, 12))
    target = target.clamp(max=2)  # no pixel of class 3, ...
    weight = torch.tensor([1.0, 2.0, 0.5, value])
    ours = lambda x: ops.upsample_cross_entropy(x, target, None, weight, 0.0, reduction, backend=backend)
    expected = lambda x: naive(x, target, weight=weight, reduction=reduction)
    check_against_float64(ours, expected, [logits], scale=logits.abs().max().item())
    if value in (0.0, -1.0):
        return
    target[0, 0, 0], target[0, 7, 11] = 3, 255  # ... one of it, and an ignored one
    loss = ours(logits)
    if reduction == "none":
        finite = torch.ones_like(target, dtype=torch.bool)
        finite[0, 0, 0] = False
        assert torch.equal(loss.isfinite(), finite)
        torch.testing.assert_close(loss[finite], expected(logits)[finite])
    else:
        assert not loss.isfinite()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"], indirect=True)
def test_infinite_class_weights_give_the_loss_of_stock_torch(backend, smoothing, value):
    # Not so sharp that a probability rounds to 1: its logarithm, 0, times infinity is NaN.
    cases = itertools.product((1.0, 3.0), ((9, 14), (3, 5)))
    for sharpness, size in (
        [(1.0, (9, 14)), (3.0, (3, 5))] if backend == "triton" else cases
    ):  # the interpreter is slow
        logits, target = logits_and_target(1, 5, (3, 4), size, sharpness=sharpness)
        assert target.eq(2).any() and target.eq(255).any()
        weight = torch.tensor([1.0, 2.0, value, 0.5, 0.0])
        for reduction in ("sum", "mean", "none"):
            expected = naive(logits.double(), target, weight, smoothing, reduction)
            loss = ops.upsample_cross_entropy(
                logits, target, None, weight, smoothing, reduction, backend=backend
            )
            torch.testing.assert_close(loss.double(), expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_target_dtypes_and_strides_agree(backend, dtype):
    logits, target = logits_and_target(2, 5, (3, 4), (9, 11))
    expected = ops.upsample_cross_entropy(logits, target, backend=backend)
    variants = [target.to(dtype), target.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)]
    for t, x in itertools.product(variants, (logits, logits.contiguous(memory_format=torch.channels_last))):
        assert ops.upsample_cross_entropy(x, t, backend=backend) == expected
    confusion = ops.upsample_confusion(logits, variants[1], backend=backend)
    assert torch.equal(confusion, ops.upsample_confusion(logits, target, backend=backend))


def test_ignore_index_defaults_by_the_number_of_classes(backend):
    logits, target = logits_and_target(1, 300, (2, 2), (8, 8), ignored=0)
    target[0, 0, 0] = 255  # a class here, not a hole
    with_255 = ops.upsample_cross_entropy(logits, target, reduction="none", backend=backend)
    assert with_255[0, 0, 0] > 0
    target[0, 0, 0] = -100
    assert ops.upsample_cross_entropy(logits, target, reduction="none", backend=backend)[0, 0, 0] == 0


@pytest.mark.parametrize(("value", "dtype"), [(7, torch.uint8), (-3, torch.int64), (254, torch.uint8)])
def test_bad_label_is_named_with_its_position(backend, value, dtype):
    logits, target = logits_and_target(2, 5, (2, 2), (4, 6), ignored=0)
    target = target.to(dtype)
    target[1, 2, 3] = value
    target[1, 3, 0] = value  # later in memory: the first one is named
    words = rf"target value {value} at \(batch 1, row 2, column 3\)"
    with pytest.raises(ValueError, match=words):
        ops.upsample_cross_entropy(logits, target, backend=backend)
    counts = torch.ones(5, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        ops.upsample_confusion(logits, target, out=counts, backend=backend)
    assert backend == "cuda" or (counts == 1).all()  # in the emulator the others are counted, as on a GPU


def test_unchecked_bad_label_counts_as_ignored(backend):
    logits, target = logits_and_target(1, 5, (2, 2), (4, 6), ignored=0)
    bad, ignored = target.clone(), target.clone()
    bad[0, 1, 1], ignored[0, 1, 1] = 99, 255
    run = lambda t: lambda x: ops.upsample_cross_entropy(x, t, check_targets=False, backend=backend)
    torch.testing.assert_close(
        value_and_gradients(run(bad), [logits]), value_and_gradients(run(ignored), [logits])
    )


def test_nan_logits_give_a_nan_loss(backend):
    for poison in (torch.nan, torch.inf):
        logits, target = logits_and_target(1, 5, (3, 3), (12, 12))
        logits[0, 2, 1, 1] = poison
        assert ops.upsample_cross_entropy(logits, target, backend=backend).isnan()


def test_backward_twice_accumulates(backend):
    logits, target = logits_and_target(1, 5, (3, 3), (12, 12))
    logits.requires_grad_()
    loss = ops.upsample_cross_entropy(logits, target, backend=backend)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


@pytest.mark.parametrize("run", ["eager", "compiled"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logits_may_change_in_place_after_the_loss(backend, reduction, run):
    """As in stock torch, whose upsampling needs their shape alone."""
    logits, target = logits_and_target(1, 5, (3, 3), (12, 12))

    def gradient(change):
        leaf = logits.clone().requires_grad_()
        loss = lambda x: ops.upsample_cross_entropy(x, target, reduction=reduction, backend=backend)
        if run == "compiled":
            torch.compiler.reset()
            loss = torch.compile(loss, backend="aot_eager")
        x = leaf * 1
        value = loss(x)
        if change:
            x.detach().zero_()
        return torch.autograd.grad(value, leaf)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_no_gradient_is_computed_where_none_is_needed():
    logits, target = logits_and_target(1, 5, (3, 3), (12, 12))
    call = torch.ops.depict_kernels.upsample_cross_entropy
    _, grad, _ = call(logits, target, None, 255, 0.0, "mean", False, True, "reference")
    assert grad.numel() == 0


@pytest.mark.parametrize("size", [(4, 4), (0, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_empty_batch(backend, reduction, size):
    logits = torch.zeros(0, 5, 2, 2, requires_grad=True)
    target = torch.zeros(0, *size, dtype=torch.uint8)
    loss = ops.upsample_cross_entropy(logits, target, reduction=reduction, backend=backend)
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert logits.grad.shape == logits.shape
    assert ops.upsample_argmax(logits, (4, 4), backend=backend).shape == (0, 4, 4)
    assert ops.upsample_confusion(logits, target, backend=backend).sum() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_argmax_is_the_argmax(backend, case):
    logits, _ = logits_and_target(*case)
    z = upsample(logits.double(), case[3])
    for dtype in (torch.uint8, torch.int32, torch.int64):
        label = ops.upsample_argmax(logits, case[3], dtype, backend=backend)
        assert label.dtype == dtype
        chosen = z.gather(1, label.long().unsqueeze(1)).squeeze(1)
        assert (z.amax(1) - chosen).max() <= 4 * torch.finfo(torch.float32).eps * z.abs().max()


def test_argmax_ties_go_to_the_lowest_class(backend):
    logits = torch.zeros(1, 6, 3, 3)
    logits[:, 2] = logits[:, 4] = 1
    assert ops.upsample_argmax(logits, (10, 11), backend=backend).eq(2).all()


def test_confusion_counts_and_accumulates(backend):
    logits, target = logits_and_target(2, 5, (4, 4), (16, 18), smooth=True, ignored=0.2)
    label = ops.upsample_argmax(logits, (16, 18), backend=backend)
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for t, p in zip(target.flatten().tolist(), label.flatten().tolist()):
        if t != 255:
            expected[t, p] += 1
    out = ops.upsample_confusion(logits, target, backend=backend)
    assert torch.equal(out, expected)
    again = ops.upsample_confusion(logits, target, out=out, backend=backend)
    assert again is out and torch.equal(out, 2 * expected)


def test_opcheck(backend):
    library = torch.ops.depict_kernels
    if backend == "torch":
        pytest.skip("plain torch, not registered")
    if backend == "auto":
        backend = "torch"
    logits, target = logits_and_target(1, 4, (2, 3), (5, 6))
    weight = torch.rand(4)
    logits.requires_grad_()
    for reduction in ("mean", "none"):
        arguments = (logits, target, weight, 255, 0.1, reduction, True, True, backend)
        torch.library.opcheck(library.upsample_cross_entropy.default, arguments)
    torch.library.opcheck(library.upsample_argmax.default, (logits.detach(), (5, 6), torch.uint8, backend))
    out = torch.zeros(4, 4, dtype=torch.int64)
    torch.library.opcheck(library.upsample_confusion.default, (logits.detach(), target, 255, out, backend))


def test_compile_fullgraph(backend):
    logits, target = logits_and_target(2, 4, (3, 3), (7, 8))

    def f(x):
        loss = ops.upsample_cross_entropy(x, target, label_smoothing=0.1, backend=backend)
        counts = ops.upsample_confusion(x, target, backend=backend)
        return loss * counts.diagonal().sum() + ops.upsample_argmax(x, (7, 8), backend=backend).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, [logits]), value_and_gradients(f, [logits]))


def test_compiled_code_takes_a_target_of_any_strides(backend):
    """What compiled code knows of strides comes from the fake kernels, and it stops where they were wrong."""
    logits, target = logits_and_target(2, 4, (3, 3), (7, 8))
    turned = target.transpose(1, 2).contiguous().transpose(1, 2)
    f = lambda x, t: ops.upsample_cross_entropy(x, t, reduction="none", backend=backend).square().mean()
    compiled = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(
        value_and_gradients(compiled, [logits, turned]), value_and_gradients(f, [logits, target])
    )


def test_compiled_code_raises_on_a_bad_label(backend):
    logits, target = logits_and_target(1, 4, (3, 3), (7, 8))
    compiled = torch.compile(
        lambda x, t: ops.upsample_cross_entropy(x, t, backend=backend), fullgraph=True, backend="aot_eager"
    )
    compiled(logits, target)
    target[0, 0, 0] = 77
    with pytest.raises(ValueError, match="target value 77"):
        compiled(logits, target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_exported_where_no_gradient_was_needed_it_still_has_one(backend, reduction):
    logits, target = logits_and_target(2, 4, (3, 2), (9, 8), ignored=0.2)
    weight = torch.rand(4, generator=torch.Generator().manual_seed(0))

    class Loss(torch.nn.Module):
        def forward(self, x, t):
            return ops.upsample_cross_entropy(x, t, None, weight, 0.1, reduction, backend=backend)

    program = torch.export.export(Loss(), (logits, target)).module()
    run = lambda module: value_and_gradients(lambda x: module(x, target), [logits])
    torch.testing.assert_close(run(program), run(Loss()))
    if backend != "torch":
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(program(leaf, target).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="backend='torch'"):
            grad.sum().backward()


def test_second_derivative_is_refused_not_wrong():
    logits, target = logits_and_target(1, 4, (2, 2), (4, 4))
    logits.requires_grad_()
    loss = ops.upsample_cross_entropy(logits, target, backend="reference")
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        grad.sum().backward()
    loss = ops.upsample_cross_entropy(logits.double().detach().requires_grad_(), target, backend="torch")
    assert loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["reference", "torch", "auto"])
def test_gpu_records_a_bad_label_without_a_sync(name, monkeypatch):
    monkeypatch.setattr(stock, "CHUNK", 500)
    monkeypatch.setattr(backends, "_AUTO_CHECKED", ())  # "auto": a few classes at a time
    logits, target = logits_and_target(1, 4, (3, 3), (7, 8), device="cuda")
    target[0, 2, 3] = 77
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = ops.upsample_cross_entropy(logits, target, backend=name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isnan()
    with pytest.raises(ValueError, match=r"target value 77 at \(batch 0, row 2, column 3\)"):
        ops.raise_on_bad_target()
    ops.raise_on_bad_target()  # told once
    with pytest.raises(ValueError, match="target value 77"):
        ops.upsample_cross_entropy(logits, target, check_targets=True, backend=name)


def test_module_takes_weights_as_numbers():
    logits, target = logits_and_target(2, 5, (2, 2), (8, 8))
    weight = [0.5, 1.0, 2.0, 0.0, 3.0]
    expected = ops.upsample_cross_entropy(logits, target, weight=torch.tensor(weight))
    assert UpsampleCrossEntropyLoss(weight)(logits, target) == expected


def test_module_is_a_drop_in():
    logits, target = logits_and_target(2, 5, (2, 2), (8, 8))
    weight = torch.rand(5)
    module = UpsampleCrossEntropyLoss(weight, label_smoothing=0.1).double()
    assert (
        module.weight.dtype == torch.float64 and "weight" in module.state_dict()
    )  # as nn.CrossEntropyLoss has it
    expected = naive(logits.double(), target, weight=weight.double(), smoothing=0.1)
    torch.testing.assert_close(module(logits.double(), target), expected)

"""The Triton upsample kernels: in the interpreter on the CPU (slow: few, small shapes), compiled on a GPU."""

import pytest
import torch
from upsample_checks import make, naive, weights

from depict_kernels import ops
from depict_kernels.testing import check_against_float64, value_and_gradients

pytest.importorskip("triton")

from depict_kernels.ops.reference import upsample as reference
from depict_kernels.ops.triton_kernels import upsample

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(logits, target, weight=None, label_smoothing=0.0, reduction="mean", ignore_index=255):
    check_against_float64(
        lambda x: ops.upsample_cross_entropy(
            x, target, ignore_index, weight, label_smoothing, reduction, backend="triton"
        ),
        lambda x: naive(x, target, weight, label_smoothing, reduction, ignore_index),
        [logits],
        scale=logits.abs().max().item(),
    )


# B, C, low, high; then reduction, class weights?, label smoothing, smooth regions?
LOSSES = {
    "non-integer scale, mean": ((2, 5, (1, 2), (5, 9)), "mean", False, 0.0, False),
    "weights and smoothing, per pixel": ((1, 19, (2, 2), (7, 9)), "none", True, 0.1, False),
    "150 classes, sum": ((1, 150, (1, 2), (6, 11)), "sum", True, 0.1, True),
    "151 classes": ((1, 151, (2, 1), (5, 4)), "mean", False, 0.0, True),
    "whole tiles of 16 x 16": ((1, 7, (2, 2), (32, 32)), "mean", True, 0.0, True),
    "cells wider than a tile": ((1, 3, (1, 1), (3, 35)), "none", False, 0.0, True),
    "cells higher than a tile": ((1, 3, (1, 1), (18, 2)), "mean", False, 0.1, False),
    "one class": ((2, 1, (2, 1), (3, 3)), "mean", False, 0.1, False),
    "one sample": ((1, 4, (1, 1), (5, 4)), "mean", False, 0.0, False),
    "downsampling": ((1, 7, (5, 4), (2, 3)), "mean", True, 0.1, False),
    "no change of size": ((1, 3, (2, 3), (2, 3)), "none", False, 0.0, False),
    "a line": ((1, 3, (1, 4), (1, 9)), "sum", False, 0.0, False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_against_float64(name, triton_device, triton_dtype):
    case, reduction, weighted, smoothing, smooth = LOSSES[name]
    logits, target = make(case, triton_device, dtype=triton_dtype, smooth=smooth)
    check(logits, target, weights(case[1], triton_device) if weighted else None, smoothing, reduction)


def test_blocks_of_classes_as_on_a_gpu(triton_device, triton_dtype, monkeypatch):
    """The interpreter takes long blocks of classes, GPUs short ones: many steps per tile."""
    monkeypatch.setattr(upsample, "architecture", lambda device: "sm_90")
    check(*make((1, 19, (1, 2), (9, 10)), triton_device, dtype=triton_dtype), label_smoothing=0.1)


def wide_logits(values, device):
    """(class, corner) values as the left and right sample of a row."""
    return torch.tensor(values, device=device).view(1, len(values), 1, 2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "values",
    [
        [[0.0, -300.0], [-300.0, 0.0], [-20.0, -20.0]],  # a class falls out of float32: its sum is still 2e-9
        [[0.0, -50.0], [-50.0, 0.0], [-60.0, -60.0]],  # no class does, and the sums get small
        [[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]],
    ],
    ids=["wide", "small sums", "huge"],
)
def test_careful_tiles(values, reduction, triton_device, triton_dtype):
    target = torch.tensor([[[0, 0, 2, 2, 1, 1, 255, 2, 1, 0, 2, 1]]], device=triton_device)
    logits = wide_logits(values, triton_device).to(triton_dtype)
    check(logits, target, label_smoothing=0.1, reduction=reduction)


def test_series_and_careful_tiles_side_by_side(triton_device, triton_dtype):
    logits, target = make((1, 6, (3, 2), (10, 11)), triton_device, dtype=triton_dtype)
    logits[:, :, 0] *= 80
    flags = []
    original = upsample.launch

    def spy(kernel, *args, **arguments):
        original(kernel, *args, **arguments)
        if kernel.__name__ == "loss_series":
            flags.append(arguments["careful_ptr"].clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upsample, "launch", spy)
        check(logits, target)
    assert all(0 < f.sum() < f.numel() and f.max() == 1 for f in flags) and len(flags) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_in_float32(dtype, triton_device):
    logits, target = make((1, 19, (2, 2), (8, 8)), triton_device, dtype=dtype)
    loss, (grad,) = value_and_gradients(
        lambda x: ops.upsample_cross_entropy(x, target, backend="triton"), [logits]
    )
    truth, (truth_grad,) = value_and_gradients(lambda x: naive(x, target), [logits.double()])
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss.double(), truth, rtol=4e-7, atol=0)
    torch.testing.assert_close(grad, truth_grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_float64_logits_are_computed_in_float64(triton_device):
    logits, target = make((1, 5, (2, 2), (5, 6)), triton_device, dtype=torch.float64)
    weight = torch.rand(5, dtype=torch.float64, device=triton_device)
    for reduction in ("mean", "none"):
        upstream = torch.rand(target.shape, device=triton_device).double() if reduction == "none" else None
        result = value_and_gradients(
            lambda x, r=reduction: ops.upsample_cross_entropy(
                x, target, 255, weight, 0.1, r, backend="triton"
            ),
            [logits],
            upstream,
        )
        truth = value_and_gradients(
            lambda x, r=reduction: naive(x, target, weight, 0.1, r), [logits], upstream
        )
        torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-14)


def test_target_dtypes_are_read_directly(triton_device, triton_dtype):
    logits, target = make((1, 5, (1, 1), (2, 5)), triton_device, dtype=triton_dtype, ignore_index=100)
    expected = upsample.cross_entropy_forward(logits, target, None, 100, 0.0, "mean", True)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        result = upsample.cross_entropy_forward(logits, target.to(dtype), None, 100, 0.0, "mean", True)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, msg=str(dtype))


def test_any_strides(triton_device, triton_dtype):
    logits, target = make((2, 3, (1, 2), (1, 3)), triton_device, dtype=triton_dtype)
    run = lambda x, t: ops.upsample_cross_entropy(x, t, reduction="none", backend="triton")
    # the gradient of a sum is an expanded scalar, without strides
    expected = value_and_gradients(lambda x: run(x, target).sum(), [logits])
    wide = (
        torch.zeros(2, 1, 4, 3, device=triton_device, dtype=triton_dtype)
        .permute(0, 3, 1, 2)[..., ::2]
        .copy_(logits)
    )
    strided = torch.zeros(2, 1, 6, dtype=torch.int64, device=triton_device)[..., ::2].copy_(target)
    assert not wide.is_contiguous() and not strided.is_contiguous()
    leaf = wide.detach().requires_grad_()
    loss = run(leaf, strided).sum()
    torch.testing.assert_close((loss.detach(), torch.autograd.grad(loss, leaf)), expected, rtol=0, atol=0)
    labels = ops.upsample_argmax(wide, (1, 3), backend="triton")
    assert torch.equal(labels, ops.upsample_argmax(logits, (1, 3), backend="triton"))


def test_ignored_class_and_all_ignored(triton_device, triton_dtype):
    logits, target = make((1, 3, (1, 2), (3, 4)), triton_device, dtype=triton_dtype, ignored=0)
    check(logits, target, ignore_index=1)  # a class as ignore_index
    target.fill_(255)
    loss, (grad,) = value_and_gradients(
        lambda x: ops.upsample_cross_entropy(x, target, label_smoothing=0.1, backend="triton"), [logits]
    )
    assert loss == 0 and grad.eq(0).all()


@pytest.mark.parametrize("value", [5, -3, 2**32 + 1])
def test_bad_labels_are_reported_and_not_counted(value, triton_device):
    logits, target = make((2, 5, (1, 1), (4, 6)), triton_device, ignored=0)
    target[1, 0, 1] = 77  # later in the batch than the first one
    target[0, 3, 4] = value
    labels = ops.upsample_argmax(logits, (4, 6), backend="triton")
    valid = (target >= 0) & (target < 5)
    expected = torch.bincount(target[valid] * 5 + labels[valid], minlength=25).view(5, 5)
    counts = torch.zeros(5, 5, dtype=torch.int64, device=triton_device)
    assert upsample.confusion(logits, target, 255, counts).tolist() == [1, value, 0, 3, 4]
    assert torch.equal(counts, expected)


def test_bad_labels_are_reported_and_ignored_by_the_loss(triton_device, triton_dtype):
    logits, target = make((2, 5, (1, 1), (3, 4)), triton_device, dtype=triton_dtype, ignored=0)
    target[1, 0, 1], target[0, 2, 3] = -3, 2**32 + 1
    clean = torch.where((target < 0) | (target >= 5), 255, target)
    options = (None, 255, 0.0, "mean", True)
    loss, grad, report = upsample.cross_entropy_forward(logits, target, *options)
    expected = upsample.cross_entropy_forward(logits, clean, *options)
    assert report.tolist() == [1, 2**32 + 1, 0, 2, 3]
    assert expected[2].tolist() == [0] * 5
    torch.testing.assert_close((loss, grad), expected[:2], rtol=0, atol=0)


def test_nan_logits_give_a_nan_loss(triton_device, triton_dtype):
    logits, target = make((1, 3, (1, 2), (1, 4)), triton_device, dtype=triton_dtype)
    logits[0, 1, 0, 1] = torch.nan
    assert ops.upsample_cross_entropy(logits, target, backend="triton").isnan()


def test_a_class_disabled_with_minus_infinity(triton_device, triton_dtype):
    logits, target = make((1, 4, (1, 2), (2, 5)), triton_device, dtype=triton_dtype)
    target = torch.where(target == 2, 255, target)
    logits[:, 2] = -torch.inf
    without = logits[:, [0, 1, 3]]
    loss, (grad,) = value_and_gradients(
        lambda x: ops.upsample_cross_entropy(x, target, backend="triton"), [logits]
    )
    expected, (expected_grad,) = value_and_gradients(
        lambda x: ops.upsample_cross_entropy(x, torch.where(target == 3, 2, target), backend="triton"),
        [without],
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad[:, [0, 1, 3]], expected_grad)
    assert grad[:, 2].abs().max().item() < 1e-20


def test_launches(triton_device, triton_launches):
    """The kernels run, and only those that are needed."""
    logits, target = make((1, 3, (1, 1), (2, 2)), triton_device)
    common = ["pack_logits", "loss_series", "loss_careful", "finish_loss"]
    ops.upsample_cross_entropy(logits, target, backend="triton")
    assert triton_launches == common
    triton_launches.clear()
    ops.upsample_cross_entropy(logits.requires_grad_(), target, backend="triton").backward()
    backward = ["gradient_series", "gather_gradient"]
    assert sorted(triton_launches) == sorted(common + backward)
    triton_launches.clear()
    with torch.no_grad():
        ops.upsample_argmax(logits, (2, 2), backend="triton")
    assert triton_launches == ["pack_logits", "label_tiles"]


def test_repeats_are_bitwise_equal(triton_device, triton_dtype):
    logits, target = make((1, 5, (1, 2), (3, 7)), triton_device, dtype=triton_dtype, sharpness=30)
    run = lambda: upsample.cross_entropy_forward(logits, target, None, 255, 0.1, "mean", True)
    torch.testing.assert_close(run(), run(), rtol=0, atol=0)


def test_indices_beyond_32_bits_take_the_wide_path(triton_device, monkeypatch):
    """Cell arithmetic in 64 bits gives the same cells; sizes that need it do not fit a test."""
    assert upsample.cut((2, 40_000), (4, 80_000)).arguments["WIDE"]
    assert not upsample.cut((128, 256), (1024, 2048)).arguments["WIDE"]
    logits, target = make((1, 3, (1, 2), (3, 4)), triton_device)
    run = lambda: upsample.cross_entropy_forward(logits, target, None, 255, 0.0, "mean", True)
    expected = run()
    arguments = upsample.Cut.arguments.fget
    monkeypatch.setattr(upsample.Cut, "arguments", property(lambda t: arguments(t) | {"WIDE": True}))
    torch.testing.assert_close(run(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("smooth", [False, True], ids=["noise", "regions"])
@pytest.mark.parametrize(
    "case",
    [(2, 5, (2, 3), (9, 13)), (1, 150, (2, 2), (11, 32)), (1, 1, (2, 2), (3, 3)), (1, 19, (4, 3), (3, 2))],
    ids=str,
)
def test_argmax_is_the_argmax(case, smooth, triton_device, triton_dtype):
    batch, classes, _, high = case
    logits, _ = make(case, triton_device, dtype=triton_dtype, smooth=smooth)
    dtype = {1: torch.int64, 5: torch.uint8}.get(classes, torch.int32)
    labels = ops.upsample_argmax(logits, high, dtype, backend="triton")
    assert labels.dtype == dtype and labels.shape == (batch, *high)
    z = reference.upsample(logits.double(), high)
    short = z.amax(1) - z.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    assert short.max() <= 4 * torch.finfo(torch.float32).eps * logits.abs().max()  # ties of float32


def test_argmax_ties_nan_and_infinity_as_torch(triton_device, triton_dtype):
    logits, _ = make((1, 6, (2, 3), (5, 7)), triton_device, dtype=triton_dtype)
    logits[:, 5] = logits[:, 2]
    labels = ops.upsample_argmax(logits, (5, 7), backend="triton")
    assert (labels == 2).any() and not (labels == 5).any()
    assert ops.upsample_argmax(torch.zeros_like(logits), (5, 7), backend="triton").eq(0).all()
    for value in (torch.nan, torch.inf, -torch.inf):
        special = logits.clone()
        special[0, 1, 1, 1] = special[0, 4, 1, 1] = value
        labels = ops.upsample_argmax(special, (6, 9), backend="triton")
        expected = reference.upsample(special.float(), (6, 9)).argmax(1)
        # Not at the borders: there torch adds 0 times the next sample.
        inside = (slice(None), slice(2, 4), slice(2, 7))
        assert torch.equal(labels[inside], expected[inside]), value


@pytest.mark.parametrize("smooth", [False, True], ids=["more pairs than are counted together", "few"])
def test_confusion_counts_and_accumulates(smooth, triton_device, triton_dtype):
    logits, target = make(
        (1, 12, (1, 2), (16, 20)), triton_device, dtype=triton_dtype, smooth=smooth, target_dtype=torch.uint8
    )
    labels = ops.upsample_argmax(logits, (16, 20), backend="triton")
    valid = target != 255
    pairs = target[valid].long() * 12 + labels[valid]
    expected = torch.bincount(pairs, minlength=144).view(12, 12)
    assert smooth or (expected > 0).sum() > 16
    out = torch.arange(144, device=triton_device).view(12, 12).t()
    ops.upsample_confusion(logits, target, out=out, backend="triton")
    assert torch.equal(out, expected + torch.arange(144, device=triton_device).view(12, 12).t())


def test_opcheck(triton_device, triton_dtype):
    logits, target = make((1, 3, (1, 1), (2, 2)), triton_device, dtype=triton_dtype)
    library = torch.ops.depict_kernels
    # the other two run the operator a dozen times: minutes in the interpreter
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    options = {"test_utils": checks[:2] if triton_device == "cpu" else checks}
    for reduction in ("mean", "none"):
        arguments = (logits.requires_grad_(), target, None, 255, 0.1, reduction, True, False, "triton")
        torch.library.opcheck(library.upsample_cross_entropy.default, arguments, **options)
    logits = logits.detach()
    torch.library.opcheck(library.upsample_argmax.default, (logits, (2, 2), torch.uint8, "triton"), **options)
    counts = torch.zeros(3, 3, dtype=torch.int64, device=triton_device)
    torch.library.opcheck(
        library.upsample_confusion.default, (logits, target, 255, counts, "triton"), **options
    )


def test_compile_fullgraph(triton_device, triton_dtype):
    logits, target = make((1, 3, (1, 1), (2, 2)), triton_device, dtype=triton_dtype)
    f = lambda x: ops.upsample_cross_entropy(x, target, check_targets=False, backend="triton")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradients(compiled, [logits]), value_and_gradients(f, [logits]), rtol=0, atol=0
    )


def test_extra_memory_is_a_small_share_of_the_upsampled_logits():
    """On meta tensors: what the training call allocates, 8 x 150 x 32 x 32 logits and 512 x 512 pixels."""
    from depict_kernels.ops.triton_kernels import launch

    logits = torch.empty(8, 150, 32, 32, device="meta")
    target = torch.empty(8, 512, 512, dtype=torch.uint8, device="meta")
    with launch.recording("sm_90") as launches:
        upsample.cross_entropy_forward(logits, target, None, 255, 0.0, "mean", True)
    tensors = {
        id(t): t.numel() * t.element_size()
        for one in launches
        for t in one.arguments.values()
        if isinstance(t, torch.Tensor) and t is not logits and t is not target
    }
    assert sum(tensors.values()) < 0.04 * 8 * 150 * 512 * 512 * 4

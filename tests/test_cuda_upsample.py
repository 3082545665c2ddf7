"""The CUDA upsample kernels beyond what every backend is tested for; in the emulator where there is no GPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from depict_kernels import backends, ops
from depict_kernels.ops.cuda_kernels import _library, upsample
from depict_kernels.ops.reference import upsample as reference
from depict_kernels.testing import assert_within_budget, logits_and_target, max_error, value_and_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")
IGNORE = 255


def stock(logits, target, dtype, upstream, weight=None, smoothing=0.0, reduction="mean", ignore_index=IGNORE):
    """Loss and gradient of stock torch computed in `dtype`; upstream counts for reduction "none" only."""
    return value_and_gradients(
        lambda x: F.cross_entropy(
            F.interpolate(x, target.shape[1:], mode="bilinear"),
            target.long(),
            weight=None if weight is None else weight.to(dtype),
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction=reduction,
        ),
        [logits.to(dtype)],
        upstream if reduction == "none" else None,
    )


def kernel(logits, target, upstream=None, weight=None, smoothing=0.0, reduction="mean", ignore_index=IGNORE):
    """The kernels' own float32 loss, gradient and report, without the public operator around them."""
    options = (weight, ignore_index, smoothing)
    loss, grad, report = upsample.cross_entropy_forward(logits, target, *options, reduction, True)
    if reduction == "none":
        assert grad is None
        grad = upsample.cross_entropy_backward(upstream, logits, target, *options)
    return loss, grad, report


def check(logits, target, weight=None, smoothing=0.0, reduction="mean", ignore_index=IGNORE):
    """Float32 results within the float64 budget; the terms are as large as logits and pixels per sample make them."""
    upstream = torch.randn(target.shape, generator=torch.Generator().manual_seed(2)).to(logits.device)
    options = (weight, smoothing, reduction, ignore_index)
    loss, grad, report = kernel(logits, target, upstream, *options)
    assert loss.dtype == grad.dtype == torch.float32 and report.tolist() == [0] * 5
    truth = stock(logits, target, torch.float64, upstream.double(), *options)
    peer = stock(logits, target, torch.float32, upstream, *options)
    valid = target != ignore_index
    each = torch.ones(logits.shape[1], device=logits.device) if weight is None else weight
    total = each[target[valid].long()].sum().item()
    heaviest = max(each.max().item(), each.mean().item())
    size = logits.double().abs().max().item() * 2 + math.log(logits.shape[1]) + 1
    pixels = {"mean": 1 / total, "sum": 1.0, "none": 4.0}[reduction]
    per_sample = math.prod(max(1.0, n / m) for n, m in zip(target.shape[1:], logits.shape[2:]))
    losses = {"mean": 1.0, "sum": valid.sum().item(), "none": 1.0}[reduction]
    assert_within_budget(loss, peer[0], truth[0], scale=size * heaviest * losses, what="loss")
    scale = heaviest * pixels * per_sample * max(1.0, size / 64)
    assert_within_budget(grad, peer[1][0], truth[1][0], scale=scale, what="gradient")


def make(case, device, **options):
    logits, target = logits_and_target(*case, **options)
    if target.numel():
        target[0, 0, 0] = 0  # one valid pixel at least
    return logits.to(device), target.to(device)


def weights(classes, device, zeros=False):
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(1)) + 0.5
    if zeros:
        weight[1::2] = 0
    return weight.to(device)


# B, C, low, high; reduction, class weights?, label smoothing, sharpness, smooth regions?
LOSSES = {
    "scale 16": ((1, 150, (4, 4), (64, 64)), "mean", False, 0.0, 1.0, True),
    "scale 16, noise": ((1, 150, (3, 3), (48, 48)), "sum", True, 0.1, 5.0, False),
    "scale 14": ((1, 19, (3, 2), (42, 28)), "none", False, 0.1, 1.0, True),
    "scale 8": ((2, 21, (4, 3), (32, 24)), "mean", True, 0.0, 1.0, True),
    "scale 4": ((1, 151, (5, 6), (20, 24)), "none", True, 0.1, 1.0, False),
    "scale 2, one row of lanes": ((1, 33, (3, 5), (5, 10)), "sum", False, 0.1, 1.0, False),
    "no change of size": ((1, 4, (3, 5), (3, 5)), "none", False, 0.0, 1.0, False),
    "down": ((2, 7, (9, 8), (4, 5)), "mean", True, 0.1, 1.0, False),
    "far down, steps longer than cells": ((1, 5, (33, 20), (2, 3)), "none", False, 0.0, 8.0, False),
    "non-integer": ((2, 5, (4, 6), (29, 41)), "mean", False, 0.1, 1.0, False),
    "up one way, down the other": ((1, 6, (7, 2), (3, 50)), "sum", True, 0.0, 1.0, False),
    "tiles longer than cells": ((1, 3, (1, 2), (67, 95)), "mean", False, 0.1, 1.0, True),
    "one sample": ((1, 4, (1, 1), (5, 4)), "none", False, 0.0, 1.0, False),
    "one class": ((2, 1, (3, 2), (7, 9)), "sum", False, 0.1, 1.0, False),
    "more classes than are staged": ((1, 389, (2, 2), (9, 17)), "mean", True, 0.1, 3.0, False),
    "a line": ((1, 3, (1, 6), (1, 13)), "none", False, 0.0, 1.0, False),
    "sharp": ((1, 40, (3, 3), (48, 40)), "mean", False, 0.0, 30.0, False),
    "very sharp": ((1, 40, (3, 3), (48, 40)), "none", True, 0.1, 200.0, False),
    "very sharp, staged": ((1, 200, (2, 3), (9, 12)), "sum", False, 0.1, 200.0, False),
    "sharp regions": ((1, 19, (4, 4), (64, 64)), "sum", False, 0.0, 30.0, True),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_against_float64(name, cuda_device):
    case, reduction, weighted, smoothing, sharpness, smooth = LOSSES[name]
    logits, target = make(case, cuda_device, sharpness=sharpness, smooth=smooth, ignore_index=IGNORE)
    check(logits, target, weights(case[1], cuda_device) if weighted else None, smoothing, reduction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_computes_in_float32(dtype, reduction, cuda_device):
    logits, target = make((1, 19, (3, 3), (24, 30)), cuda_device, dtype=dtype, sharpness=4)
    check(logits, target, smoothing=0.1, reduction=reduction)
    leaf = logits.clone().requires_grad_()
    ops.upsample_cross_entropy(leaf, target, reduction=reduction, backend="cuda").sum().backward()
    assert leaf.grad.dtype == dtype and leaf.grad.abs().max() > 0


def test_weights_of_zero_and_a_class_as_ignore_index(cuda_device):
    logits, target = make((1, 6, (3, 3), (20, 17)), cuda_device, ignored=0)
    for smoothing in (0.0, 0.1):
        check(logits, target, weights(6, cuda_device, zeros=True), smoothing, "sum")
    check(logits, target, ignore_index=1)


def test_all_ignored_is_zero(cuda_device):
    logits, target = make((1, 5, (3, 3), (20, 17)), cuda_device)
    target.fill_(IGNORE)
    for reduction in ("mean", "sum", "none"):
        for dead in (target, torch.ones_like(target)):  # of weight 0
            weight = torch.tensor([1.0, 0, 1, 1, 1], device=cuda_device)
            loss, grad, _ = kernel(
                logits, dead, torch.ones(target.shape, device=cuda_device), weight, 0.0, reduction
            )
            assert loss.eq(0).all() and grad.eq(0).all(), reduction


# --- logits that a geometric series in float32 cannot hold ---


@pytest.mark.parametrize("size", [(1, 16), (16, 1), (16, 16), (5, 40), (3, 7), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "rows",
    [
        # a class falls out of float32: the last pixel's sum is 4e4 times too small and still 2e-9
        [[0.0, -300.0], [-300.0, 0.0], [-20.0, -20.0], [-20.0, -20.0]],
        [[0.0, -50.0], [-50.0, 0.0], [-60.0, -60.0], [0.0, -45.0]],  # no class does, and the sums get small
        [[0.0, -66.0], [-66.0, 0.0], [-41.0, -43.0], [-43.0, -41.0]],  # around the thresholds
        [[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0], [1e4, -1e4]],
    ],
    ids=["wide", "small sums", "thresholds", "huge"],
)
def test_sums_that_vanish_inside_a_cell(rows, reduction, size, cuda_device):
    rows = torch.tensor(rows, device=cuda_device)
    logits = torch.stack([rows, rows.flip(1)], 1)[None]
    target = torch.arange(math.prod(size), device=cuda_device).reshape(1, *size) % 4
    check(logits, target, smoothing=0.1, reduction=reduction)


def test_levels_around_the_thresholds(cuda_device):
    """Classes that trade places over a cell; a step from pixel to pixel may be as long as a cell."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.0, -20.0, -41.0, -43.0, -63.0, -65.0, -90.0, -1000.0])
    for i in range(24):
        size = [(6, 18), (10, 7), (18, 50), (3, 3), (5, 4), (2, 2)][i % 6]
        logits = levels[torch.randint(0, 8, (1, 4, 2, 2), generator=generator)]
        logits += torch.randn(logits.shape, generator=generator) * 0.3
        target = torch.randint(0, 4, (1, *size), generator=generator)
        check(logits.to(cuda_device), target.to(cuda_device))


def test_a_clamped_class_beside_a_small_sum(cuda_device):
    """In the middle of the cell four classes are at -47, and the clamped fifth would weigh a tenth of them."""
    corners = torch.full((5, 4), -63.0)
    corners[range(4), range(4)] = 0
    corners[4] = torch.tensor([-43.0, -43.0, -43.0, -200.0])
    target = torch.arange(32 * 32, device=cuda_device).view(1, 32, 32) % 5
    for reduction in ("mean", "none"):
        check(corners.view(1, 5, 2, 2).to(cuda_device), target, reduction=reduction)


def test_a_large_upstream_gradient_does_not_overflow_the_series(cuda_device):
    rows = torch.tensor([[0.0, -63.0], [-63.0, 0.0], [-20.0, -20.0]], device=cuda_device)
    logits = torch.stack([rows, rows.flip(1)], 1)[None]
    target = torch.arange(64, device=cuda_device).view(1, 8, 8) % 3
    upstream = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)).to(cuda_device) + 0.5
    small = kernel(logits, target, upstream, reduction="none")[1]
    for power in (20, 62):  # beyond 1e9 exponentials are taken directly
        large = kernel(logits, target, upstream * 2.0**power, reduction="none")[1]
        scale = small.abs().max().item() * 64
        assert_within_budget(large * 2.0**-power, small, small.double(), scale=scale)


@pytest.mark.parametrize("masked", ["every class", "every class of one sample", "one class", "both ends"])
def test_samples_masked_with_the_lowest_number(masked, cuda_device):
    lowest = torch.finfo(torch.float32).min
    logits, _ = make((2, 5, (3, 3), (31, 20)), cuda_device)
    target = torch.randint(0, 2, (2, 31, 20), generator=torch.Generator().manual_seed(0)).to(cuda_device)
    if masked == "every class":
        logits[:] = -2e38
    elif masked == "every class of one sample":
        logits[:, :, 1, 1] = lowest
    elif masked == "one class":
        logits[:, 3] = lowest
    else:
        logits[:, 3, 1, 1], logits[:, 4, 0, 2] = lowest, -lowest
    labels = upsample.argmax(logits, (31, 20), torch.int64)
    exact = F.interpolate(logits.double(), (31, 20), mode="bilinear")
    short = exact.amax(1) - exact.gather(1, labels[:, None])[:, 0]
    assert (short <= 1e-6 * exact.abs().amax(1)).all() and labels.min() >= 0 and labels.max() < 5
    if masked != "both ends":  # there stock torch overflows
        check(logits, target)


def test_minus_infinity_is_a_class_that_cannot_be(cuda_device):
    logits, target = make((1, 4, (2, 3), (9, 20)), cuda_device)
    target = torch.where(target == 2, IGNORE, target)
    logits[:, 2] = -torch.inf
    loss, grad, _ = kernel(logits, target)
    rest = [0, 1, 3]
    expected, expected_grad, _ = kernel(logits[:, rest], torch.where(target == 3, 2, target))
    torch.testing.assert_close((loss, grad[:, rest]), (expected, expected_grad))
    assert grad[:, 2].abs().max() < 1e-20
    logits[:, 1, 0] = -torch.inf  # only some of its samples: direct tiles
    target = torch.where(target == 1, IGNORE, target)
    loss, grad, _ = kernel(logits, target)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("sharpness", [1, 300], ids=["series", "direct"])
def test_nan_and_infinity_give_a_nan_loss(value, sharpness, cuda_device):
    for place in ((0, 0), (1, 2), (2, 1)):
        logits, target = make((1, 3, (3, 3), (20, 24)), cuda_device, ignored=0, sharpness=sharpness)
        logits[0, 1, place[0], place[1]] = value
        loss, grad, _ = kernel(logits, target)
        assert loss.isnan() and grad.isnan().any()
        if math.isnan(
            value
        ):  # in every cell around the sample and in no other; at the borders torch adds 0 times NaN
            upstream = torch.ones(target.shape, device=cuda_device)
            per_pixel = kernel(logits, target, upstream, reduction="none")[0]
            expected = stock(logits, target, torch.float32, upstream, reduction="none")[0]
            inside = (0, slice(3, 17), slice(4, 20))
            assert expected[inside].isnan().any()
            assert torch.equal(per_pixel[inside].isnan(), expected[inside].isnan())


# --- labels that are given ---


def test_target_dtypes_and_strides(cuda_device):
    logits, target = make((2, 5, (2, 3), (7, 20)), cuda_device, ignore_index=100)
    expected = kernel(logits, target, ignore_index=100)
    wide = torch.full((7, 3, 40, 2), 9, device=cuda_device).permute(3, 0, 1, 2)[:, :, 1, ::2]
    wide.copy_(target)
    channels_last = logits.contiguous(memory_format=torch.channels_last)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        for labels in (target.to(dtype), wide.to(dtype)):
            torch.testing.assert_close(
                kernel(channels_last, labels, ignore_index=100), expected, rtol=0, atol=0
            )
    torch.testing.assert_close(kernel(logits, wide, ignore_index=100), expected, rtol=0, atol=0)
    sliced = torch.full((2, 8, 5, 7), torch.nan, device=cuda_device)[:, 2:7, ::3, 1::2]
    sliced.copy_(logits)
    torch.testing.assert_close(kernel(sliced, target, ignore_index=100), expected, rtol=0, atol=0)
    ones = torch.ones((), device=cuda_device).expand(target.shape)  # the gradient of a sum has no strides
    grads = [kernel(logits, target, u, reduction="none", ignore_index=100)[1] for u in (ones, ones.clone())]
    assert torch.equal(*grads)


@pytest.mark.parametrize("value", [5, 254, -3, 2**32 + 1, 2**63 - 1, -(2**63)])
def test_bad_labels_are_reported_and_count_as_ignored(value, cuda_device):
    logits, target = make((2, 5, (3, 2), (40, 21)), cuda_device, ignored=0)
    target[1, 0, 1], target[0, 39, 2], target[0, 17, 20] = 77, -9, value
    target[0, 19, 20] = 99  # seen by the same thread
    clean = torch.where((target < 0) | (target >= 5), IGNORE, target)
    upstream = torch.ones(target.shape, device=cuda_device)
    for reduction in ("mean", "none"):
        loss, grad, report = kernel(logits, target, upstream, reduction=reduction)
        assert report.tolist() == [1, value, 0, 17, 20]
        expected = kernel(logits, clean, upstream, reduction=reduction)
        torch.testing.assert_close((loss, grad), expected[:2], rtol=0, atol=0)
    counts = [torch.zeros(5, 5, dtype=torch.int64, device=cuda_device) for _ in range(2)]
    assert upsample.confusion(logits, target, IGNORE, counts[0]).tolist() == report.tolist()
    assert upsample.confusion(logits, clean, IGNORE, counts[1]).tolist() == [0] * 5
    assert torch.equal(*counts) and counts[0].sum() == (clean != IGNORE).sum()


def test_bad_labels_through_the_public_operators(cuda_device):
    logits, target = make((1, 5, (1, 2), (2, 3)), cuda_device, ignored=0)
    target[0, 1, 2] = 9
    words = r"target value 9 at \(batch 0, row 1, column 2\)"
    loss = lambda check: ops.upsample_cross_entropy(logits, target, check_targets=check, backend="cuda")
    with pytest.raises(ValueError, match=words):
        loss(True)
    assert loss(False).isfinite()
    if cuda_device == "cpu":
        with pytest.raises(ValueError, match=words):
            ops.upsample_confusion(logits, target, backend="cuda")
    else:
        assert loss(None).isnan()
        with pytest.raises(ValueError, match=words):
            ops.raise_on_bad_target()


# --- label map and confusion matrix ---

MAPS = [
    (2, 5, (2, 3), (29, 43)),
    (1, 150, (3, 3), (48, 48)),
    (1, 1, (2, 2), (9, 3)),
    (1, 19, (9, 7), (3, 4)),
    (1, 33, (1, 1), (5, 70)),
    (1, 300, (4, 5), (17, 20)),
]


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 200.0])
@pytest.mark.parametrize("smooth", [False, True], ids=["noise", "regions"])
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_label_map_and_confusion(case, smooth, sharpness, cuda_device):
    classes, size = case[1], case[3]
    logits, target = make(case, cuda_device, smooth=smooth, sharpness=sharpness)
    labels = upsample.argmax(logits, size, torch.int64)
    exact = reference.upsample(logits.double(), size)
    rounding = 2 * max_error(reference.upsample(logits, size), exact)
    rounding += 2 * torch.finfo(torch.float32).eps * logits.abs().max().item()
    assert (exact.amax(1) - exact.gather(1, labels[:, None])[:, 0] <= rounding).all()  # ties in float32
    if sharpness == 0:
        assert labels.eq(0).all()
    assert torch.equal(upsample.argmax(logits, size, torch.int32).long(), labels)
    if classes <= 256:
        assert torch.equal(upsample.argmax(logits, size, torch.uint8).long(), labels)

    ignore_index = ops.default_ignore_index(classes)
    valid = target != ignore_index
    pairs = target[valid] * classes + labels[valid]
    before = torch.arange(classes * classes, device=cuda_device).view(classes, classes).t()  # strided
    out = before.clone(memory_format=torch.preserve_format)
    upsample.confusion(logits, target, ignore_index, out)
    assert torch.equal(out - before, torch.bincount(pairs, minlength=classes**2).view(classes, classes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_label_map_of_half_precision(dtype, cuda_device):
    logits, _ = make((1, 19, (3, 4), (30, 31)), cuda_device, dtype=dtype)
    labels = ops.upsample_argmax(logits, (30, 31), backend="cuda")
    assert torch.equal(labels, ops.upsample_argmax(logits.float(), (30, 31), backend="cuda"))


def test_ties_nan_and_infinity_as_torch(cuda_device):
    logits, _ = make((1, 70, (2, 3), (5, 7)), cuda_device)
    tied = logits.clone()
    tied[:, 40] = tied[:, 65] = logits.amax(1) + 1
    assert ops.upsample_argmax(tied, (5, 7), backend="cuda").eq(40).all()
    for value in (torch.nan, torch.inf, -torch.inf):
        special = logits.clone()
        special[0, 1, 1, 1] = special[0, 64, 1, 1] = value
        labels = ops.upsample_argmax(special, (6, 9), backend="cuda")
        expected = reference.upsample(special, (6, 9)).argmax(1)
        # Not at the borders: there torch adds 0 times the next sample.
        inside = (slice(None), slice(2, 4), slice(2, 7))
        assert torch.equal(labels[inside], expected[inside]), value
    logits.fill_(-torch.inf)
    assert ops.upsample_argmax(logits, (5, 7), backend="cuda").eq(0).all()


# --- properties ---


def everything(logits, target):
    upstream = torch.linspace(-1, 1, target.numel(), device=logits.device).view(target.shape)
    counts = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.int64, device=logits.device)
    weight = weights(logits.shape[1], logits.device)
    return (
        *kernel(logits, target, weight=weight, smoothing=0.1),
        *kernel(logits, target, upstream, weight, 0.1, "none"),
        upsample.argmax(logits, tuple(target.shape[1:]), torch.int64),
        upsample.confusion(logits, target, IGNORE, counts),
        counts,
    )


def mixed_problem(device):
    """Series and direct tiles, tiles of one label and of many, bad and ignored labels."""
    logits, target = make((2, 200, (3, 3), (37, 44)), device, smooth=True)
    logits[:, :, 0] *= 60
    target[1] = torch.randint(0, 200, target.shape[1:], generator=torch.Generator().manual_seed(3))
    target[1, 20, 20] = 300
    return logits, target


def test_repeats_are_bitwise_equal(cuda_device):
    problem = mixed_problem(cuda_device)
    torch.testing.assert_close(everything(*problem), everything(*problem), rtol=0, atol=0)


def test_order_of_threads_does_not_matter(monkeypatch, cuda_device):
    """A missing barrier would show: the emulator runs the threads in another order for every seed."""
    if cuda_device != "cpu":
        pytest.skip("the GPU chooses its own order")
    results = []
    for seed in ("0", "1", "2", "7"):
        monkeypatch.setenv("DEPICT_EMULATE_SEED", seed)
        results.append(everything(*mixed_problem("cpu")))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_training_step_and_nothing_synchronises():
    logits, target = make((2, 19, (4, 4), (64, 64)), "cuda")
    other = torch.randn_like(logits)
    step = lambda x: kernel(x, target, smoothing=0.1)
    expected = step(other)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(logits)
    logits.copy_(other)
    graph.replay()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_launches(monkeypatch, cuda_device):
    """The kernels run, and only those that are needed."""
    names, original = [], _library.call
    spy = lambda name, *rest, device: (names.append(name), original(name, *rest, device=device))[1]
    monkeypatch.setattr(upsample, "call", spy)

    def launched(function):
        names.clear()
        function()
        return [name.removeprefix("upsample_") for name in names]

    logits, target = make((1, 3, (1, 2), (4, 5)), cuda_device)
    loss = lambda x, reduction: ops.upsample_cross_entropy(x, target, reduction=reduction, backend="cuda")
    forward = ["pack", "cross_entropy", "finish"]
    leaf = logits.clone().requires_grad_()
    assert launched(lambda: loss(logits, "mean")) == forward
    assert launched(lambda: loss(leaf, "mean").backward()) == [*forward, "gather"]
    backward = ["pack", "cross_entropy", "gather"]
    assert launched(lambda: loss(leaf, "none").sum().backward()) == [*forward, *backward]
    assert launched(lambda: ops.upsample_argmax(logits, (4, 5), backend="cuda")) == ["pack", "labels"]


def test_empty_batch(cuda_device):
    logits = torch.zeros(0, 3, 2, 2, device=cuda_device, requires_grad=True)
    for shape in ((0, 5, 5), (0, 0, 0)):
        target = torch.zeros(shape, dtype=torch.uint8, device=cuda_device)
        for reduction in ("mean", "none"):
            loss = ops.upsample_cross_entropy(logits, target, reduction=reduction, backend="cuda")
            loss.sum().backward()
            assert loss.shape == (() if reduction == "mean" else shape) and loss.sum() == 0
        assert ops.upsample_confusion(logits, target, backend="cuda").eq(0).all()
    assert logits.grad.shape == logits.shape
    assert ops.upsample_argmax(logits, (5, 5), backend="cuda").shape == (0, 5, 5)


def test_backward_twice_and_a_loss_scaler(cuda_device):
    logits, target = make((1, 5, (2, 2), (16, 16)), cuda_device, dtype=torch.float16)
    leaf = logits.clone().requires_grad_()
    loss = ops.upsample_cross_entropy(leaf, target, backend="cuda")
    (first,) = torch.autograd.grad(loss * 2.0**16, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 2.0**16, leaf)
    assert torch.equal(first, second)
    assert torch.equal(first, (kernel(logits, target)[1] * 2.0**16).half())


def test_float64_is_refused(cuda_device):
    logits, target = make((1, 3, (2, 2), (4, 4)), cuda_device, dtype=torch.float64)
    with pytest.raises(backends.BackendUnavailable, match="float64 is not supported"):
        ops.upsample_cross_entropy(logits, target, backend="cuda")


def test_too_many_cells_are_refused(cuda_device):
    """The kernels count tiles and the pixels of an axis in 32 bits."""
    call = lambda shape, size: torch.ops.depict_kernels_cuda_emulated.upsample_gather(
        torch.empty(1, 4, 1), None, torch.empty(1).expand(shape), *size, 0, 1, 0
    )
    if cuda_device != "cpu":
        pytest.skip("one check for both builds")
    with pytest.raises(RuntimeError, match="split the batch"):
        call((70_000, 3, 256, 256), (512, 512))
    with pytest.raises(RuntimeError, match="longer than"):
        call((1, 3, 1, 1), (4, 2**31))


def test_opcheck_and_compile(cuda_device):
    logits, target = make((1, 4, (2, 3), (5, 6)), cuda_device)
    weight = weights(4, cuda_device)
    library = torch.ops.depict_kernels
    for reduction in ("mean", "none"):
        arguments = (
            logits.clone().requires_grad_(),
            target,
            weight,
            255,
            0.1,
            reduction,
            True,
            False,
            "cuda",
        )
        torch.library.opcheck(library.upsample_cross_entropy.default, arguments)
    torch.library.opcheck(library.upsample_argmax.default, (logits, (5, 6), torch.uint8, "cuda"))
    out = torch.zeros(4, 4, dtype=torch.int64, device=cuda_device)
    torch.library.opcheck(library.upsample_confusion.default, (logits, target, 255, out, "cuda"))

    def f(x):
        loss = ops.upsample_cross_entropy(x, target, label_smoothing=0.1, check_targets=False, backend="cuda")
        counts = ops.upsample_confusion(x, target, backend="cuda")
        return loss * counts.diagonal().sum() + ops.upsample_argmax(x, (5, 6), backend="cuda").sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradients(compiled, [logits]), value_and_gradients(f, [logits]), rtol=0, atol=0
    )


def test_extra_memory_is_a_small_share_of_the_upsampled_logits(monkeypatch):
    """On meta tensors: what the training call allocates, 8 x 150 x 32 x 32 logits and 512 x 512 pixels."""
    sizes = {}

    def record(name, *arguments, device):
        for t in arguments:
            if isinstance(t, torch.Tensor):
                sizes[id(t)] = t.numel() * t.element_size(), t  # kept, so that no id comes twice

    monkeypatch.setattr(upsample, "call", record)
    logits = torch.empty(8, 150, 32, 32, device="meta")
    target = torch.empty(8, 512, 512, dtype=torch.uint8, device="meta")
    upsample.cross_entropy_forward(logits, target, None, 255, 0.0, "mean", True)
    extra = sum(size for size, t in sizes.values() if t is not logits and t is not target)
    assert extra < 0.03 * 8 * 150 * 512 * 512 * 4

"""The loss of the CUDA upsample kernels beyond what every backend is tested for; in the emulator without a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from upsample_checks import IGNORE, check, kernel, make, stock, weights

from depict_kernels import ops
from depict_kernels.ops.cuda_kernels import upsample
from depict_kernels.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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

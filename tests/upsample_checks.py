"""What the tests of the upsample kernels share: stock torch to compare with, the CUDA kernels' own results."""

import math

import torch
import torch.nn.functional as F

from depict_kernels.ops.cuda_kernels import upsample as cuda
from depict_kernels.ops.reference import accumulation_dtype
from depict_kernels.testing import assert_within_budget, logits_and_target, value_and_gradients

IGNORE = 255


def upsample(logits, size):
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def naive(logits, target, weight=None, smoothing=0.0, reduction="mean", ignore_index=IGNORE):
    """The loss as everybody computes it, at least in float32."""
    z = upsample(logits.to(accumulation_dtype(logits.dtype)), target.shape[1:])
    return F.cross_entropy(
        z,
        target.long(),
        weight=None if weight is None else weight.to(z.dtype),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
    )


def stock(
    logits, target, dtype, upstream=None, weight=None, smoothing=0.0, reduction="mean", ignore_index=IGNORE
):
    """Loss and gradient of stock torch computed in `dtype`; upstream counts for reduction "none" only."""
    loss, (grad,) = value_and_gradients(
        lambda x: naive(x, target, weight, smoothing, reduction, ignore_index),
        [logits.to(dtype)],
        upstream.to(dtype) if reduction == "none" else None,
    )
    return loss, grad


def kernel(logits, target, upstream=None, weight=None, smoothing=0.0, reduction="mean", ignore_index=IGNORE):
    """The kernels' own float32 loss, gradient and report, without the public operator around them."""
    options = (weight, ignore_index, smoothing)
    loss, grad, report = cuda.cross_entropy_forward(logits, target, *options, reduction, True)
    if reduction == "none":
        assert grad is None
        grad = cuda.cross_entropy_backward(upstream, logits, target, *options)
    return loss, grad, report


def check(logits, target, weight=None, smoothing=0.0, reduction="mean", ignore_index=IGNORE):
    """Float32 results within the float64 budget; the terms are as large as logits and pixels per sample make them."""
    upstream = torch.randn(target.shape, generator=torch.Generator().manual_seed(2)).to(logits.device)
    options = (weight, smoothing, reduction, ignore_index)
    loss, grad, report = kernel(logits, target, upstream, *options)
    assert loss.dtype == grad.dtype == torch.float32 and report.tolist() == [0] * 5
    truth = stock(logits, target, torch.float64, upstream, *options)
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
    assert_within_budget(grad, peer[1], truth[1], scale=scale, what="gradient")


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

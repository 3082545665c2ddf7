"""What the tests of the C++ upsample kernels share: their results, smooth logits, any problem at all."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck
from hypothesis import strategies as st
from upsample_checks import IGNORE, stock

from depict_kernels import extension
from depict_kernels.ops.compiled import upsample as kernels
from depict_kernels.testing import assert_within_budget

needs_extension = pytest.mark.skipif(extension.load("cpu") is not None, reason=str(extension.load("cpu")))
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def compiled(
    logits, target, *, upstream=None, ignore_index=IGNORE, weight=None, smoothing=0.0, reduction="mean"
):
    loss, grad, report = kernels.cross_entropy_forward(
        logits, target, weight, ignore_index, smoothing, reduction, True
    )
    assert not report.any()
    if reduction == "none":
        assert grad is None
        grad = kernels.cross_entropy_backward(upstream, logits, target, weight, ignore_index, smoothing)
    return loss, grad


def ulps(value, truth):
    return abs(value.double().item() - truth.item()) / (math.ulp(abs(truth.float().item())) * 2**29)


def smooth_logits(seed, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 150, 4, 4, generator=generator) * 4
    return F.interpolate(coarse, size=(16, 16), mode="bicubic", align_corners=True) * sharpness


@st.composite
def problems(draw):
    classes = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 19, 33, 64, 151]))
    batch = draw(st.integers(1, 2))
    low = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    high = draw(st.tuples(st.integers(1, 45), st.integers(1, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(
        st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    )
    sharpness = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 12.0, 20.0, 30.0, 200.0]))
    logits = (torch.randn(batch, classes, *low, generator=generator) * sharpness).to(dtype)
    if draw(st.booleans()):  # levels around the thresholds of the careful path
        levels = torch.tensor([0.0, -20.0, -41.0, -43.0, -65.0, -67.0, -90.0, -1000.0])
        picks = torch.randint(0, len(levels), logits.shape, generator=generator)
        logits = levels[picks].to(dtype) + logits / max(sharpness, 1)
    layout = draw(st.sampled_from(["contiguous", "channels last", "sliced", "transposed", "expanded"]))
    if layout == "channels last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        wide = torch.full((batch, classes + 3, low[0] * 2, low[1] * 3), torch.nan, dtype=dtype)
        wide[:, 1 : classes + 1, ::2, 1::3] = logits
        logits = wide[:, 1 : classes + 1, ::2, 1::3]
    elif layout == "transposed":
        logits = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    elif layout == "expanded":
        logits = logits[:1].expand(batch, -1, -1, -1)
    target_dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    target = torch.randint(0, classes, (batch, *high), generator=generator).to(target_dtype)
    runs = draw(st.integers(1, 9))
    target = target[..., torch.arange(high[1]) // runs * runs % high[1]].clone()
    ignored = draw(st.sampled_from([0.0, 0.3, 0.95, 1.0]))
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE
    if draw(st.booleans()):
        wide = torch.full((batch, high[0] * 2, high[1] * 2), 77, dtype=target_dtype)
        wide[:, 1::2, ::2] = target
        target = wide[:, 1::2, ::2]
    weight = draw(st.sampled_from(["none", "some", "zeros"]))
    if weight == "none":
        weight = None
    else:
        zeros = weight == "zeros"
        weight = torch.rand(classes, generator=generator) + 0.1
        if zeros:
            weight[torch.rand(classes, generator=generator) < 0.5] = 0
    smoothing = draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    upstream = torch.randn(target.shape, generator=generator)
    return logits, target, weight, smoothing, reduction, upstream


def check_problem(logits, target, weight, smoothing, reduction, upstream):
    options = {"weight": weight, "smoothing": smoothing, "reduction": reduction}
    if reduction == "none":
        options["upstream"] = upstream
    loss, grad = compiled(logits, target, **options)
    inner = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert loss.dtype == grad.dtype == inner
    valid = target != IGNORE
    total = (torch.ones(logits.shape[1]) if weight is None else weight)[target[valid].long()].sum()
    if reduction == "mean" and total == 0:  # torch divides by zero here
        assert loss == 0 and not grad.any()
        return
    truth, peer = stock(logits, target, torch.float64, **options), stock(logits, target, inner, **options)
    # A sum over pixels cancels: its terms are as large as logits and coefficients are.
    size = (logits.double().abs().max() * 2 + math.log(logits.shape[1]) + 1).item()
    heaviest = 1.0 if weight is None else max(weight.max().item(), weight.mean().item())
    pixels = {
        "mean": heaviest * valid.sum().item() / max(total.item(), 1e-30),
        "sum": heaviest * valid.sum().item(),
    }
    assert_within_budget(loss, peer[0], truth[0], scale=size * pixels.get(reduction, heaviest), what="loss")
    scale = {"mean": heaviest / max(total.item(), 1e-30), "sum": heaviest, "none": heaviest * 4}[reduction]
    share = max(1.0, target.shape[1] / logits.shape[2]) * max(1.0, target.shape[2] / logits.shape[3])
    # In float64 the truth has the rounding of its own sums.
    ulps = 64 if inner == torch.float64 else 8
    scale *= share * max(1.0, size / 64)
    assert_within_budget(grad, peer[1], truth[1], ulps=ulps, scale=scale, what="gradient")

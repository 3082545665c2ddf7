"""Label map and confusion matrix of the C++ kernels, on every instruction set."""

import math

import pytest
import torch
from cpp_problems import SETTINGS, needs_extension, problems, smooth_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from upsample_checks import IGNORE, upsample

from depict_kernels.ops.compiled import upsample as kernels
from depict_kernels.testing import max_error

pytestmark = needs_extension


@settings(max_examples=120, **SETTINGS)
@given(problem=problems(), integer=st.booleans())
def test_any_label_map_and_confusion(problem, integer):
    logits, target, *_ = problem
    if integer:
        logits = logits.float().clamp(-3, 3).round().to(logits.dtype)  # ties everywhere
    inner = torch.float64 if logits.dtype == torch.float64 else torch.float32
    size = tuple(target.shape[1:])
    labels = kernels.argmax(logits, size, torch.int64)
    high = upsample(logits.double(), size)
    rounding = 2 * max_error(upsample(logits.to(inner), size), high)
    rounding += 8 * torch.finfo(inner).eps * logits.double().abs().max().item()
    won = high.gather(1, labels[:, None])[:, 0]
    assert (won >= high.amax(1) - rounding).all()
    if logits.shape[1] <= 255:
        assert torch.equal(kernels.argmax(logits, size, torch.uint8).long(), labels)
    assert torch.equal(kernels.argmax(logits, size, torch.int32).long(), labels)

    classes = logits.shape[1]
    out = torch.arange(classes * classes).reshape(classes, classes)
    expected = out.clone()
    valid = target != IGNORE
    pairs = target[valid].long() * classes + labels[valid]
    expected += torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    kernels.confusion(logits, target, IGNORE, out)
    assert torch.equal(out, expected)


def test_label_map_equals_torch_on_random_and_smooth_logits(instruction_set):
    for logits in (torch.randn(1, 150, 16, 16, generator=torch.Generator().manual_seed(3)), smooth_logits(4)):
        high = upsample(logits, (256, 256))
        labels = kernels.argmax(logits, (256, 256), torch.int64)
        wrong = labels != high.argmax(1)
        two = upsample(logits.double(), (256, 256)).topk(2, 1).values
        assert ((two[:, 0] - two[:, 1])[wrong] <= 4e-7 * logits.abs().max()).all()
        assert wrong.sum() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 5, 8, 9, 15, 16, 17, 18, 31, 33, 34, 50])
def test_label_map_of_every_width(width, dtype, instruction_set):
    """Cells are taken a vector at a time; integers and sizes that are powers of 2 times the grid make it exact."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randint(-3, 4, (2, 21, 3, width), generator=generator).to(dtype)
    sizes = [
        (3 * 8, width * 4),
        (3 * 32, width * 16),
        (3, width),
        (6, width // 2 if width % 2 == 0 else width),
    ]
    for size in sizes:
        assert torch.equal(kernels.argmax(logits, size, torch.int64), upsample(logits, size).argmax(1)), size
    wide = torch.full((2, 24, 3, width + 40), torch.nan, dtype=dtype)  # nothing beyond a row counts
    wide[:, 1:22, :, 3 : width + 3] = logits
    part, size = wide[:, 1:22, :, 3 : width + 3], (29, width * 7 + 1)
    assert torch.equal(kernels.argmax(part, size, torch.uint8), kernels.argmax(logits, size, torch.uint8))


@pytest.mark.parametrize("classes", [362, 363, 500])
def test_confusion_of_many_classes(classes, threads):
    """From 363 classes on the threads share one matrix."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 5, 6, generator=generator)
    target = torch.randint(0, classes, (2, 61, 80), generator=generator)
    target[:, 20:40] = 17
    target[:, :, ::7] = -100
    labels = kernels.argmax(logits, (61, 80), torch.int64)
    valid = target != -100
    expected = torch.bincount(target[valid] * classes + labels[valid], minlength=classes**2) + 1
    bad = target.clone()
    bad[1, 50, 3] = classes
    for count in (1, 2, 4):
        threads(count)
        out = torch.ones(classes, classes, dtype=torch.int64)
        kernels.confusion(logits, target, -100, out)
        assert torch.equal(out.flatten(), expected)
        assert kernels.confusion(logits, bad, -100, out).tolist() == [1, classes, 1, 50, 3]
        assert torch.equal(out.flatten(), expected)


def test_ties_go_to_the_lowest_class(instruction_set):
    logits = torch.zeros(1, 37, 3, 3)
    logits[:, 5] = logits[:, 20] = 1.0
    assert (kernels.argmax(logits, (50, 50), torch.int64) == 5).all()
    assert (kernels.argmax(torch.zeros(1, 37, 3, 3), (50, 50), torch.int64) == 0).all()


def test_label_map_of_nan_logits_follows_torch():
    logits = torch.randn(1, 20, 6, 6)
    logits[0, 7, 2, 3] = logits[0, 11, 2, 3] = math.nan
    logits[0, 3, 4, 4] = math.inf
    labels = kernels.argmax(logits, (96, 96), torch.int64)
    assert torch.equal(labels, upsample(logits, (96, 96)).argmax(1))

"""Label map and confusion matrix of the CUDA upsample kernels; in the emulator without a GPU."""

import pytest
import torch
from upsample_checks import make

from depict_kernels import ops
from depict_kernels.ops.cuda_kernels import upsample
from depict_kernels.ops.reference import upsample as reference
from depict_kernels.testing import max_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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

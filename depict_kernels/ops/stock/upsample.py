"""F.interpolate, then F.cross_entropy, argmax or bincount: what everybody runs today."""

import torch
import torch.nn.functional as F
from torch import Tensor

from depict_kernels.ops.reference import upsample as reference
from depict_kernels.ops.reference.upsample import upsample


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """logits (B, C, h, w), int64 target (B, H, W) without bad labels -> loss in float32 or float64."""
    z = upsample(logits, target.shape[-2:])
    weight = None if weight is None else weight.to(z.dtype)

    def loss(kind: str) -> Tensor:
        return F.cross_entropy(
            z, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=kind
        )

    if reduction != "mean":
        return loss(reduction)
    # F.cross_entropy's mean is 0/0 where nothing is valid; here it is 0 with gradient 0.
    valid = target != ignore_index
    if weight is None:
        total = valid.sum().to(z.dtype)
    else:
        total = torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()
    return loss("sum") / torch.where(total == 0, torch.inf, total)


def argmax(logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(B, C, h, w) -> label map (B, H, W); one image at a time, to hold one image's upsampled logits."""
    labels = [upsample(image, size).argmax(1).to(dtype) for image in logits.split(1)]
    return torch.cat(labels) if labels else logits.new_empty((0, *size), dtype=dtype)


def confusion(logits: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> None:
    """Adds the counts of (target, label) into out (C, C) int64, one image at a time."""
    for image, labels in zip(logits.split(1), target.split(1)):
        reference.confusion(image, labels, ignore_index, out)

"""Loss, label map and confusion matrix by stock operators: as everybody runs them, and a few classes at a time.

``cross_entropy`` is F.interpolate and F.cross_entropy, which autograd and torch.compile see through and which keeps
several arrays of the upsampled logits' size. Everything else here goes image by image and upsamples as many classes at
a time as :func:`chunk_bytes` hold, as F.interpolate does it, to a rounding: the order of its additions depends on how
many classes and which strides it is given.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from depict_kernels.ops.reference import accumulation_dtype
from depict_kernels.ops.reference import upsample as reference
from depict_kernels.ops.reference.upsample import upsample, upsample_backward
from depict_kernels.ops.targets import sanitize_target

# Bytes of upsampled logits at a time. On a CPU glibc keeps blocks up to 32 MiB when they are freed, so that they are
# not mapped (and their pages not zeroed) anew for every chunk; a GPU needs larger ones to be busy.
CPU_CHUNK, CHUNK = 16 << 20, 64 << 20


def chunk_bytes(logits: Tensor) -> int:
    """Upsampled logits that are in memory at a time on this device; of one class at least."""
    return CPU_CHUNK if logits.device.type == "cpu" else CHUNK


def class_bytes(logits: Tensor, size: tuple[int, int]) -> int:
    """Of one class upsampled to ``size`` in all images, in float32 (float64 for float64 logits)."""
    return logits.shape[0] * size[0] * size[1] * (8 if logits.dtype == torch.float64 else 4)


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

    if reduction == "none":
        return loss("none")
    # On a GPU torch has no deterministic sum of an image's losses, but of numbers.
    total_loss = loss("none").sum() if torch.are_deterministic_algorithms_enabled() else loss("sum")
    if reduction == "sum":
        return total_loss
    # F.cross_entropy's mean is 0/0 where nothing is valid; here it is 0 with gradient 0.
    total = _label_weight(target, target == ignore_index, weight, z.dtype).sum()
    return total_loss / torch.where(total == 0, torch.inf, total)


def _upsampled(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """(first class, upsampled logits (B, k, H, W)) of a few classes k at a time."""
    step = max(1, chunk_bytes(logits) // max(1, class_bytes(logits, size)))
    for first in range(0, logits.shape[1], step):
        yield first, upsample(logits[:, first : first + step], size)


def _label_weight(target: Tensor, ignored: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The class weight of every pixel, 0 where the target is ignored; shaped as target."""
    if weight is None:
        return (~ignored).to(dtype)
    return torch.where(ignored, 0, weight.to(dtype)[torch.where(ignored, 0, target)])


class _Pixels:
    """What every pixel needs, all (B, 1, H, W), whatever the number of classes."""

    def __init__(self, logits, target, weight, ignore_index, label_smoothing):
        self.logits, self.size = logits, tuple(target.shape[-2:])
        target = target.unsqueeze(1)
        self.ignored = target == ignore_index
        self.label = target.masked_fill(self.ignored, -1)
        self.peak = self.sum = None
        for _, z in _upsampled(logits, self.size):
            peak = z.amax(1, keepdim=True)
            if self.peak is None:
                # The lowest finite number: classes that are all -inf must not make it inf - inf.
                self.peak = torch.full_like(peak, torch.finfo(z.dtype).min)
                self.sum = torch.zeros_like(peak)
            peak = torch.maximum(self.peak, peak)
            self.sum *= (self.peak - peak).exp_()
            self.sum += z.sub_(peak).exp_().sum(1, keepdim=True)
            self.peak = peak
        self.log_sum = self.sum.log()
        dtype = self.sum.dtype
        self.class_weight = None if weight is None else weight.to(dtype).view(1, -1, 1, 1)
        self.weight = _label_weight(target, self.ignored, weight, dtype)
        # in the gradient's precision
        total = logits.shape[1] if weight is None else self.class_weight.sum() if label_smoothing > 0 else 0
        self.hit = (1 - label_smoothing) * self.weight
        self.smooth = label_smoothing / logits.shape[1]
        # of the softmax in the gradient
        self.scale = self.hit + self.smooth * total if label_smoothing > 0 else self.hit

    def loss_and_gradient(self, factor: Tensor | float | None) -> tuple[Tensor, Tensor | None]:
        """Loss (B, 1, H, W) and, given ``factor``, broadcast over it, the gradient (B, C, h, w) of factor * loss."""
        loss, grad = torch.zeros_like(self.sum), None
        if factor is not None:
            grad = torch.empty(self.logits.shape, dtype=loss.dtype, device=loss.device)
            hit, scale = factor * self.hit, factor * self.scale
        for first, z in _upsampled(self.logits, self.size):
            log_p = z.sub_(self.peak).sub_(self.log_sum)
            count = log_p.shape[1]
            place = self.label - first
            inside = (place >= 0) & (place < count)
            place = place.masked_fill_(~inside, 0)
            loss = torch.where(inside, loss - self.hit * log_p.gather(1, place), loss)
            if self.smooth > 0:
                share = self.smooth
                if self.class_weight is not None:
                    share = share * self.class_weight[:, first : first + count]
                loss -= (log_p * share).sum(1, keepdim=True)
            if factor is None:
                continue
            g = log_p.exp_().mul_(scale)
            g.scatter_(1, place, g.gather(1, place) - torch.where(inside, hit, 0))
            if self.smooth > 0:
                g -= factor * share
            part = self.logits[:, first : first + count]
            grad[:, first : first + count] = upsample_backward(g.masked_fill_(self.ignored, 0), part.shape)
        return loss.masked_fill_(self.ignored, 0), grad


def _images(logits: Tensor, target: Tensor, *options) -> Iterator[_Pixels]:
    for i in range(len(logits)):
        yield _Pixels(logits[i : i + 1], target[i : i + 1], *options)


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As :func:`depict_kernels.ops.reference.upsample.cross_entropy_forward`, a few classes at a time."""
    dtype, logits = accumulation_dtype(logits.dtype), logits.contiguous()
    target, report = sanitize_target(target, logits.shape[1], ignore_index)
    options = (weight, ignore_index, label_smoothing)
    if reduction == "none":
        losses = [logits.new_empty((0, *target.shape[1:]), dtype=dtype)]
        losses += [
            pixels.loss_and_gradient(None)[0].squeeze(1) for pixels in _images(logits, target, *options)
        ]
        return torch.cat(losses), None, report
    value, total = torch.zeros((2,), dtype=dtype, device=logits.device)
    grads = [logits.new_empty((0, *logits.shape[1:]), dtype=dtype)]
    for pixels in _images(logits, target, *options):
        loss, grad = pixels.loss_and_gradient(1.0 if need_grad else None)
        value, total = value + loss.sum(), total + pixels.weight.sum()
        grads.append(grad)
    # The gradient is divided at its end, at low resolution.
    divisor = torch.where(total == 0, torch.inf, total) if reduction == "mean" else torch.ones_like(total)
    return value / divisor, torch.cat(grads).div_(divisor) if need_grad else None, report


def cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient (B, C, h, w) of the unreduced loss for the upstream gradient (B, H, W)."""
    dtype, logits = accumulation_dtype(logits.dtype), logits.contiguous()
    grads = [logits.new_empty((0, *logits.shape[1:]), dtype=dtype)]
    upstream = grad_loss.unsqueeze(1).to(dtype)
    target, _ = sanitize_target(target, logits.shape[1], ignore_index)
    for i, pixels in enumerate(_images(logits, target, weight, ignore_index, label_smoothing)):
        grads.append(pixels.loss_and_gradient(upstream[i : i + 1])[1])
    return torch.cat(grads)


def argmax(logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(B, C, h, w) -> label map (B, H, W); ties go to the lowest class, NaN before all, as in torch.argmax."""
    labels, logits = torch.empty((len(logits), *size), dtype=dtype, device=logits.device), logits.contiguous()
    for i in range(len(logits)):
        labels[i : i + 1] = _labels(logits[i : i + 1], size, dtype)
    return labels


def _labels(logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    peak = labels = None
    for first, z in _upsampled(logits, size):
        value, label = z.max(1)
        label = (label + first).to(dtype)
        if labels is None:
            peak, labels = value, label
            continue
        higher = (value > peak) | (value.isnan() & ~peak.isnan())
        peak, labels = torch.where(higher, value, peak), torch.where(higher, label, labels)
    return labels


def confusion(logits: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> Tensor:
    """Adds the counts of (target, label) into out (C, C) int64; the report."""
    return reference.count(argmax(logits, tuple(target.shape[-2:]), torch.int64), target, ignore_index, out)

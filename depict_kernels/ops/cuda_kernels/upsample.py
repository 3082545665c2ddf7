"""Backend ``cuda`` of the three upsample operators: allocates and calls csrc/cuda/upsample*.cu. Not yet run on a GPU.

float32 inside; float64 for sums over pixels. Nothing synchronises with the host. Tiles are cells of the
low-resolution grid in parts of at most 16 x 16 pixels; the gradient takes four samples of all classes per tile (21 MB
for 8 x 150 x 32 x 32 logits upsampled 16 times) and a packed copy of the logits besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depict_kernels.ops.cuda_kernels._library import DTYPES, call

__all__ = [
    "DTYPES",
    "REPORTS_BAD_TARGET",
    "argmax",
    "confusion",
    "cross_entropy_backward",
    "cross_entropy_forward",
]

REPORTS_BAD_TARGET = True  # the forward functions return the report of ops/targets.py as they read the labels
_LONGEST = 16  # pixels of a tile along an axis, as kLongest in csrc/cuda/upsample.h
_TABLE_INTS = 8  # of an AxisTile there


def _tiles(logits: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Tiles along y and x."""
    ceil_div = lambda a, b: (a + b - 1) // b
    return tuple(
        (samples + 1) * ceil_div(ceil_div(pixels, samples), _LONGEST)
        for pixels, samples in zip(size, logits.shape[2:])
    )


def _pack(
    logits: Tensor, size: tuple[int, int], weight: Tensor | None, *, smooth: bool = False, shift: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Packed logits (B, h, w, C), the map (B, h, w) beside them, the table of tiles."""
    batch, classes, h, w = logits.shape
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=logits.device)
    packed, table = new(batch, h, w, classes), new(sum(_tiles(logits, size)), _TABLE_INTS, dtype=torch.int32)
    beside = new(batch, h, w) if smooth or not shift else None
    maps = (beside if smooth else None, None if shift else beside)
    call("upsample_pack", logits, weight, packed, *maps, table, *size, device=logits.device)
    return packed, beside, table


def _run_tiles(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    *,
    upstream: Tensor | None = None,
    pixel_loss: Tensor | None = None,
    partial: Tensor | None = None,
    bad: Tensor | None = None,
    samples: bool = False,
) -> Tensor | None:
    """Fills pixel_loss, partial and bad as far as given; returns the tiles' gradients if asked."""
    size = tuple(target.shape[1:])
    smooth = label_smoothing > 0
    if weight is not None:
        weight = weight.float().contiguous()
    packed, smoothed, table = _pack(logits, size, weight, smooth=smooth, shift=True)
    gradients = None
    if samples:
        down, across = _tiles(logits, size)
        shape = (logits.shape[0] * down * across, 4, logits.shape[1])
        gradients = torch.empty(shape, dtype=torch.float32, device=logits.device)
    call(
        "upsample_cross_entropy",
        packed,
        smoothed,
        table,
        target,
        weight,
        weight.sum() if smooth and weight is not None else None,
        upstream,
        pixel_loss,
        partial,
        bad,
        gradients,
        ignore_index,
        label_smoothing,
        device=logits.device,
    )
    return gradients


def _gather(samples: Tensor, scale: Tensor | None, logits: Tensor, size: tuple[int, int]) -> Tensor:
    grad = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    call("upsample_gather", samples, scale, grad, *size, device=logits.device)
    return grad


def _finish(
    logits: Tensor,
    target: Tensor,
    bad: Tensor,
    ignore_index: int,
    partial: Tensor | None = None,
    loss: Tensor | None = None,
    scale: Tensor | None = None,
    mean: bool = False,
) -> Tensor:
    """Writes loss and scale if given; returns the report of bad labels, int64 (5,)."""
    report = torch.empty(5, dtype=torch.int64, device=target.device)
    grid = logits.shape[2:]
    options = (mean, ignore_index)
    call("upsample_finish", target, *grid, bad, partial, loss, scale, report, *options, device=target.device)
    return report


def _new_bad(logits: Tensor, size: tuple[int, int]) -> Tensor:
    down, across = _tiles(logits, size)
    return torch.empty(logits.shape[0] * down * across, dtype=torch.int64, device=logits.device)


def _is_empty(target: Tensor) -> bool:
    """Of an empty batch even height and width may be 0: there is nothing to cut into tiles."""
    return target.numel() == 0


def cross_entropy_forward(
    logits: Tensor,  # (B, C, h, w)
    target: Tensor,  # (B, H, W)
    weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss (scalar, or (B, H, W) for "none"), for scalar reductions its gradient (B, C, h, w), and the report.

    Both are float32. A label that is neither a class nor ``ignore_index`` counts as ignored; the report, int64 (5,),
    is [1 if there is any, first such label, its b, y, x].
    """
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=logits.device)
    none = reduction == "none"
    if _is_empty(target):
        loss = new(*target.shape) if none else new().zero_()
        grad = new(*logits.shape) if need_grad and not none else None
        return loss, grad, new(5, dtype=torch.int64).zero_()
    bad = _new_bad(logits, target.shape[1:])
    options = (weight, ignore_index, label_smoothing)
    if none:
        loss = new(*target.shape)
        _run_tiles(logits, target, *options, pixel_loss=loss, bad=bad)
        return loss, None, _finish(logits, target, bad, ignore_index)
    partial, loss, scale = new(bad.shape[0], 2, dtype=torch.float64), new(), new()
    samples = _run_tiles(logits, target, *options, partial=partial, bad=bad, samples=need_grad)
    report = _finish(logits, target, bad, ignore_index, partial, loss, scale, reduction == "mean")
    grad = None if samples is None else _gather(samples, scale, logits, target.shape[1:])
    return loss, grad, report


def cross_entropy_backward(
    grad_loss: Tensor,  # (B, H, W)
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient (B, C, h, w) of the unreduced loss, float32, for the upstream gradient."""
    if _is_empty(target):
        return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    samples = _run_tiles(
        logits, target, weight, ignore_index, label_smoothing, upstream=grad_loss, samples=True
    )
    return _gather(samples, None, logits, target.shape[1:])


def _run_labels(
    logits: Tensor,
    size: tuple[int, int],
    labels: Tensor | None = None,
    target: Tensor | None = None,
    bad: Tensor | None = None,
    counts: Tensor | None = None,
    ignore_index: int = 0,
) -> None:
    packed, magnitude, table = _pack(logits, size, None, shift=False)
    outputs = (labels, target, bad, counts)
    call("upsample_labels", packed, magnitude, table, *size, *outputs, ignore_index, device=logits.device)


def argmax(logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(B, C, h, w) -> label map (B, H, W); ties go to the lowest class index, as in torch.argmax."""
    labels = torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)
    _run_labels(logits, size, labels)
    return labels


def confusion(logits: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> Tensor:
    """Adds the counts of (target, label) over the valid pixels into out (C, C) int64; returns the report."""
    if _is_empty(target):
        return torch.zeros(5, dtype=torch.int64, device=target.device)
    bad = _new_bad(logits, target.shape[1:])
    _run_labels(logits, target.shape[1:], None, target, bad, out, ignore_index)
    return _finish(logits, target, bad, ignore_index)

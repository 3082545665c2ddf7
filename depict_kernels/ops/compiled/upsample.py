"""Backend ``cpp`` of the three upsample operators: allocates, calls csrc/cpu/upsample.cpp.

The kernels take float32 and float64; half precision logits, which are small here, are converted first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depict_kernels.ops.compiled._library import ops


def _inputs(logits: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    logits = logits.detach()
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if weight is not None:
        weight = weight.detach().to(torch.float64).contiguous()
    return logits, weight


def _rows(logits: Tensor) -> Tensor:
    """For the label map, which reads rows in whole vectors."""
    logits, _ = _inputs(logits)
    return logits if logits.stride(3) == 1 else logits.contiguous()


def _report(bad: int, target: Tensor) -> Tensor:
    """The report of ops/targets.py, int64 (5,), of the first bad label's linear index, or -1."""
    if bad < 0:
        return torch.zeros(5, dtype=torch.int64)
    height, width = target.shape[1:]
    b, y, x = bad // (height * width), bad // width % height, bad % width
    return torch.tensor([1, target[b, y, x].item(), b, y, x])


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

    Both are float32, or float64 for float64 logits.
    """
    logits, weight = _inputs(logits, weight)
    single = reduction == "none"
    loss = logits.new_empty(target.shape if single else ())
    grad = logits.new_empty(logits.shape) if need_grad and not single else None
    bad = ops().cross_entropy(
        logits,
        target,
        weight,
        None,
        None if single else loss,
        loss if single else None,
        grad,
        ignore_index,
        label_smoothing,
        reduction == "mean",
    )
    return loss, grad, _report(bad, target)


def cross_entropy_backward(
    grad_loss: Tensor,  # (B, H, W)
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient (B, C, h, w) of reduction "none"."""
    logits, weight = _inputs(logits, weight)
    grad = logits.new_empty(logits.shape)
    grad_loss = grad_loss.detach().to(logits.dtype).contiguous()
    ops().cross_entropy(
        logits, target, weight, grad_loss, None, None, grad, ignore_index, label_smoothing, False
    )
    return grad


def argmax(logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Label map (B, H, W) in ``dtype`` (uint8, int32 or int64)."""
    logits = _rows(logits)
    labels = torch.empty((logits.shape[0], *size), dtype=dtype)
    ops().label_map(logits, labels, size[0], size[1], None, 0, None)
    return labels


def confusion(logits: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> Tensor:
    """Adds the label map's counts to ``out`` (C, C) int64, rows = target; nothing if a label is bad. The report."""
    if target.numel() == 0:
        return _report(-1, target)
    logits = _rows(logits)
    counts = out if out.is_contiguous() else torch.zeros_like(out, memory_format=torch.contiguous_format)
    bad = ops().label_map(logits, None, target.shape[1], target.shape[2], target, ignore_index, counts)
    if counts is not out:
        out += counts
    return _report(bad, target)

"""Backend ``cpp`` of the three upsample operators: allocates, calls csrc/cpu/upsample.cpp, raises on bad labels.

The kernels take float32 and float64; half precision logits, which are small here, are converted first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depict_kernels import extension
from depict_kernels.ops.targets import bad_target_message

RAISES_ON_BAD_TARGET = True  # the kernels check labels as they read them


def _ops():
    reason = extension.load("cpu")
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.depict_kernels_cpu


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


def _check_bad(bad: int, target: Tensor, classes: int, ignore_index: int) -> None:
    if bad < 0:
        return
    height, width = target.shape[1:]
    b, y, x = bad // (height * width), bad // width % height, bad % width
    report = [1, target[b, y, x].item(), b, y, x]
    raise ValueError(bad_target_message(report, classes, ignore_index))


def cross_entropy_forward(
    logits: Tensor,  # (B, C, h, w)
    target: Tensor,  # (B, H, W)
    weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss (scalar, or (B, H, W) for "none") and, for scalar reductions, its gradient (B, C, h, w).

    Both are float32, or float64 for float64 logits. Raises ValueError naming the first label that is neither a
    class nor ``ignore_index``, and its (b, y, x).
    """
    logits, weight = _inputs(logits, weight)
    single = reduction == "none"
    loss = logits.new_empty(target.shape if single else ())
    grad = logits.new_empty(logits.shape) if need_grad and not single else None
    bad = _ops().cross_entropy(
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
    _check_bad(bad, target, logits.shape[1], ignore_index)
    return loss, grad


def cross_entropy_backward(
    grad_loss: Tensor,  # (B, H, W)
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient (B, C, h, w) of reduction "none". Labels that are no class count as ignored."""
    logits, weight = _inputs(logits, weight)
    grad = logits.new_empty(logits.shape)
    grad_loss = grad_loss.detach().to(logits.dtype).contiguous()
    _ops().cross_entropy(
        logits, target, weight, grad_loss, None, None, grad, ignore_index, label_smoothing, False
    )
    return grad


def argmax(logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Label map (B, H, W) in ``dtype`` (uint8, int32 or int64)."""
    logits = _rows(logits)
    labels = torch.empty((logits.shape[0], *size), dtype=dtype)
    _ops().label_map(logits, labels, size[0], size[1], None, 0, None)
    return labels


def confusion(logits: Tensor, target: Tensor, ignore_index: int, out: Tensor) -> None:
    """Adds the label map's counts to ``out`` (C, C) int64, rows = target; adds nothing if a label is bad."""
    if target.numel() == 0:
        return
    logits = _rows(logits)
    counts = out if out.is_contiguous() else torch.zeros_like(out, memory_format=torch.contiguous_format)
    bad = _ops().label_map(logits, None, target.shape[1], target.shape[2], target, ignore_index, counts)
    _check_bad(bad, target, logits.shape[1], ignore_index)
    if counts is not out:
        out += counts

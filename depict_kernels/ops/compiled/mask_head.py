"""Backend ``cpp`` of the mask head: allocates, calls csrc/cpu/mask_head.cpp.

The formulas are in ops/reference/mask_head.py. The kernels take float32 and float64, patches and classes in any strides
of the first two dimensions; half precision is converted first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depict_kernels.ops.compiled._library import ops, rows
from depict_kernels.ops.reference import accumulation_dtype


def _tokens(*tensors: Tensor) -> list[Tensor]:
    """(B, N, D) as the kernels take it: (B, N, 1, D)."""
    return [t.unsqueeze(2) for t in rows(*tensors)]


def mask_logits_forward(
    patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """patches (B, N, D), classes (B, C, D), weight and bias (C,) -> logits (B, C, h, w) in weight's dtype.

    Also what backward needs: 1/|patch| (B, N), 1/|class| (B, C), LayerNorm's mean and 1/std (B, N).
    """
    dtype = accumulation_dtype(patches.dtype)
    (batch, n, _), c = patches.shape, classes.shape[1]
    logits = patches.new_empty((batch, c, *grid), dtype=dtype)
    statistics = [patches.new_empty((batch, count), dtype=dtype) for count in (n, c, n, n)]
    if 0 in (batch, n, c):
        return logits.to(weight.dtype), *(t.zero_() for t in statistics)
    parameters = [t.to(dtype).contiguous() for t in (weight, bias)]
    ops().mask_head_forward(*_tokens(patches, classes), *parameters, eps, logits, *statistics)
    return logits.to(weight.dtype), *statistics


def mask_logits_backward(
    grad: Tensor,
    patches: Tensor,
    classes: Tensor,
    weight: Tensor,
    inv_x: Tensor,
    inv_q: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of patches, classes, weight and bias for the gradient (B, C, h, w) of the logits."""
    dtype = accumulation_dtype(patches.dtype)
    grads = [torch.empty(t.shape, dtype=dtype) for t in (patches, classes, weight, weight)]
    if grad.numel() == 0:
        for t in grads:
            t.zero_()
    else:
        statistics = [t.contiguous() for t in (inv_x, inv_q, mean, rstd)]
        ops().mask_head_backward(
            grad.to(dtype).contiguous(),
            *_tokens(patches, classes),
            weight.to(dtype).contiguous(),
            *statistics,
            *(g.unsqueeze(2) for g in grads[:2]),
            *grads[2:],
        )
    return tuple(g.to(t.dtype) for g, t in zip(grads, (patches, classes, weight, weight)))

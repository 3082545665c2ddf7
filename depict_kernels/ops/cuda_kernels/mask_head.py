"""The mask head in CUDA C++ (csrc/cuda/mask_head_*.cu); the formulas are in ops/reference/mask_head.py."""

from __future__ import annotations

import torch
from torch import Tensor

from depict_kernels.ops.cuda_kernels._library import DTYPES, call, empty_like, precise

ROWS, ALIGN = 64, 8  # csrc/cuda/mask_head.h: patches of one block, multiple of padded classes


def _rows(patches: Tensor, classes: Tensor, weight: Tensor) -> list[Tensor]:
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"backend cuda takes weight and bias in float16, bfloat16 or float32, got {weight.dtype}; cast them"
        )
    return [t if t.stride(-1) == 1 else t.contiguous() for t in (patches, classes)]


def _splits(batch: int, n: int, c: int, dim: int) -> int:
    """Parts in which the sum over the patches goes: about as many blocks as a large GPU has multiprocessors.

    Whatever this GPU has: results are the same on all. Every part has at least 256 patches.
    """
    tiles = batch * -(-c // (32 if c <= 32 else 160)) * -(-dim // 64)
    return max(1, min(-(-n // 256), 128 // max(1, tiles)))


def mask_logits_forward(
    patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """patches (B, N, D), classes (B, C, D), weight and bias (C,) -> logits (B, C, h, w) in weight's dtype.

    Also what backward needs: 1/|patch| (B, N), 1/|class| (B, C), LayerNorm's mean and 1/std (B, N).
    """
    x, q = _rows(patches, classes, weight)
    batch, n, _ = x.shape
    c = q.shape[1]
    logits = torch.empty((batch, c, n), dtype=weight.dtype, device=x.device)
    inv_x, inv_q, mean, rstd = (
        torch.empty((batch, rows), dtype=torch.float32, device=x.device) for rows in (n, c, n, n)
    )
    if logits.numel() == 0:
        return logits.view(batch, c, *grid), inv_x.zero_(), inv_q.zero_(), mean.zero_(), rstd.zero_()
    call(
        "mask_head_forward",
        x, q, weight.contiguous(), bias.contiguous(), eps, logits, inv_x, inv_q, mean, rstd, precise(x.dtype),
        device=x.device,
    )  # fmt: skip
    return logits.view(batch, c, *grid), inv_x, inv_q, mean, rstd


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
    x, q = _rows(patches, classes, weight)
    batch, n, dim = x.shape
    c = q.shape[1]
    weight = weight.contiguous()
    grads = empty_like(x), empty_like(q), empty_like(weight), empty_like(weight)
    if grad.numel() == 0:
        return tuple(g.zero_() for g in grads)
    scratch = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    products_grad = torch.empty((batch, n, -(-c // ALIGN) * ALIGN), dtype=x.dtype, device=x.device)
    blocks = -(-n // ROWS)
    call(
        "mask_head_backward",
        grad.contiguous().flatten(2), x, q, weight, inv_x, inv_q, mean, rstd,
        products_grad, scratch(batch, n), scratch(3, c, batch * blocks),
        scratch(_splits(batch, n, c, dim), batch, c, dim), scratch(batch, blocks), scratch(batch), *grads,
        precise(x.dtype), device=x.device,
    )  # fmt: skip
    return grads

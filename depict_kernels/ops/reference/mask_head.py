"""The mask head: cosines of patches and class embeddings, then LayerNorm over the classes."""

import torch
from torch import Tensor

from depict_kernels.ops.reference import accumulation_dtype


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| over the last dimension, and 0 for a zero vector: zero vectors give zeros, not NaN."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    return torch.where(norm > 0, 1 / norm, 0)


def mask_logits_forward(
    patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """patches (B, N, D), classes (B, C, D), weight and bias (C,) -> logits (B, C, h, w) in weight's dtype.

    Also what backward needs: 1/|patch| (B, N), 1/|class| (B, C), LayerNorm's mean and 1/std (B, N).
    """
    dtype = accumulation_dtype(patches.dtype)
    x, q = patches.to(dtype), classes.to(dtype)
    inv_x, inv_q = _inverse_norm(x), _inverse_norm(q)
    m = (x * inv_x[..., None]) @ (q * inv_q[..., None]).mT  # (B, N, C)
    mean = m.mean(-1)
    rstd = ((m - mean[..., None]).square().mean(-1) + eps).rsqrt()
    y = (m - mean[..., None]) * rstd[..., None] * weight.to(dtype) + bias.to(dtype)
    logits = y.mT.reshape(y.shape[0], y.shape[2], *grid).to(weight.dtype).contiguous()
    return logits, inv_x, inv_q, mean, rstd


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
    g = grad.to(dtype).flatten(2).mT  # (B, N, C)
    x = patches.to(dtype) * inv_x[..., None]
    q = classes.to(dtype) * inv_q[..., None]
    z = (x @ q.mT - mean[..., None]) * rstd[..., None]
    grad_weight, grad_bias = (g * z).sum((0, 1)), g.sum((0, 1))
    g = g * weight.to(dtype)
    grad_m = rstd[..., None] * (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True))
    grad_patches = _normalize_backward(grad_m @ q, x, inv_x)
    grad_classes = _normalize_backward(grad_m.mT @ x, q, inv_q)
    return (
        grad_patches.to(patches.dtype),
        grad_classes.to(classes.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )


def _normalize_backward(grad: Tensor, unit: Tensor, inverse_norm: Tensor) -> Tensor:
    """The part of grad orthogonal to the unit vector, over the norm."""
    return inverse_norm[..., None] * (grad - unit * (grad * unit).sum(-1, keepdim=True))

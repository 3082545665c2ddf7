"""Subspace attention by torch's scaled_dot_product_attention, whichever of its kernels applies."""

import torch.nn.functional as F
from torch import Tensor


def self_attention(w: Tensor, scale: float) -> Tensor:
    """w (B, N, H, d) -> (B, N, H, d)."""
    return cross_attention(w, w, scale)


def cross_attention(q: Tensor, w: Tensor, scale: float) -> Tensor:
    """q (B, M, H, d), w (B, N, H, d) -> (B, M, H, d)."""
    k = w.transpose(1, 2)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, k, scale=scale).transpose(1, 2)

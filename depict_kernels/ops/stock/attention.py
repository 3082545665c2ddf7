"""Subspace attention by torch's scaled_dot_product_attention, whichever of its kernels applies."""

import contextlib

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def self_attention(w: Tensor, scale: float, followed: bool = False) -> Tensor:
    """w (B, N, H, d) -> (B, N, H, d)."""
    return cross_attention(w, w, scale, followed)


def cross_attention(q: Tensor, w: Tensor, scale: float, followed: bool = False) -> Tensor:
    """q (B, M, H, d), w (B, N, H, d) -> (B, M, H, d).

    ``followed``: by a transform, of which torch's fused kernels know neither forward mode nor second derivatives.
    """
    k = w.transpose(1, 2)
    with sdpa_kernel(SDPBackend.MATH) if followed else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, k, scale=scale).transpose(1, 2)

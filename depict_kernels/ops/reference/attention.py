"""Subspace attention: softmax(scale q k^T) v with q, k and v from one shared projection (DEPICT, eq. 7 and 11)."""

import torch
from torch import Tensor

from depict_kernels.ops.reference import accumulation_dtype


def self_attention_forward(w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """w (B, N, H, d) -> out (B, N, H, d), log-sum-exp of the scaled scores (B, H, N)."""
    return cross_attention_forward(w, w, scale)


def self_attention_backward(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """The query-, key- and value-side gradients of w, added up: (B, N, H, d)."""
    grad_q, grad_w = _backward(grad, w, w, out, lse, scale)
    return (grad_q + grad_w).to(w.dtype).contiguous()


def cross_attention_forward(q: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, M, H, d), w (B, N, H, d) -> out (B, M, H, d), log-sum-exp (B, H, M)."""
    dtype = accumulation_dtype(w.dtype)
    scores = scale * torch.einsum("bmhd,bnhd->bhmn", q.to(dtype), w.to(dtype))
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhmn,bnhd->bmhd", (scores - lse[..., None]).exp(), w.to(dtype))
    return out.to(q.dtype).contiguous(), lse


def cross_attention_backward(
    grad: Tensor, q: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q (B, M, H, d) and of w (B, N, H, d), which is key and value."""
    grad_q, grad_w = _backward(grad, q, w, out, lse, scale)
    return grad_q.to(q.dtype).contiguous(), grad_w.to(w.dtype).contiguous()


def _backward(grad, q, w, out, lse, scale):
    dtype = accumulation_dtype(w.dtype)
    grad, q, w, out = (t.to(dtype) for t in (grad, q, w, out))
    p = (scale * torch.einsum("bmhd,bnhd->bhmn", q, w) - lse[..., None]).exp()
    grad_p = torch.einsum("bmhd,bnhd->bhmn", grad, w)
    delta = (grad * out).sum(-1).transpose(1, 2)  # (B, H, M): sum over keys of p * grad_p
    grad_scores = scale * p * (grad_p - delta[..., None])
    grad_q = torch.einsum("bhmn,bnhd->bmhd", grad_scores, w)
    grad_k = torch.einsum("bhmn,bmhd->bnhd", grad_scores, q)
    grad_v = torch.einsum("bhmn,bmhd->bnhd", p, grad)
    return grad_q, grad_k + grad_v

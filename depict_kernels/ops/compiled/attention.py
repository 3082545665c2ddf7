"""Backend ``cpp`` of subspace attention: allocates, calls csrc/cpu/attention.cpp.

The formulas are in ops/reference/attention.py. The kernels take float32 and float64, in any strides of the first three
dimensions; half precision is converted first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depict_kernels.ops.compiled._library import ops, rows


def _empty(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def self_attention_forward(w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """w (B, N, H, d) -> out (B, N, H, d), log-sum-exp of the scaled scores (B, H, N)."""
    return _forward(None, w, w.dtype, scale)


def cross_attention_forward(q: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, M, H, d), w (B, N, H, d) -> out (B, M, H, d), log-sum-exp (B, H, M)."""
    return _forward(*rows(q), w, q.dtype, scale)


def _forward(q: Tensor | None, w: Tensor, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    (w,) = rows(w)
    batch, queries, heads, _ = (w if q is None else q).shape
    out = _empty(w if q is None else q)
    lse = w.new_empty((batch, heads, queries))
    ops().attention_forward(q, w, out, lse, scale)
    return out.to(dtype), lse


def self_attention_backward(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """The query-, key- and value-side gradients of w, added up: (B, N, H, d)."""
    grad, tokens, out = rows(grad, w, out)
    grad_w = _empty(tokens)
    ops().attention_backward(grad, None, tokens, out, lse, None, grad_w, scale)
    return grad_w.to(w.dtype)


def cross_attention_backward(
    grad: Tensor, q: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q (B, M, H, d) and of w (B, N, H, d), key and value side added up."""
    grad, queries, tokens, out = rows(grad, q, w, out)
    grad_q, grad_w = _empty(queries), _empty(tokens)
    ops().attention_backward(grad, queries, tokens, out, lse, grad_q, grad_w, scale)
    return grad_q.to(q.dtype), grad_w.to(w.dtype)

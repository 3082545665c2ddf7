"""Subspace attention in CUDA C++ (csrc/cuda/attention_*.cu); the formulas are in ops/reference/attention.py.

Layout (B, N, H, d) with any strides of the first three dimensions; a tensor whose last dimension is strided is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from depict_kernels import measured
from depict_kernels.ops.cuda_kernels._library import DTYPES, call, empty_like, precise

__all__ = ["DTYPES"]

MAX_HEAD_DIM = 128
_SELF, _QUERY, _KEY = 0, 1, 2

# Variants of the kernels: MMA runs everywhere; WGMMA (csrc/cuda/attention_sm90.cu) is for 16-bit types on compute
# capability 9.0 and exists for the forward pass and for the gradient of self-attention.
MMA, WGMMA = 0, 1
# Which of them measured faster is in measured.py.
_forced: int | None = None


@contextlib.contextmanager
def force_variant(variant: int) -> Iterator[None]:
    """For tests and benchmarks: every direction that has ``variant`` uses it, in all threads, or raises."""
    global _forced
    before, _forced = _forced, variant
    try:
        yield
    finally:
        _forced = before


def _variant(direction: str, tensor: Tensor) -> int:
    """The kernels' variant for ``direction``, "forward" or "self_backward"."""
    if _forced is not None:
        return _forced
    table = measured.WGMMA_FROM_HEAD_DIM
    if not table or tensor.dtype == torch.float32 or tensor.device.type != "cuda":
        return MMA
    major, minor = torch.cuda.get_device_capability(tensor.device)
    least = table.get(f"sm_{major}{minor}", {}).get(direction)
    return MMA if least is None or tensor.shape[-1] < least else WGMMA


def _rows(*tensors: Tensor) -> list[Tensor]:
    dim = tensors[0].shape[-1]
    if dim > MAX_HEAD_DIM:
        raise ValueError(
            f"backend cuda takes head_dim up to {MAX_HEAD_DIM}, got {dim}; use backend='triton' or 'torch'"
        )
    return [t if t.stride(-1) == 1 or dim == 1 else t.contiguous() for t in tensors]


def self_attention_forward(w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """w (B, N, H, d) -> out (B, N, H, d), log-sum-exp of the scaled scores (B, H, N)."""
    return cross_attention_forward(w, w, scale)


def cross_attention_forward(q: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, M, H, d), w (B, N, H, d) -> out (B, M, H, d), log-sum-exp (B, H, M)."""
    q, w = _rows(q, w)
    batch, queries, heads, _ = q.shape
    out = empty_like(q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    variant = _variant("forward", q)
    call("attention_forward", q, w, out, lse, scale, precise(q.dtype), variant, device=q.device)
    return out, lse


def self_attention_backward(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """The query-, key- and value-side gradients of w, added up: (B, N, H, d)."""
    if w.numel() == 0:  # an expanded gradient of no elements is contiguous to torch, whatever its strides
        return empty_like(w)
    grad, w = _rows(grad, w)
    return _gradient(w, w, grad, lse, _delta(grad, out, scale), scale, _SELF)


def cross_attention_backward(
    grad: Tensor, q: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q (B, M, H, d) and of w (B, N, H, d), which is key and value."""
    if q.numel() == 0:
        return empty_like(q), empty_like(w).zero_()
    grad, q, w = _rows(grad, q, w)
    delta = _delta(grad, out, scale)
    return (
        _gradient(q, w, grad, lse, delta, scale, _QUERY),
        _gradient(w, q, grad, lse, delta, scale, _KEY),
    )


def _delta(grad: Tensor, out: Tensor, scale: float) -> Tensor:
    batch, queries, heads, _ = grad.shape
    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=grad.device)
    call("attention_delta", grad, out, delta, scale, device=grad.device)
    return delta


def _gradient(
    x: Tensor, y: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, scale: float, role: int
) -> Tensor:
    out = empty_like(x)
    variant = _variant("self_backward", x) if role == _SELF else MMA
    call(
        "attention_backward",
        *(x, y, grad, lse, delta, out, scale, role, precise(x.dtype), variant),
        device=x.device,
    )
    return out

"""Subspace attention with one shared projection: public functions, checks, registration, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from depict_kernels import backends
from depict_kernels.ops import _library
from depict_kernels.ops.reference import accumulation_dtype
from depict_kernels.ops.stock import attention as stock

_STEM = "attention"


def subspace_self_attention(w: Tensor, scale: float | None = None, *, backend: str = "auto") -> Tensor:
    """softmax(scale w w^T) w per head: the core of MSSA (DEPICT, arXiv 2411.03033, eq. 7).

    Args:
        w: (B, N, H, d) floating point, any strides: LN(x) P^T, one projection for query, key and value.
        scale: factor on the scores; None means d ** -0.5.
        backend: see :mod:`depict_kernels.backends`.

    Returns:
        (B, N, H, d) in w's dtype (the autocast dtype under autocast). Differentiable in w.

    Raises:
        TypeError, ValueError: w is not a floating tensor of four dimensions.
        BackendUnavailable: a backend named explicitly cannot run here.

    Large scores (scale included): the output holds for any that float32 holds, with backend "triton" on a GPU up to
    1e8, NaN beyond. Gradients form the weights again from their float32 log-sum-exp, as flash attention's do: those of
    a score s are off by a factor of about 1 + 1e-7 |s|, so that gradients mean nothing beyond 1e6 and may be NaN or
    infinite beyond 1e8.
    """
    _check(w=w)
    (w,) = _library.autocast(w)
    scale = w.shape[-1] ** -0.5 if scale is None else float(scale)
    sizes = {"tokens": w.shape[1], "head_dim": w.shape[3]}
    backend = backends.choose(backend, "subspace_self_attention", w, **sizes)
    if backend == "torch":
        return stock.self_attention(w, scale, backends.followed(w))
    return torch.ops.depict_kernels.subspace_self_attention(w, scale, backend)[0]


def subspace_cross_attention(
    q: Tensor, w: Tensor, scale: float | None = None, *, backend: str = "auto"
) -> Tensor:
    """softmax(scale q w^T) w per head: the core of MSCA (DEPICT, arXiv 2411.03033, eq. 11).

    Large scores are as in :func:`subspace_self_attention`.

    Args:
        q: (B, M, H, d) projected class queries.
        w: (B, N, H, d) projected patches: keys and values. Same dtype and device as q.
        scale: factor on the scores; None means d ** -0.5.
        backend: see :mod:`depict_kernels.backends`.

    Returns:
        (B, M, H, d) in q's dtype (the autocast dtype under autocast). Differentiable in q and w.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices of q and w do not fit each other.
        BackendUnavailable: a backend named explicitly cannot run here.
    """
    _check(q=q, w=w)
    if q.shape[0] != w.shape[0] or q.shape[2:] != w.shape[2:]:
        raise ValueError(f"q (B, M, H, d) and w (B, N, H, d) differ: {tuple(q.shape)} and {tuple(w.shape)}")
    if w.shape[1] == 0:
        raise ValueError(f"w must hold at least one key, got {tuple(w.shape)}")
    q, w = _library.autocast(q, w)
    if q.dtype != w.dtype:
        raise TypeError(f"q and w must have one dtype, got {q.dtype} and {w.dtype}")
    if q.device != w.device:
        raise ValueError(f"q is on {q.device} and w on {w.device}; move one of them")
    scale = w.shape[-1] ** -0.5 if scale is None else float(scale)
    sizes = {"tokens": w.shape[1], "head_dim": w.shape[3]}
    backend = backends.choose(backend, "subspace_cross_attention", w, q, **sizes)
    if backend == "torch":
        return stock.cross_attention(q, w, scale, backends.followed(q, w))
    return torch.ops.depict_kernels.subspace_cross_attention(q, w, scale, backend)[0]


def _check(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        _library.check_tensor(name, t, floating=True)
        if t.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, tokens, heads, head_dim), got {tuple(t.shape)}")
        if t.shape[-1] == 0:
            raise ValueError(f"{name} must have head_dim >= 1, got {tuple(t.shape)}")


# --- registration: kernels' forward gives the output and the log-sum-exp, all that backward needs ---


def _lse_like(q: Tensor) -> Tensor:
    batch, tokens, heads, _ = q.shape
    return q.new_empty((batch, heads, tokens), dtype=accumulation_dtype(q.dtype))


def _empty(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


_library.define(
    "subspace_self_attention",
    "(Tensor w, float scale, str backend) -> (Tensor, Tensor)",
    stem=_STEM,
    fake=lambda w, scale, backend: (_empty(w), _lse_like(w)),
    run=lambda kernels, *args: kernels.self_attention_forward(*args),
)
_library.define(
    "subspace_self_attention_backward",
    "(Tensor grad, Tensor w, Tensor out, Tensor lse, float scale, str backend) -> Tensor",
    stem=_STEM,
    fake=lambda grad, w, out, lse, scale, backend: _empty(w),
    run=lambda kernels, *args: kernels.self_attention_backward(*args),
)
_library.define(
    "subspace_cross_attention",
    "(Tensor q, Tensor w, float scale, str backend) -> (Tensor, Tensor)",
    stem=_STEM,
    fake=lambda q, w, scale, backend: (_empty(q), _lse_like(q)),
    run=lambda kernels, *args: kernels.cross_attention_forward(*args),
)
_library.define(
    "subspace_cross_attention_backward",
    "(Tensor grad, Tensor q, Tensor w, Tensor out, Tensor lse, float scale, str backend) -> (Tensor, Tensor)",
    stem=_STEM,
    fake=lambda grad, q, w, out, lse, scale, backend: (_empty(q), _empty(w)),
    run=lambda kernels, *args: kernels.cross_attention_backward(*args),
)


def _save_self(ctx, inputs, output):
    w, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(w, *output)


def _backward_self(ctx, grad, _grad_lse):
    w, out, lse = ctx.saved_tensors
    return (
        torch.ops.depict_kernels.subspace_self_attention_backward(grad, w, out, lse, ctx.scale, ctx.backend),
        None,
        None,
    )


def _save_cross(ctx, inputs, output):
    q, w, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, w, *output)


def _backward_cross(ctx, grad, _grad_lse):
    q, w, out, lse = ctx.saved_tensors
    grads = torch.ops.depict_kernels.subspace_cross_attention_backward(
        grad, q, w, out, lse, ctx.scale, ctx.backend
    )
    return (*grads, None, None)


torch.library.register_autograd(
    "depict_kernels::subspace_self_attention", _backward_self, setup_context=_save_self
)
torch.library.register_autograd(
    "depict_kernels::subspace_cross_attention", _backward_cross, setup_context=_save_cross
)
for _name in ("subspace_self_attention_backward", "subspace_cross_attention_backward"):
    # torch's fused kernels have no second derivative either.
    _library.forbid_gradient(_name, within="torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")


# FLOPs of the matrix products (a multiply-add is 2), so that FlopCounterMode does not see zero.
# Forward: scores and output. Backward: scores again, grad_p, grad_q, grad_k, grad_v.


def _flops(q_shape, w_shape, products):
    batch, queries, heads, dim = q_shape
    return 2 * products * batch * heads * queries * w_shape[1] * dim


@register_flop_formula(torch.ops.depict_kernels.subspace_self_attention)
def _(w_shape, *args, **kwargs) -> int:
    return _flops(w_shape, w_shape, 2)


@register_flop_formula(torch.ops.depict_kernels.subspace_self_attention_backward)
def _(grad_shape, w_shape, *args, **kwargs) -> int:
    return _flops(w_shape, w_shape, 5)


@register_flop_formula(torch.ops.depict_kernels.subspace_cross_attention)
def _(q_shape, w_shape, *args, **kwargs) -> int:
    return _flops(q_shape, w_shape, 2)


@register_flop_formula(torch.ops.depict_kernels.subspace_cross_attention_backward)
def _(grad_shape, q_shape, w_shape, *args, **kwargs) -> int:
    return _flops(q_shape, w_shape, 5)

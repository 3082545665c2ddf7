"""Subspace attention in Triton: one tensor is query, key and value (see the formulas in ops/reference/attention.py).

Forward: online softmax in base 2; a block of keys is loaded once and serves both products. Backward gathers: the
program that owns a block of rows loops over the other rows and writes its gradient once, so there are no atomics
and the result is bitwise repeatable. In self-attention a score tile w_i w_j^T serves row block i both as query (with
the row's own log-sum-exp) and as key (transposed, with row j's), and the two score gradients are added before one
product: five products per tile.

Layout (B, N, H, d) with any strides of the first three dimensions; a tensor whose last dimension is strided is copied.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from depict_kernels.ops.triton_kernels import launch as _launch
from depict_kernels.ops.triton_kernels import tuning
from depict_kernels.ops.triton_kernels.launch import rows_contiguous, strides, unit_of
from depict_kernels.ops.triton_kernels.tiles import (
    add_product,
    chunks,
    dot_rows,
    load_rows,
    scale_rows,
    store_rows,
    sum_of_products,
    zero_rows,
)

DTYPES = _launch.DTYPES
MAX_HEAD_DIM = tuning.MAX_HEAD_DIM


@triton.jit
def _head(pid, blocks, heads):
    """Program -> (first block index, batch, head): neighbouring programs share a head, hence its keys in L2."""
    head = pid // blocks
    return pid % blocks, (head // heads).to(tl.int64), (head % heads).to(tl.int64)


@triton.jit
def _attend(
    top,
    total,
    acc,
    q,
    w,
    keys_left,
    scale,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):
    """One block of keys into the online softmax of ``q``'s rows: their largest scores, sums and products so far."""
    s = dot_rows(q, w, PRECISION)
    if MASK:
        column = tl.arange(0, s.shape[1])[None, :]
        s = tl.where(column < keys_left, s, float("inf") if NEGATIVE else float("-inf"))
    # The scale is applied in the exponent's multiply-add, so the largest score is the smallest product where the
    # scale is negative.
    if NEGATIVE:
        higher = tl.maximum(top, tl.min(s, 1) * scale)
    else:
        higher = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - higher[:, None])
    rescale = tl.exp2(top - higher)
    total = total * rescale + tl.sum(p, 1)
    return higher, total, add_product(scale_rows(acc, rescale), p, w, PRECISION)


@triton.jit
def attention_forward(
    q_ptr,  # (B, M, H, d)
    w_ptr,  # (B, N, H, d)
    out_ptr,  # (B, M, H, d) contiguous
    lse_ptr,  # (B, H, M) float32
    queries,
    keys,
    heads,
    q_batch,  # strides, in units of UNIT elements: a multiple of UNIT is what makes a vector load provable
    q_row,
    q_head,
    w_batch,
    w_row,
    w_head,
    scale,  # on the scores, times log2(e)
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    NEGATIVE: tl.constexpr,  # scale < 0
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, batch, head = _head(tl.program_id(0), tl.cdiv(queries, BLOCK_M), heads)
    left = queries - block * BLOCK_M
    first = (block * BLOCK_M).to(tl.int64)
    q_ptr += batch * q_batch * UNIT + head * q_head * UNIT + first * q_row * UNIT
    w_ptr += batch * w_batch * UNIT + head * w_head * UNIT
    q = load_rows(q_ptr, q_row * UNIT, left, BLOCK_M, DIM, STARTS, WIDTHS, True)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_rows(BLOCK_M, WIDTHS)
    # The partial block comes first, the loop over whole ones needs no masks. Last it would serialise the loop's wgmma,
    # whose accumulators would live on.
    whole = (tl.cdiv(keys, BLOCK_N) - 1) * BLOCK_N
    last = w_ptr + whole.to(tl.int64) * w_row * UNIT
    w = load_rows(last, w_row * UNIT, keys - whole, BLOCK_N, DIM, STARTS, WIDTHS, True)
    top, total, acc = _attend(top, total, acc, q, w, keys - whole, scale, NEGATIVE, PRECISION, True)
    for _ in range(0, whole, BLOCK_N):
        w = load_rows(w_ptr, w_row * UNIT, BLOCK_N, BLOCK_N, DIM, STARTS, WIDTHS, False)
        top, total, acc = _attend(top, total, acc, q, w, BLOCK_N, scale, NEGATIVE, PRECISION, False)
        w_ptr += tl.cast(w_row, tl.int64) * (BLOCK_N * UNIT)

    out_row = heads * DIM
    out_ptr += (batch * queries + first) * out_row + head * DIM
    store_rows(out_ptr, scale_rows(acc, 1 / total), out_row, left, BLOCK_M, DIM, STARTS, WIDTHS)
    row = tl.arange(0, BLOCK_M)
    lse_ptr += (batch * heads + head) * queries + first
    tl.store(lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453, mask=row < left)


@triton.jit
def attention_delta(
    grad_ptr,  # (B, M, H, d)
    out_ptr,  # (B, M, H, d) contiguous
    delta_ptr,  # (B, H, M) float32
    queries,
    heads,
    grad_batch,
    grad_row,
    grad_head,
    scale,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale * sum over d of grad * out: what the softmax's gradient subtracts in every row."""
    block, batch, head = _head(tl.program_id(0), tl.cdiv(queries, BLOCK), heads)
    left = queries - block * BLOCK
    first = (block * BLOCK).to(tl.int64)
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    mask = (row < left) & (column < DIM)
    grad_ptr += batch * grad_batch * UNIT + head * grad_head * UNIT + first * grad_row * UNIT
    out_ptr += ((batch * queries + first) * heads + head) * DIM
    grad = tl.load(grad_ptr + (row * (grad_row * UNIT) + column), mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + (row * (heads * DIM) + column), mask=mask, other=0.0).to(tl.float32)
    row = tl.arange(0, BLOCK)
    delta_ptr += (batch * heads + head) * queries + first
    tl.store(delta_ptr + row, sum_of_products(grad, out, 1) * scale, mask=row < left)


@triton.jit
def _gather(
    acc,  # gradient of x's rows so far
    own,  # of x's rows: x and, where QUERY, gradient, log-sum-exp times log2(e), delta
    other,  # pointers to the same of y's rows, at the block's first
    strides,  # between rows of y and of the gradient
    scales,  # scale, and times log2(e)
    rows_left,
    DIM: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    QUERY: tl.constexpr,
    KEY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
):
    """Adds what one block of y's rows gives to the gradient of x's."""
    x, grad_x, lse_x, delta_x = own
    y_ptr, grad_ptr, lse_ptr, delta_ptr = other
    y_row, grad_row = strides
    scale, scale_log2 = scales
    column = tl.arange(0, BLOCK_N)
    valid = column < rows_left
    y = load_rows(y_ptr, y_row, rows_left, BLOCK_N, DIM, STARTS, WIDTHS, MASK)
    s = dot_rows(x, y, PRECISION)
    if QUERY:  # x asks, y is key and value
        p = tl.exp2(s * scale_log2 - lse_x[:, None])
        grad_s = p * (dot_rows(grad_x, y, PRECISION) * scale - delta_x[:, None])
        if MASK:
            grad_s = tl.where(valid[None, :], grad_s, 0.0)
    if KEY:  # y asks, x is key and value; the same scores, seen transposed
        grad_y = load_rows(grad_ptr, grad_row, rows_left, BLOCK_N, DIM, STARTS, WIDTHS, MASK)
        if MASK:  # an infinite log-sum-exp makes the weight of a missing row 0
            lse_y = tl.load(lse_ptr + column, mask=valid, other=float("inf"))
            delta_y = tl.load(delta_ptr + column, mask=valid, other=0.0)
        else:
            lse_y = tl.load(lse_ptr + column)
            delta_y = tl.load(delta_ptr + column)
        p = tl.exp2(s * scale_log2 - (lse_y * 1.4426950408889634)[None, :])
        grad_s_key = p * (dot_rows(x, grad_y, PRECISION) * scale - delta_y[None, :])
        acc = add_product(acc, p, grad_y, PRECISION)
        if QUERY:
            grad_s += grad_s_key
        else:
            grad_s = grad_s_key
    return add_product(acc, grad_s, y, PRECISION)


@triton.jit
def attention_backward(
    x_ptr,  # (B, M, H, d): the rows whose gradient this is
    y_ptr,  # (B, N, H, d): the rows on the other side
    grad_ptr,  # gradient of the output: x's rows where QUERY, y's where KEY, one tensor in self-attention
    lse_ptr,  # (B, H, rows of grad)
    delta_ptr,  # (B, H, rows of grad), times scale
    out_ptr,  # (B, M, H, d) contiguous: gradient of x
    x_rows,
    y_rows,
    heads,
    x_batch,
    x_row,
    x_head,
    y_batch,
    y_row,
    y_head,
    grad_batch,
    grad_row,
    grad_head,
    scale,
    scale_log2,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    QUERY: tl.constexpr,  # x's rows are queries
    KEY: tl.constexpr,  # x's rows are keys and values
    APART: tl.constexpr,  # masks only in the partial block of y's rows, which comes apart
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, batch, head = _head(tl.program_id(0), tl.cdiv(x_rows, BLOCK_M), heads)
    first = (block * BLOCK_M).to(tl.int64)
    left = x_rows - block * BLOCK_M
    x_ptr += batch * x_batch * UNIT + head * x_head * UNIT + first * x_row * UNIT
    y_ptr += batch * y_batch * UNIT + head * y_head * UNIT
    grad_ptr += batch * grad_batch * UNIT + head * grad_head * UNIT
    if KEY:
        grad_rows = y_rows
    else:
        grad_rows = x_rows
    lse_ptr += (batch * heads + head) * grad_rows
    delta_ptr += (batch * heads + head) * grad_rows

    x = load_rows(x_ptr, x_row * UNIT, left, BLOCK_M, DIM, STARTS, WIDTHS, True)
    row = tl.arange(0, BLOCK_M)
    if QUERY:
        own_grad = grad_ptr + first * grad_row * UNIT
        grad_x = load_rows(own_grad, grad_row * UNIT, left, BLOCK_M, DIM, STARTS, WIDTHS, True)
        lse_x = tl.load(lse_ptr + first + row, mask=row < left, other=0.0) * 1.4426950408889634
        delta_x = tl.load(delta_ptr + first + row, mask=row < left, other=0.0)
    else:
        grad_x, lse_x, delta_x = None, None, None

    acc = zero_rows(BLOCK_M, WIDTHS)
    own = (x, grad_x, lse_x, delta_x)
    rows = (y_row * UNIT, grad_row * UNIT)
    scales = (scale, scale_log2)
    whole = y_rows
    if APART:  # the partial block first, as in attention_forward
        whole = (tl.cdiv(y_rows, BLOCK_N) - 1) * BLOCK_N
        far, rest = whole.to(tl.int64), y_rows - whole
        other = (y_ptr + far * rows[0], grad_ptr + far * rows[1], lse_ptr + whole, delta_ptr + whole)
        acc = _gather(
            acc, own, other, rows, scales, rest, DIM, STARTS, WIDTHS, QUERY, KEY, PRECISION, BLOCK_N, True
        )
    for start in range(0, whole, BLOCK_N):
        other, rest = (y_ptr, grad_ptr, lse_ptr, delta_ptr), y_rows - start
        acc = _gather(
            acc,
            own,
            other,
            rows,
            scales,
            rest,
            DIM,
            STARTS,
            WIDTHS,
            QUERY,
            KEY,
            PRECISION,
            BLOCK_N,
            not APART,
        )
        y_ptr += tl.cast(y_row, tl.int64) * (BLOCK_N * UNIT)
        if KEY:
            grad_ptr += tl.cast(grad_row, tl.int64) * (BLOCK_N * UNIT)
            lse_ptr += BLOCK_N
            delta_ptr += BLOCK_N

    out_row = heads * DIM
    out_ptr += (batch * x_rows + first) * out_row + head * DIM
    store_rows(out_ptr, acc, out_row, left, BLOCK_M, DIM, STARTS, WIDTHS)


# --- host side ---


def _launch_rows(kernel, name: str, like: Tensor, **arguments) -> None:
    """One program per block of rows of ``like`` (B, rows, H, d) and head."""
    batch, rows, heads, dim = like.shape
    precision = _launch.dot_precision(like.dtype, like.device)
    architecture = _launch.architecture(like.device)
    config = tuning.attention(name, architecture, dim, like.element_size(), precision == "tf32")
    wide = architecture == "sm_90" and like.element_size() == 2 and dim <= 128
    starts, widths = chunks(dim, 128 if wide else 64)
    _launch.launch(
        kernel,
        (triton.cdiv(rows, config.rows) * heads * batch,),
        like.device,
        config,
        heads=heads,
        DIM=dim,
        STARTS=starts,
        WIDTHS=widths,
        PRECISION=precision,
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        **arguments,
    )


def self_attention_forward(w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """w (B, N, H, d) -> out (B, N, H, d), log-sum-exp of the scaled scores (B, H, N)."""
    return _forward(w, w, scale, "self_forward")


def cross_attention_forward(q: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, M, H, d), w (B, N, H, d) -> out (B, M, H, d), log-sum-exp (B, H, M)."""
    return _forward(q, w, scale, "cross_forward")


def _forward(q: Tensor, w: Tensor, scale: float, name: str) -> tuple[Tensor, Tensor]:
    q, w = rows_contiguous(q, w)
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    unit = unit_of(q, w)
    _launch_rows(
        attention_forward,
        name,
        q,
        q_ptr=q,
        w_ptr=w,
        out_ptr=out,
        lse_ptr=lse,
        queries=queries,
        keys=w.shape[1],
        **strides("q", q, unit),
        **strides("w", w, unit),
        scale=scale * math.log2(math.e) or 1e-37,  # not 0: masked scores are infinite and must stay so
        UNIT=unit,
        NEGATIVE=scale < 0,
    )
    return out, lse


def self_attention_backward(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """The query-, key- and value-side gradients of w, added up: (B, N, H, d)."""
    grad, w = rows_contiguous(grad, w)
    delta = _delta(grad, out, scale)
    return _gradient(w, w, grad, lse, delta, scale, "self_backward", query=True, key=True)


def cross_attention_backward(
    grad: Tensor, q: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q (B, M, H, d) and of w (B, N, H, d), which is key and value."""
    if q.shape[1] == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format), torch.zeros(
            w.shape, dtype=w.dtype, device=w.device
        )
    grad, q, w = rows_contiguous(grad, q, w)
    delta = _delta(grad, out, scale)
    return (
        _gradient(q, w, grad, lse, delta, scale, "query_backward", query=True, key=False),
        _gradient(w, q, grad, lse, delta, scale, "key_backward", query=False, key=True),
    )


def _delta(grad: Tensor, out: Tensor, scale: float) -> Tensor:
    batch, queries, heads, dim = grad.shape
    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=grad.device)
    unit, config = unit_of(grad), tuning.Config(32, 1, 4, 1)
    _launch.launch(
        attention_delta,
        (triton.cdiv(queries, config.rows) * heads * batch,),
        grad.device,
        config,
        grad_ptr=grad,
        out_ptr=out,
        delta_ptr=delta,
        queries=queries,
        heads=heads,
        **strides("grad", grad, unit),
        scale=scale,
        UNIT=unit,
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        BLOCK=config.rows,
    )
    return delta


def _gradient(
    x: Tensor,
    y: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    name: str,
    *,
    query: bool,
    key: bool,
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit = unit_of(x, y, grad)
    _launch_rows(
        attention_backward,
        name,
        x,
        x_ptr=x,
        y_ptr=y,
        grad_ptr=grad,
        lse_ptr=lse,
        delta_ptr=delta,
        out_ptr=out,
        x_rows=x.shape[1],
        y_rows=y.shape[1],
        **strides("x", x, unit),
        **strides("y", y, unit),
        **strides("grad", grad, unit),
        scale=scale,
        scale_log2=scale * math.log2(math.e),
        UNIT=unit,
        QUERY=query,
        KEY=key,
        APART=tuning.attention_masks_apart(_launch.architecture(x.device), x.shape[-1]),
    )
    return out

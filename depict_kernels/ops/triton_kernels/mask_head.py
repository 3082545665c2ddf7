"""The mask head in Triton: one product with an epilogue (see the formulas in ops/reference/mask_head.py).

Forward: a program owns a block of patches and all classes. The product x q^T and both row norms come from one pass
over the width; cosines, LayerNorm over the classes and the (B, C, h, w) layout follow in registers. More than
:data:`REGISTER_CLASSES` classes go block by block, twice: statistics first, then the logits.

Backward: one kernel recomputes the cosines per block of patches and leaves t, the gradient of the products x q^T, in
the inputs' dtype with per-block sums for the class side; two products then give the gradients of patches and
classes, and the second also adds up weight's and bias's. No atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from depict_kernels.ops.triton_kernels import launch as _launch
from depict_kernels.ops.triton_kernels import tuning
from depict_kernels.ops.triton_kernels.tiles import zero_chunk, zero_rows

DTYPES = _launch.DTYPES
REGISTER_CLASSES = 256  # up to here all classes of a patch stay in registers


# --- pieces: tiles of patches x classes come as a tuple, one per chunk of classes ---


@triton.jit
def _tile(ptr, row_stride, rows, columns, rows_left, columns_left):
    mask = (rows[:, None] < rows_left) & (columns[None, :] < columns_left)
    return tl.load(ptr + (rows[:, None] * row_stride + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def _class_range(START: tl.constexpr, WIDTH: tl.constexpr):
    return START + tl.arange(0, WIDTH)


@triton.jit
def _logit_offsets(classes, rows, patch_count, WIDE: tl.constexpr):
    """Offsets in an image's (C, N) logits; 64 bits only for an image of 2**31 logits, they cost registers."""
    if WIDE:
        classes = classes.to(tl.int64)
    return classes[None, :] * patch_count + rows[:, None]


@triton.jit
def _zero_vector(WIDTH: tl.constexpr):
    return tl.zeros((WIDTH,), tl.float32)


@triton.jit
def _products(
    x_ptr,
    q_ptr,
    x_row,
    q_row,
    patches_left,
    classes_left,
    width,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMS: tl.constexpr,
):
    """x q^T in chunks of classes and, where NORMS, the sums of squares of x's rows and (in chunks) of q's."""
    products = zero_rows(BLOCK_N, WIDTHS)
    x_squares = tl.zeros((BLOCK_N,), tl.float32)
    q_squares = ()
    for i in tl.static_range(len(WIDTHS)):
        q_squares = q_squares + (_zero_vector(WIDTHS[i]),)
    row = tl.arange(0, BLOCK_N)
    for start in range(0, width, BLOCK_D):
        column = tl.arange(0, BLOCK_D)
        x = _tile(x_ptr + start, x_row, row, column, patches_left, width - start)
        if NORMS:
            square = x.to(tl.float32) * x.to(tl.float32)
            x_squares += tl.sum(square, 1)
        new_products, new_squares = (), ()
        for i in tl.static_range(len(WIDTHS)):
            classes = _class_range(STARTS[i], WIDTHS[i])
            q = _tile(q_ptr + start, q_row, classes, column, classes_left, width - start)
            new_products = new_products + (tl.dot(x, tl.trans(q), products[i], input_precision=PRECISION),)
            if NORMS:
                square = q.to(tl.float32) * q.to(tl.float32)
                new_squares = new_squares + (q_squares[i] + tl.sum(square, 1),)
            else:
                new_squares = new_squares + (q_squares[i],)
        products, q_squares = new_products, new_squares
    return products, x_squares, q_squares


@triton.jit
def _inverse_norm(squares):
    """1 / norm, and 0 for a zero vector: zero vectors give zeros, not NaN."""
    return tl.where(squares > 0, 1 / tl.sqrt_rn(tl.where(squares > 0, squares, 1.0)), 0.0)


@triton.jit
def _store_logits(
    logits_ptr, weight_ptr, bias_ptr, m, mean, rstd, classes, patch_count, class_count, rows, patches_left,
    WIDE: tl.constexpr,
):  # fmt: skip
    """LayerNorm's affine part and the transposed store: logits_ptr is at the first patch of class 0."""
    valid = classes < class_count
    weight = tl.load(weight_ptr + classes, mask=valid, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + classes, mask=valid, other=0.0).to(tl.float32)
    y = (m - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    offset = _logit_offsets(classes, rows, patch_count, WIDE)
    mask = (rows[:, None] < patches_left) & valid[None, :]
    tl.store(logits_ptr + offset, y.to(logits_ptr.dtype.element_ty), mask=mask)


# --- forward ---


@triton.jit
def mask_forward(
    x_ptr,  # (B, N, D)
    q_ptr,  # (B, C, D)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    logits_ptr,  # (B, C, N) contiguous
    inv_x_ptr,  # (B, N) float32
    inv_q_ptr,  # (B, C) float32
    mean_ptr,  # (B, N) float32
    rstd_ptr,  # (B, N) float32
    patch_count,
    class_count,
    width,
    x_batch,  # strides in units of UNIT elements
    x_row,
    q_batch,
    q_row,
    eps,
    UNIT: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    LOOP: tl.constexpr,  # classes go in blocks of WIDTHS[0], twice
    WIDE: tl.constexpr,  # an image's logits need 64-bit offsets
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(patch_count, BLOCK_N)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = (block * BLOCK_N).to(tl.int64)
    left = patch_count - block * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    x_ptr += batch * x_batch * UNIT + first * x_row * UNIT
    q_ptr += batch * q_batch * UNIT
    logits_ptr += batch * class_count * patch_count + first
    inv_q_ptr += batch * class_count

    if LOOP:
        total = tl.zeros((BLOCK_N,), tl.float32)  # mean and sum of squared deviations of the classes so far
        deviation = tl.zeros((BLOCK_N,), tl.float32)
        inv_x = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, class_count, WIDTHS[0]):
            products, x_squares, q_squares = _products(
                x_ptr, q_ptr + tl.cast(start, tl.int64) * q_row * UNIT, x_row * UNIT, q_row * UNIT, left,
                class_count - start, width, STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip
            classes = start + _class_range(0, WIDTHS[0])
            valid = classes < class_count
            inv_x, inv_q = _inverse_norm(x_squares), _inverse_norm(q_squares[0])
            if block == 0:
                tl.store(inv_q_ptr + classes, inv_q, mask=valid)
            m = products[0] * inv_x[:, None] * inv_q[None, :]
            count = tl.minimum(class_count - start, WIDTHS[0]).to(tl.float32)
            mean = tl.sum(m, 1) / count
            centred = tl.where(valid[None, :], m - mean[:, None], 0.0)
            # Chan's update: exact for any split of the classes
            merged = start + count
            step = mean - total
            deviation += tl.sum(centred * centred, 1) + step * step * (start * count / merged)
            total += step * (count / merged)
        mean = total
        rstd = 1 / tl.sqrt_rn(deviation / class_count + eps)
        for start in range(0, class_count, WIDTHS[0]):
            products, x_squares, q_squares = _products(
                x_ptr, q_ptr + tl.cast(start, tl.int64) * q_row * UNIT, x_row * UNIT, q_row * UNIT, left,
                class_count - start, width, STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip
            m = products[0] * inv_x[:, None] * _inverse_norm(q_squares[0])[None, :]
            classes = start + _class_range(0, WIDTHS[0])
            _store_logits(
                logits_ptr, weight_ptr, bias_ptr, m, mean, rstd, classes, patch_count, class_count, rows, left, WIDE
            )  # fmt: skip
    else:
        products, x_squares, q_squares = _products(
            x_ptr, q_ptr, x_row * UNIT, q_row * UNIT, left, class_count, width,
            STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
        inv_x = _inverse_norm(x_squares)
        cosines = ()
        mean = tl.zeros((BLOCK_N,), tl.float32)
        for i in tl.static_range(len(WIDTHS)):
            classes = _class_range(STARTS[i], WIDTHS[i])
            inv_q = _inverse_norm(q_squares[i])
            if block == 0:
                tl.store(inv_q_ptr + classes, inv_q, mask=classes < class_count)
            m = products[i] * inv_x[:, None] * inv_q[None, :]  # 0 past the last class
            mean += tl.sum(m, 1)
            cosines = cosines + (m,)
        mean /= class_count
        deviation = tl.zeros((BLOCK_N,), tl.float32)
        for i in tl.static_range(len(WIDTHS)):
            valid = _class_range(STARTS[i], WIDTHS[i]) < class_count
            centred = tl.where(valid[None, :], cosines[i] - mean[:, None], 0.0)
            deviation += tl.sum(centred * centred, 1)
        rstd = 1 / tl.sqrt_rn(deviation / class_count + eps)
        for i in tl.static_range(len(WIDTHS)):
            classes = _class_range(STARTS[i], WIDTHS[i])
            _store_logits(
                logits_ptr, weight_ptr, bias_ptr, cosines[i], mean, rstd, classes, patch_count, class_count, rows, left,
                WIDE,
            )  # fmt: skip

    offset = batch * patch_count + first + rows
    tl.store(inv_x_ptr + offset, inv_x, mask=rows < left)
    tl.store(mean_ptr + offset, mean, mask=rows < left)
    tl.store(rstd_ptr + offset, rstd, mask=rows < left)


# --- backward ---


@triton.jit
def _upstream(
    grad_ptr, weight_ptr, inv_q_ptr, product, inv_x, mean, rstd, classes, patch_count, class_count, rows,
    patches_left, WIDE: tl.constexpr,
):  # fmt: skip
    """For one chunk: upstream gradient, that times weight, cosines, normalised cosines, 1 / |class|.

    Past the last class and the last patch all gradients are 0.
    """
    valid = classes < class_count
    mask = (rows[:, None] < patches_left) & valid[None, :]
    offset = _logit_offsets(classes, rows, patch_count, WIDE)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + classes, mask=valid, other=0.0).to(tl.float32)
    inv_q = tl.load(inv_q_ptr + classes, mask=valid, other=0.0)
    m = product * inv_x[:, None] * inv_q[None, :]
    z = (m - mean[:, None]) * rstd[:, None]
    return grad, grad * weight[None, :], m, z, inv_q


@triton.jit
def _finish_chunk(
    t_ptr, sums_ptr, sums_stride, grad, g, m, z, inv_q, inv_x, rstd, mean_g, mean_gz,
    classes, t_row, class_count, rows, patches_left,
):  # fmt: skip
    """Stores t and the chunk's sums over the patches; returns its part of the sum of grad_m * m per patch."""
    valid = classes < class_count
    grad_m = rstd[:, None] * (g - mean_g[:, None] - z * mean_gz[:, None])
    grad_m = tl.where((rows[:, None] < patches_left) & valid[None, :], grad_m, 0.0)
    t = grad_m * inv_x[:, None] * inv_q[None, :]
    mask = (rows[:, None] < patches_left) & valid[None, :]
    tl.store(t_ptr + (rows[:, None] * t_row + classes[None, :]), t.to(t_ptr.dtype.element_ty), mask=mask)
    along = grad_m * m
    tl.store(sums_ptr + classes, tl.sum(grad * z, 0), mask=valid)
    tl.store(sums_ptr + sums_stride + classes, tl.sum(grad, 0), mask=valid)
    tl.store(sums_ptr + 2 * sums_stride + classes, tl.sum(along, 0), mask=valid)
    return tl.sum(along, 1)


@triton.jit
def mask_backward(
    grad_ptr,  # (B, C, N) contiguous
    x_ptr,  # (B, N, D)
    q_ptr,  # (B, C, D)
    weight_ptr,  # (C,)
    inv_x_ptr,  # (B, N)
    inv_q_ptr,  # (B, C)
    mean_ptr,  # (B, N)
    rstd_ptr,  # (B, N)
    t_ptr,  # (B, N, t_row): gradient of x q^T, in x's dtype
    along_ptr,  # (B, N) float32: what times x is to be subtracted from t q
    sums_ptr,  # (3, programs, C) float32: of grad * z, grad, grad_m * m over a program's patches
    patch_count,
    class_count,
    width,
    t_row,
    x_batch,
    x_row,
    q_batch,
    q_row,
    UNIT: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    LOOP: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(patch_count, BLOCK_N)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = (block * BLOCK_N).to(tl.int64)
    left = patch_count - block * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    x_ptr += batch * x_batch * UNIT + first * x_row * UNIT
    q_ptr += batch * q_batch * UNIT
    grad_ptr += batch * class_count * patch_count + first
    inv_q_ptr += batch * class_count
    t_ptr += (batch * patch_count + first) * t_row
    sums_ptr += tl.program_id(0).to(tl.int64) * class_count
    sums_stride = tl.num_programs(0).to(tl.int64) * class_count
    offset = batch * patch_count + first + rows
    inv_x = tl.load(inv_x_ptr + offset, mask=rows < left, other=0.0)
    mean = tl.load(mean_ptr + offset, mask=rows < left, other=0.0)
    rstd = tl.load(rstd_ptr + offset, mask=rows < left, other=0.0)
    mean_g = tl.zeros((BLOCK_N,), tl.float32)
    mean_gz = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)

    if LOOP:
        for start in range(0, class_count, WIDTHS[0]):
            products, _, _ = _products(
                x_ptr, q_ptr + tl.cast(start, tl.int64) * q_row * UNIT, x_row * UNIT, q_row * UNIT, left,
                class_count - start, width, STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D, False,
            )  # fmt: skip
            grad, g, m, z, inv_q = _upstream(
                grad_ptr, weight_ptr, inv_q_ptr, products[0], inv_x, mean, rstd, start + _class_range(0, WIDTHS[0]),
                patch_count, class_count, rows, left, WIDE,
            )  # fmt: skip
            mean_g += tl.sum(g, 1)
            mean_gz += tl.sum(g * z, 1)
        mean_g /= class_count
        mean_gz /= class_count
        for start in range(0, class_count, WIDTHS[0]):
            products, _, _ = _products(
                x_ptr, q_ptr + tl.cast(start, tl.int64) * q_row * UNIT, x_row * UNIT, q_row * UNIT, left,
                class_count - start, width, STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D, False,
            )  # fmt: skip
            classes = start + _class_range(0, WIDTHS[0])
            grad, g, m, z, inv_q = _upstream(
                grad_ptr, weight_ptr, inv_q_ptr, products[0], inv_x, mean, rstd, classes,
                patch_count, class_count, rows, left, WIDE,
            )  # fmt: skip
            along += _finish_chunk(
                t_ptr, sums_ptr, sums_stride, grad, g, m, z, inv_q, inv_x, rstd, mean_g, mean_gz,
                classes, t_row, class_count, rows, left,
            )  # fmt: skip
    else:
        products, _, _ = _products(
            x_ptr, q_ptr, x_row * UNIT, q_row * UNIT, left, class_count, width,
            STARTS, WIDTHS, PRECISION, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
        for i in tl.static_range(len(WIDTHS)):
            grad, g, m, z, inv_q = _upstream(
                grad_ptr, weight_ptr, inv_q_ptr, products[i], inv_x, mean, rstd, _class_range(STARTS[i], WIDTHS[i]),
                patch_count, class_count, rows, left, WIDE,
            )  # fmt: skip
            mean_g += tl.sum(g, 1)
            mean_gz += tl.sum(g * z, 1)
        mean_g /= class_count
        mean_gz /= class_count
        for i in tl.static_range(
            len(WIDTHS)
        ):  # the gradient is read again: from L2, where registers are dear
            classes = _class_range(STARTS[i], WIDTHS[i])
            grad, g, m, z, inv_q = _upstream(
                grad_ptr, weight_ptr, inv_q_ptr, products[i], inv_x, mean, rstd, classes,
                patch_count, class_count, rows, left, WIDE,
            )  # fmt: skip
            along += _finish_chunk(
                t_ptr, sums_ptr, sums_stride, grad, g, m, z, inv_q, inv_x, rstd, mean_g, mean_gz,
                classes, t_row, class_count, rows, left,
            )  # fmt: skip
    tl.store(along_ptr + offset, along * inv_x * inv_x, mask=rows < left)


@triton.jit
def _column_sums(ptr, rows, stride, columns, valid, WIDTH: tl.constexpr):
    """Sum over ``rows`` rows of a (rows, stride) float32 matrix, in a fixed order."""
    total = tl.zeros((WIDTH,), tl.float32)
    row = tl.arange(0, 32)[:, None]
    for start in range(0, rows, 32):
        offset = (start + row).to(tl.int64) * stride + columns[None, :]
        total += tl.sum(tl.load(ptr + offset, mask=(start + row < rows) & valid[None, :], other=0.0), 0)
    return total


@triton.jit
def mask_product(
    t_ptr,  # (B, N, t_row)
    y_ptr,  # (B, K, D): the other side, summed over
    own_ptr,  # (B, R, D): the side whose gradient this is
    out_ptr,  # (B, R, D) contiguous
    along_ptr,  # (B, N); used for the patches
    inv_q_ptr,  # (B, C); used for the classes, as are the next four
    sums_ptr,  # (3, programs, C)
    grad_weight_ptr,  # (C,)
    grad_bias_ptr,  # (C,)
    programs,
    row_count,
    sum_count,
    width,
    patch_count,
    t_row,
    y_batch,
    y_row,
    own_batch,
    own_row,
    UNIT: tl.constexpr,
    PATCHES: tl.constexpr,  # gradient of the patches, else of the classes
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = t y - own * (the part along own), or with t transposed; see _normalize_backward of the reference."""
    row_blocks, column_blocks = tl.cdiv(row_count, BLOCK_R), tl.cdiv(width, BLOCK_D)
    column_block = tl.program_id(0) % column_blocks
    rest = tl.program_id(0) // column_blocks
    row_block = rest % row_blocks
    batch = (rest // row_blocks).to(tl.int64)
    rows, columns, steps = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    first, column = row_block * BLOCK_R, column_block * BLOCK_D
    left, columns_left = row_count - first, width - column
    y_ptr += batch * y_batch * UNIT + column
    own_ptr += batch * own_batch * UNIT + first.to(tl.int64) * own_row * UNIT + column
    out_ptr += (batch * row_count + first) * width + column
    t_ptr += batch * patch_count * t_row

    acc = zero_chunk(BLOCK_R, BLOCK_D)
    if PATCHES:
        t_ptr += first.to(tl.int64) * t_row
    else:
        t_ptr += first
    for start in range(0, sum_count, BLOCK_K):
        y = _tile(
            y_ptr + tl.cast(start, tl.int64) * y_row * UNIT,
            y_row * UNIT,
            steps,
            columns,
            sum_count - start,
            columns_left,
        )
        if PATCHES:
            t = _tile(t_ptr + start, t_row, rows, steps, left, sum_count - start)
        else:
            t = tl.trans(
                _tile(t_ptr + tl.cast(start, tl.int64) * t_row, t_row, steps, rows, sum_count - start, left)
            )
        acc = tl.dot(t, y, acc, input_precision=PRECISION)

    if PATCHES:
        along = tl.load(along_ptr + batch * row_count + first + rows, mask=rows < left, other=0.0)
    else:
        classes, valid = first + rows, rows < left
        blocks = programs // (tl.num_programs(0) // (row_blocks * column_blocks))
        stride = tl.cast(programs, tl.int64) * row_count
        own_sums = sums_ptr + 2 * stride + batch * blocks * row_count
        along = _column_sums(own_sums, blocks, row_count, classes, valid, BLOCK_R)
        inv_q = tl.load(inv_q_ptr + batch * row_count + classes, mask=valid, other=0.0)
        along *= inv_q * inv_q
        if (column_block == 0) & (batch == 0):
            total = _column_sums(sums_ptr, programs, row_count, classes, valid, BLOCK_R)
            tl.store(grad_weight_ptr + classes, total.to(grad_weight_ptr.dtype.element_ty), mask=valid)
            total = _column_sums(sums_ptr + stride, programs, row_count, classes, valid, BLOCK_R)
            tl.store(grad_bias_ptr + classes, total.to(grad_bias_ptr.dtype.element_ty), mask=valid)

    own = _tile(own_ptr, own_row * UNIT, rows, columns, left, columns_left).to(tl.float32)
    out = acc - own * along[:, None]
    mask = (rows[:, None] < left) & (columns[None, :] < columns_left)
    offset = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


# --- host side ---


def _rows_contiguous(t: Tensor) -> Tensor:
    """Copies what a kernel cannot walk: a strided last dimension, or rows too far apart for 32-bit tile offsets."""
    return t if t.stride(-1) == 1 and t.stride(1) < 2**22 else t.contiguous()


def _unit(*tensors: Tensor) -> int:
    """The largest power of two, up to a 16-byte vector, that divides every stride."""
    unit = 16 // tensors[0].element_size()
    for t in tensors:
        for size, stride in zip(t.shape[:2], t.stride()[:2]):
            if size > 1:
                unit = math.gcd(unit, stride)
    return unit


def _strides(prefix: str, t: Tensor, unit: int) -> dict[str, int]:
    return {f"{prefix}_batch": t.stride(0) // unit, f"{prefix}_row": t.stride(1) // unit}


def _class_chunks(classes: int) -> dict:
    """Chunks of one width: of 64, 64 and 32 the last one's layout differs, which spills in the backward kernel."""
    width = 16 if classes <= 16 else 32 if classes <= 32 else 64
    loop = classes > REGISTER_CLASSES
    count = 1 if loop else max(1, triton.cdiv(classes, width))
    return {"STARTS": tuple(range(0, count * width, width)), "WIDTHS": (width,) * count, "LOOP": loop}


def _launch_rows(kernel, x: Tensor, q: Tensor, config: tuning.Config, **arguments) -> None:
    unit = _unit(x, q)
    _launch.launch(
        kernel,
        (triton.cdiv(x.shape[1], config.rows) * x.shape[0],),
        x.device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        x_ptr=x,
        q_ptr=q,
        patch_count=x.shape[1],
        class_count=q.shape[1],
        width=x.shape[2],
        **_strides("x", x, unit),
        **_strides("q", q, unit),
        UNIT=unit,
        **_class_chunks(q.shape[1]),
        WIDE=x.shape[1] * q.shape[1] >= 2**31,
        PRECISION=_launch.dot_precision(x.dtype),
        BLOCK_N=config.rows,
        BLOCK_D=config.columns,
        **arguments,
    )


def mask_logits_forward(
    patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """patches (B, N, D), classes (B, C, D), weight and bias (C,) -> logits (B, C, h, w) in weight's dtype.

    Also what backward needs: 1/|patch| (B, N), 1/|class| (B, C), LayerNorm's mean and 1/std (B, N).
    """
    x, q = _rows_contiguous(patches), _rows_contiguous(classes)
    batch, n, _ = x.shape
    c = q.shape[1]
    logits = torch.empty((batch, c, *grid), dtype=weight.dtype, device=x.device)
    inv_x, mean, rstd = (torch.empty((batch, n), dtype=torch.float32, device=x.device) for _ in range(3))
    inv_q = torch.empty((batch, c), dtype=torch.float32, device=x.device)
    config = tuning.mask_head("forward", _launch.architecture(x.device), c, x.element_size())
    _launch_rows(
        mask_forward,
        x,
        q,
        config,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        logits_ptr=logits,
        inv_x_ptr=inv_x,
        inv_q_ptr=inv_q,
        mean_ptr=mean,
        rstd_ptr=rstd,
        eps=eps,
    )
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
    x, q = _rows_contiguous(patches), _rows_contiguous(classes)
    batch, n, dim = x.shape
    c = q.shape[1]
    new = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=x.device)
    grad_x, grad_q = new((batch, n, dim), x.dtype), new((batch, c, dim), x.dtype)
    grad_weight, grad_bias = new((c,), weight.dtype), new((c,), weight.dtype)
    if batch == 0 or n == 0 or c == 0:
        return grad_x.zero_(), grad_q.zero_(), grad_weight.zero_(), grad_bias.zero_()
    architecture = _launch.architecture(x.device)
    config = tuning.mask_head("backward", architecture, c, x.element_size())
    programs = triton.cdiv(n, config.rows) * batch
    t_row = triton.cdiv(c, 16) * 16  # aligned rows: vector loads in both products
    t = new((batch, n, t_row), x.dtype)
    along, sums = new((batch, n), torch.float32), new((3, programs, c), torch.float32)
    _launch_rows(
        mask_backward,
        x,
        q,
        config,
        grad_ptr=grad.contiguous(),
        weight_ptr=weight.contiguous(),
        inv_x_ptr=inv_x,
        inv_q_ptr=inv_q,
        mean_ptr=mean,
        rstd_ptr=rstd,
        t_ptr=t,
        along_ptr=along,
        sums_ptr=sums,
        t_row=t_row,
    )
    unit = _unit(x, q)
    config = tuning.mask_head("product", architecture, c, x.element_size())
    for own, y, out in ((x, q, grad_x), (q, x, grad_q)):
        _launch.launch(
            mask_product,
            (triton.cdiv(own.shape[1], config.rows) * triton.cdiv(dim, config.columns) * batch,),
            x.device,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            t_ptr=t,
            y_ptr=y,
            own_ptr=own,
            out_ptr=out,
            along_ptr=along,
            inv_q_ptr=inv_q,
            sums_ptr=sums,
            grad_weight_ptr=grad_weight,
            grad_bias_ptr=grad_bias,
            programs=programs,
            row_count=own.shape[1],
            sum_count=y.shape[1],
            width=dim,
            patch_count=n,
            t_row=t_row,
            **_strides("y", y, unit),
            **_strides("own", own, unit),
            UNIT=unit,
            PATCHES=own is x,
            PRECISION=_launch.dot_precision(x.dtype),
            BLOCK_R=config.rows,
            BLOCK_D=config.columns,
            BLOCK_K=32,
        )
    return grad_x, grad_q, grad_weight, grad_bias

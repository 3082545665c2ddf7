"""The mask head's last kernel: the gradients of patches and of classes, a product each with what mask_backward left.

mask_head.py launches it. Formulas in ops/reference/mask_head.py.
"""

import triton
import triton.language as tl

from depict_kernels.ops.triton_kernels.tiles import load_tile, zero_chunk


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
    t_ptr,  # (B, N, t_row): zeros past the last class
    y_ptr,  # (B, K, D): the other side, summed over
    own_ptr,  # (B, R, D): the side whose gradient this is
    out_ptr,  # (B, R, D) contiguous
    along_ptr,  # (B, N); used for the patches
    unscale_ptr,  # (B,): 1 / t's scale, or None
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
        y = load_tile(
            y_ptr + tl.cast(start, tl.int64) * y_row * UNIT,
            y_row * UNIT,
            steps,
            columns,
            sum_count - start,
            columns_left,
        )
        if PATCHES:
            t = load_tile(t_ptr + start, t_row, rows, steps, left, t_row - start)
        else:
            t = tl.trans(
                load_tile(
                    t_ptr + tl.cast(start, tl.int64) * t_row,
                    t_row,
                    steps,
                    rows,
                    sum_count - start,
                    t_row - first,
                )
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

    own = load_tile(own_ptr, own_row * UNIT, rows, columns, left, columns_left).to(tl.float32)
    out = acc - own * along[:, None]
    if unscale_ptr is not None:
        out *= tl.load(unscale_ptr + batch)
    mask = (rows[:, None] < left) & (columns[None, :] < columns_left)
    offset = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)
